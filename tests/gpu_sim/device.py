"""A simulated CUDA device that computes: run any command on it, as typed.

    python -m gpu_sim.device ftlevel train --method lora

`device.cpp` is compiled once and loaded between libtorch_cpu and torch's Python module, in the
command and in all Python processes that it starts (`startup/sitecustomize.py`). Tensors on "cuda"
then have real values, computed by the CPU's kernels, and the device is as strict as a card: tensors
on two devices raise torch's error, memory is limited, and each wait of the host is counted by source
line. It does not tell how fast a card is, nor whether a kernel exists or is right.

Settings are environment variables: `SIMULATED_CARDS` (number of devices, 1), `SIMULATED_BYTES`
(memory of each, 80e9), `SIMULATED_CAPABILITY` ("9.0"; below 8.0 there is no bfloat16),
`SIMULATED_REPORT` (a directory, in which every process writes what it counted as JSON) and
`SIMULATED_TRACE` (`waits`: print where the host waits in a step; `peak`: where memory rises).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import importlib.abc
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"
FLAGS = ("-O1", "-shared", "-fPIC", "-std=c++20")
_OUTSIDE = {
    "_maybe_log_save_evaluate", "evaluate", "on_log", "_save_checkpoint", "_check_deferred",
    "prepare_step",  # completions are sampled, and rewarded by the host
    "_finish_step",  # of RL, whose next step begins with sampling
}  # fmt: skip
"""Functions between the training steps, in which the host may wait."""
installed: Card | None = None
"""The device in this process."""

FIRST_STEP = 2
"""Number of finished steps after which waits count: the first two steps fill caches."""


def get_unavailable_reason() -> str:
    """Return why no device can be simulated in this environment, or an empty string."""
    if _find_compiler() is None:
        return "needs a C++ compiler: set CXX, or install g++"
    version = runpy.run_path(str(_torch() / "version.py"))
    if version["cuda"] is not None:
        return f"needs a torch without CUDA: {version['__version__']} has a backend of its own"
    return ""


def build_environment(report: Path | None = None, **settings: Any) -> dict[str, str]:
    """Return the environment of a command that runs on the device.

    Args:
        report: directory for what the processes count.
        settings: `cards`, `bytes` and `capability`.

    Raises:
        RuntimeError: the device is unavailable, or its source does not compile.
    """
    if reason := get_unavailable_reason():
        raise RuntimeError(f"the simulated device {reason}")
    paths = [str(HERE / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "SIMULATED_LIBRARY": str(_build()),
        **{f"SIMULATED_{name.upper()}": str(value) for name, value in settings.items()},
    }  # fmt: skip
    if report is not None:
        environment["SIMULATED_REPORT"] = str(report)
    return environment


def read_reports(directory: Path) -> list[dict[str, Any]]:
    """Return what the processes of a command counted, the first process first."""
    files = sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not installed")
    return Path(spec.origin).parent


def _find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def _build() -> Path:
    """Compile the library, or return the cached one for the same torch and source."""
    torch = _torch()
    parts = (SOURCE.read_bytes(), (torch / "version.py").read_bytes(), bytes(torch))
    key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"ftlevel-simulated-device-{key}.so"
    if library.exists():
        return library
    temporary = library.with_suffix(f".{os.getpid()}")
    includes = (torch / "include", torch / "include/torch/csrc/api/include",
                sysconfig.get_paths()["include"])  # fmt: skip
    command = [
        str(_find_compiler()), *FLAGS, *(f"-I{path}" for path in includes), str(SOURCE),
        "-o", str(temporary), f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    temporary.replace(library)
    return library


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Installs the device when torch is imported."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self._loader: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name == "bitsandbytes" and self._loader is None:
            import torch  # noqa: F401 - imports bitsandbytes before the device is visible

            imported = sys.modules.pop(name)  # else it would be imported again
            loader = _Imported(imported)
            return importlib.util.spec_from_loader(name, loader, is_package=True)
        if name != "torch" or self._loader is not None:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        folder = Path(module.__file__).parent / "lib"
        for path in (folder / "libc10.so", folder / "libtorch_cpu.so"):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        with _without_stderr():  # torch reports that collectives are replaced
            library = ctypes.CDLL(str(self._library), mode=ctypes.RTLD_GLOBAL)
        self._loader.exec_module(module)
        global installed
        installed = Card(library)
        installed.install()


class _Imported(importlib.abc.Loader):
    """Loader of a module that is imported already."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def create_module(self, spec: Any) -> Any:
        spec.submodule_search_locations = self._module.__path__
        return self._module

    def exec_module(self, module: Any) -> None: ...


@contextlib.contextmanager
def _without_stderr() -> Any:
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def install_on_import() -> None:
    """Install the device as soon as torch is imported in this process."""
    library = Path(os.environ["SIMULATED_LIBRARY"])
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before the simulated device was installed")
    sys.meta_path.insert(0, _Importer(library))


class Card:
    """The device in this process: `torch.cuda`'s functions, and what is counted.

    Attributes:
        waits: number of waits of the host in training steps after the second, by source line.
        all_waits: number of all waits.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        for name in ("sim_allocated", "sim_reserved", "sim_peak", "sim_capacity"):
            getattr(library, name).restype = ctypes.c_int64
        self.waits: Counter[str] = Counter()
        self.all_waits = 0
        self.first_step = sys.maxsize
        self.peak = 0
        self._main = threading.main_thread().ident
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._count_wait)

        self._peak_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._print_peak)

    def install(self) -> None:
        """Replace the functions of `torch.cuda` that would call the driver."""
        import bitsandbytes  # noqa: F401 - it loads CUDA kernels if torch finds a GPU
        import torch
        import torch.cuda.amp.common as mixed

        mixed.amp_definitely_not_available = lambda: False
        torch.version.cuda = "13.0"
        self._replace_functions(torch)
        _register_kernels(torch, lambda: self.capability)
        _replace_nccl(torch)
        _replace_storage(torch)
        self._library.sim_on_wait(self._callback)
        if os.environ.get("SIMULATED_TRACE") == "peak":
            self._library.sim_on_peak(self._peak_callback)
        atexit.register(self._write_report)

    @property
    def count(self) -> int:
        """Number of devices."""
        return int(os.environ.get("SIMULATED_CARDS", "1"))

    @property
    def name(self) -> str:
        """Name of the device."""
        return f"simulated card {self.capability[0]}.{self.capability[1]}"

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the device."""
        major, _, minor = os.environ.get("SIMULATED_CAPABILITY", "9.0").partition(".")
        return int(major), int(minor)

    def _replace_functions(self, torch: Any) -> None:
        library = self._library

        def properties(device: Any = None) -> Any:
            return SimpleNamespace(
                name=self.name, major=self.capability[0], minor=self.capability[1],
                total_memory=library.sim_capacity(), multi_processor_count=132, warp_size=32,
                max_threads_per_multi_processor=2048, gcnArchName="", uuid="0",
                L2_cache_size=2**25, shared_memory_per_block=2**15, regs_per_multiprocessor=65536,
                shared_memory_per_block_optin=2**17, is_integrated=0, is_multi_gpu_board=0,
            )  # fmt: skip

        def has_bfloat16(including_emulation: bool = True) -> bool:
            return self.capability >= (8, 0) or including_emulation

        def index(device: Any = None) -> int:
            if device is None:
                return int(library.sim_current())
            if isinstance(device, int):
                return device if device >= 0 else int(library.sim_current())
            at = torch.device(device).index
            return int(library.sim_current()) if at is None else at

        def reset_peak(device: Any = None) -> None:
            self.peak = max(self.peak, library.sim_peak(index(device)))
            library.sim_reset_peak(index(device))

        def exchange(device: int) -> int:
            before = int(library.sim_current())
            if device >= 0:
                library.sim_set_current(device)
            return before

        def stats(device: Any = None) -> dict[str, int]:
            at = index(device)
            return {
                "allocated_bytes.all.current": library.sim_allocated(at),
                "allocated_bytes.all.peak": library.sim_peak(at),
                "reserved_bytes.all.current": library.sim_reserved(at),
                "reserved_bytes.all.peak": library.sim_reserved(at),
                "num_alloc_retries": 0, "num_ooms": 0,
            }  # fmt: skip

        def free_and_total(device: Any = None) -> tuple[int, int]:
            total = library.sim_capacity()
            return total - library.sim_reserved(index(device)), total

        @contextlib.contextmanager
        def use_stream(_: Any) -> Any:
            yield

        generator = torch.default_generator
        functions = {
            "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
            "init": lambda: None, "device_count": lambda: self.count,
            "current_device": lambda: int(library.sim_current()),
            "set_device": lambda device: library.sim_set_current(index(device)),
            "_exchange_device": exchange, "_maybe_exchange_device": exchange,
            "get_device_properties": properties,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: self.name,
            "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"],
            "is_bf16_supported": has_bfloat16,
            "mem_get_info": free_and_total,
            "memory_allocated": lambda device=None: library.sim_allocated(index(device)),
            "memory_reserved": lambda device=None: library.sim_reserved(index(device)),
            "max_memory_allocated": lambda device=None: library.sim_peak(index(device)),
            "max_memory_reserved": lambda device=None: library.sim_reserved(index(device)),
            "reset_peak_memory_stats": reset_peak, "reset_max_memory_allocated": reset_peak,
            "memory_stats": stats, "empty_cache": lambda: library.sim_empty_cache(),
            "synchronize": lambda device=None: self._count_wait(b"synchronize"),
            "is_current_stream_capturing": lambda: False, "_is_in_bad_fork": lambda: False,
            "ipc_collect": lambda: None, "can_device_access_peer": lambda *_: True,
            "get_allocator_backend": lambda: "native", "utilization": lambda device=None: 0,
            "current_stream": lambda device=None: Stream(), "default_stream": lambda device=None: Stream(),
            "set_stream": lambda stream: None, "stream": use_stream,
            "get_rng_state": lambda device="cuda": generator.get_state(),
            "get_rng_state_all": lambda: [generator.get_state() for _ in range(self.count)],
            "set_rng_state": lambda state, device="cuda": None,
            "set_rng_state_all": lambda states: None,
            # Draws come from the CPU's generator, which `torch.manual_seed` has set already.
            "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
            "seed": lambda: None, "seed_all": lambda: None,
            "initial_seed": generator.initial_seed,
        }  # fmt: skip
        for modules in (torch.cuda, torch.cuda.random, torch.cuda.memory):
            for key, value in functions.items():
                if modules is torch.cuda or hasattr(modules, key):
                    setattr(modules, key, value)
        # torch's streams read the memory of an event as that of one of torch's.
        for key in ("current_stream", "set_stream", "synchronize"):
            setattr(torch.accelerator, key, functions[key])
        torch.cuda.Stream, torch.cuda.Event = Stream, Event
        torch.cuda.default_generators = (generator,) * 8
        for key, value in {
            "_cuda_getDevice": functions["current_device"], "_cuda_setDevice": library.sim_set_current,
            "_cuda_exchangeDevice": exchange, "_cuda_maybeExchangeDevice": exchange,
            "_cuda_getDeviceCount": lambda: self.count, "_cuda_init": lambda: None,
            "_cuda_isCurrentStreamCapturing": lambda: False, "_cuda_isInBadFork": lambda: False,
        }.items():  # fmt: skip
            setattr(torch._C, key, value)

    def _count_wait(self, what: bytes) -> None:
        self.all_waits += 1
        # Without this frame, whose list would hold itself and with it the tensors of all callers.
        frames = list(_frames(sys._getframe().f_back))  # of a backward pass, perhaps none
        main = frames
        if threading.get_ident() != self._main:
            main = list(_frames(sys._current_frames().get(self._main)))
        names = {frame.f_code.co_name for frame in main}
        if names & _OUTSIDE:
            return
        loop = next((f for f in main if f.f_code.co_name == "_run_epoch"), None)
        state = getattr(loop.f_locals.get("self"), "state", None) if loop is not None else None
        if state is None:
            return
        self.first_step = min(self.first_step, state.global_step)  # of a resumed run
        if state.global_step >= self.first_step + FIRST_STEP:
            line = f"{what.decode()} {_describe(frames)}"
            self.waits[line] += 1
            if os.environ.get("SIMULATED_TRACE") == "waits" and self.waits[line] == 1:
                sys.stderr.write(f"{line}\n{''.join(traceback.format_stack((frames or main)[0]))}")

    def _print_peak(self, size: bytes) -> None:
        stack = "".join(traceback.format_stack(sys._getframe()))
        sys.stderr.write(f"peak {int(size) / 1e6:.2f} MB\n{stack}")

    def _write_report(self) -> None:
        directory = os.environ.get("SIMULATED_REPORT")
        self._library.sim_on_wait(None)
        if not directory or not self._library.sim_peak(0):
            return
        cards = range(self.count)
        report = {
            "argv": sys.argv, "waits": dict(self.waits),
            "peak": max([self.peak, *(self._library.sim_peak(at) for at in cards)]),
        }  # fmt: skip
        path = Path(directory) / f"{os.getpid()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report), encoding="utf-8")


def _returns(value: Any) -> Any:
    """Return a function that returns `value` for any arguments."""
    return lambda *_, **__: value


class Stream:
    """A stream: everything is finished when it is asked for."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *_: Any, **__: Any) -> None:
        import torch

        self.device = torch.device("cuda", torch.cuda.current_device())

    synchronize = wait_stream = wait_event = __exit__ = _returns(None)
    query, is_capturing = _returns(True), _returns(False)

    def record_event(self, event: Any = None) -> Any:
        """Return an event."""
        return event or Event()

    def __enter__(self) -> Stream:
        return self


class Event:
    """An event: it has always happened."""

    __init__ = record = wait = synchronize = _returns(None)
    query, elapsed_time = _returns(True), _returns(1.0)  # in milliseconds


def _frames(frame: Any) -> Any:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(frames: list[Any]) -> str:
    """Return the innermost line of ftlevel, or of a library if there is none."""
    lines = [
        (f.f_code.co_filename, f.f_lineno) for f in frames if __file__ not in f.f_code.co_filename
    ]
    own = [line for line in lines if "/ftlevel/" in line[0]]
    outer = [line for line in lines if "/torch/utils/" not in line[0]]
    file, number = (own or outer or lines or [("?", 0)])[0]
    return f"{'/'.join(Path(file).parts[-3:])}:{number}"


def _register_kernels(torch: Any, capability: Any) -> None:
    """Register what only a GPU has: attention and products with a wider result."""
    from gpu_sim import card_kernels

    card_kernels.register(torch, capability)


def _replace_storage(torch: Any) -> None:
    """Let storages be created and resized on the device, which a CPU build refuses."""
    move = torch.UntypedStorage.to

    def to(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
        if torch.device(device).type != "cuda" or storage.device.type == "cuda":
            return move(storage, device=device, non_blocking=non_blocking)
        source = torch.empty(0, dtype=torch.uint8).set_(storage)
        return source.to(device, non_blocking=non_blocking).untyped_storage()

    def clone(storage: Any) -> Any:
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return whole.clone().untyped_storage()

    resize_on_host = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize_on_host(storage, size)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        torch.ops.gpu_sim.resize_storage(whole, size)
        return storage

    torch.UntypedStorage.resize_ = resize_
    torch.UntypedStorage.to, torch.UntypedStorage.clone = to, clone
    torch.UntypedStorage.cuda = lambda storage, *_, **__: to(storage, device="cuda")


def _replace_nccl(torch: Any) -> None:
    """Use gloo under the name nccl; `device.cpp` lets it read tensors of the device."""
    from torch.distributed import distributed_c10d as c10d

    if not torch.distributed.is_available():
        return
    gloo = c10d.ProcessGroupGloo

    class _Nccl(type):
        def __instancecheck__(cls, other: Any) -> bool:
            return isinstance(other, gloo)

    class ProcessGroupNCCL(metaclass=_Nccl):
        Options = SimpleNamespace

        def __new__(cls, store: Any, rank: int, size: int, options: Any) -> Any:  # type: ignore[misc]
            return gloo(store, rank, size, timeout=options._timeout)

    c10d.ProcessGroupNCCL = ProcessGroupNCCL
    c10d.is_nccl_available = torch.distributed.is_nccl_available = lambda: True


def run(program: str, *arguments: str) -> int:
    """Run a command on the device; return its exit status."""
    command = [shutil.which(program) or program, *arguments]
    return subprocess.run(command, env=build_environment(), check=False).returncode


def main() -> int:
    """Run the command in the arguments on the device; return its exit status."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    return run(*sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
