"""Install a simulated GPU: import this module before torch.

`guard.cpp` is compiled once, in a few seconds, and loaded between libtorch_cpu and torch's Python
module. Under `FakeTensorMode` a model "on cuda:0" then runs forward and backward: the devices of
its tensors are known, their values are not.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-O1", "-shared", "-fPIC", "-std=c++20")


def find_compiler() -> str | None:
    """Return the path of the C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def get_unavailable_reason() -> str:
    """Return why the simulation cannot run in this process, or an empty string."""
    if find_compiler() is None:
        return "needs a C++ compiler: set CXX, or install g++"
    spec = importlib.util.find_spec("torch")
    version = runpy.run_path(str(Path(str(spec.origin)).with_name("version.py")) if spec else "")
    if version["cuda"] is not None:
        return f"needs a torch without CUDA: {version['__version__']} has a backend of its own"
    return ""


def build(compiler: str) -> Path:
    """Compile the library, or return the cached one for the same torch and source.

    Raises:
        RuntimeError: compilation failed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    torch, source = Path(spec.origin).parent, HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + (torch / "version.py").read_bytes() + bytes(torch))
    library = Path(tempfile.gettempdir()) / f"ftlevel-simulated-card-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    temporary = library.with_suffix(f".{os.getpid()}")
    includes = (torch / "include", torch / "include/torch/csrc/api/include",
                sysconfig.get_paths()["include"])  # fmt: skip
    command = [
        compiler, *FLAGS, *(f"-I{path}" for path in includes), str(source), "-o", str(temporary),
        f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    temporary.replace(library)
    return library


def install() -> None:
    """Make the simulated GPU visible in this process.

    Raises:
        RuntimeError: torch was imported before, or the simulation is unavailable.
    """
    import sys

    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the simulated GPU was installed")
    if reason := get_unavailable_reason():
        raise RuntimeError(f"the simulation {reason}")
    library = build(str(find_compiler()))
    spec = importlib.util.find_spec("torch")
    lib = Path(str(spec.origin)).parent / "lib"  # type: ignore[union-attr]
    for name in (lib / "libc10.so", lib / "libtorch_cpu.so", library):
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    _replace_driver_functions()


def _replace_driver_functions() -> None:
    """Replace functions of `torch.cuda` that would call the driver by values of an H100."""
    import bitsandbytes  # noqa: F401 - it loads CUDA kernels if torch finds a GPU
    import torch
    import torch.cuda.amp.common as mixed

    count = int(os.environ.get("SIMULATED_CARDS", "1"))
    memory = 80 * 10**9
    mixed.amp_definitely_not_available = lambda: False
    for name, value in {
        "is_available": True, "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": "simulated card", "device_count": count, "current_device": 0,
        "set_device": None, "synchronize": None, "mem_get_info": (memory, memory),
        "max_memory_allocated": 0, "empty_cache": None, "is_current_stream_capturing": False,
        "_is_in_bad_fork": False, "manual_seed_all": None, "_lazy_init": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    # Pinning needs the driver; only the request matters here.
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
