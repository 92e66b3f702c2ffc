"""A card that is not there: import it before torch.

`guard.cpp` is built once, in a few seconds, and loaded between libtorch_cpu and torch's Python
module. Under `FakeTensorMode` a model "on cuda:0" then runs forward and backward: where its tensors
are is known, and what they are worth is not.
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
    """Return the C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def why_not() -> str:
    """Return why no card can be put into this process; empty where one can."""
    if find_compiler() is None:
        return "needs a C++ compiler: set CXX, or install g++"
    found = importlib.util.find_spec("torch")
    version = runpy.run_path(str(Path(str(found.origin)).with_name("version.py")) if found else "")
    if version["cuda"] is not None:
        return f"needs a torch without CUDA: {version['__version__']} has a backend of its own"
    return ""


def build(compiler: str) -> Path:
    """Return the library, built unless it was built before for the same torch and source.

    Raises:
        RuntimeError: the compiler does not take it.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed")
    torch, source = Path(found.origin).parent, HERE / "guard.cpp"
    key = hashlib.sha256(source.read_bytes() + (torch / "version.py").read_bytes() + bytes(torch))
    library = Path(tempfile.gettempdir()) / f"ftlevel-simulated-card-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    built = library.with_suffix(f".{os.getpid()}")
    includes = (torch / "include", torch / "include/torch/csrc/api/include",
                sysconfig.get_paths()["include"])  # fmt: skip
    command = [
        compiler, *FLAGS, *(f"-I{place}" for place in includes), str(source), "-o", str(built),
        f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    built.replace(library)
    return library


def put_in() -> None:
    """Let this process see the card.

    Raises:
        RuntimeError: torch was imported before, or it cannot be for what `why_not` says.
    """
    import sys

    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the card was put in")
    if reason := why_not():
        raise RuntimeError(f"the simulation {reason}")
    library = build(str(find_compiler()))
    found = importlib.util.find_spec("torch")
    lib = Path(str(found.origin)).parent / "lib"  # type: ignore[union-attr]
    for name in (lib / "libc10.so", lib / "libtorch_cpu.so", library):
        ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
    _answer_for_the_driver()


def _answer_for_the_driver() -> None:
    """Let `torch.cuda` say what an H100 would, where it would ask the driver."""
    import bitsandbytes  # noqa: F401 - it loads its kernels where torch finds a card
    import torch
    import torch.cuda.amp.common as mixed

    count = int(os.environ.get("SIMULATED_CARDS", "1"))
    memory = 80 * 10**9
    mixed.amp_definitely_not_available = lambda: False
    for name, answer in {
        "is_available": True, "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": "simulated card", "device_count": count, "current_device": 0,
        "set_device": None, "synchronize": None, "mem_get_info": (memory, memory),
        "max_memory_allocated": 0, "empty_cache": None, "is_current_stream_capturing": False,
        "_is_in_bad_fork": False, "manual_seed_all": None, "_lazy_init": None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    # Pinning is a driver's business; that it was asked for is what counts.
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
