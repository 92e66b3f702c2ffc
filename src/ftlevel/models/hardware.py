"""Choice of device, dtype and CPU threads, and memory limits of devices and processes.

    bytes(L) = P · (w + 12 if P is trained) + L · v · kept
    P        ≥ vocabulary · hidden + layers · 2 · hidden · (hidden + inner)
    kept     ≥ layers · (4 · hidden + 2 · inner), or with gradient checkpointing
               layers · hidden + 4 · hidden + 2 · inner

bounds the longest row L that can fit: weights have w bytes, activations v bytes; gradient and two
Adam moments are in float32. As every term is a lower bound, longer rows never fit; shorter rows may
still need a smaller batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError
from ftlevel.models.upstream.tensors import cpu_has, set_allocator
from ftlevel.world import is_launched

_TOPOLOGY = Path("/sys/devices/system/cpu")
_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def select_threads() -> Choice:
    """Set torch's threads to one per usable physical core unless configured; returns the choice."""
    if os.environ.get("OMP_NUM_THREADS"):
        return Choice("threads", torch.get_num_threads(), "OMP_NUM_THREADS")
    allowed = allowed_cpus()
    cores = get_num_cores(allowed)
    if torch.get_num_threads() not in (cores, len(allowed)):  # torch's defaults
        return Choice("threads", torch.get_num_threads(), "as set in torch")
    quota = get_cpu_quota()
    threads = cores if quota is None else max(1, min(cores, math.floor(quota)))
    torch.set_num_threads(threads)
    if threads < cores:
        return Choice("threads", threads, f"the container's quota is {quota:g} CPUs")
    return Choice("threads", threads, "auto: one a physical core")


def allowed_cpus() -> list[int]:
    """Returns the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def get_num_cores(cpus: list[int], topology: Path = _TOPOLOGY) -> int:
    """Returns the number of physical cores of the logical CPUs `cpus`; if unknown, `len(cpus)`."""
    core_ids = set()
    for cpu in cpus:
        try:
            core_ids.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(core_ids)


def get_cpu_quota(membership: Path = _MEMBERSHIP, root: Path = _CGROUPS) -> float | None:
    """Returns the lowest CPU quota of this process's control groups, in CPUs; None if unlimited."""
    quotas = [quota for group in control_groups(membership, root) if (quota := _quota(group))]
    return min(quotas, default=None)


def control_groups(
    membership: Path = _MEMBERSHIP, root: Path = _CGROUPS, controller: str = "cpu"
) -> Iterator[Path]:
    """Yields the directories of the cgroups in `membership` (/proc/self/cgroup), up to `root`."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        top = root if number == "0" else root / controller
        group = top / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(top))


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        limit = float(quota) / float(period)  # "max" is not a number; v1 writes -1
    except (OSError, ValueError):
        return None
    return limit if limit > 0 else None


_INNER = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner", "hidden_dim")
_TRAINED_BYTES = 12  # gradient and two Adam moments in float32


@dataclass(frozen=True)
class MemorySettings:
    """Bytes per base `weight` (0.5 for 4 bits) and activation `value`, and training settings."""

    weight: float
    value: int
    trained: bool = False
    checkpointing: bool = False


def max_length_in_memory(config: Any, settings: MemorySettings, memory: int) -> int | None:
    """Returns an upper bound of the tokens per row that fit in `memory` bytes; None if unknown."""
    text = config.get_text_config()
    hidden, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    if not (isinstance(hidden, int) and isinstance(layers, int) and hidden and layers):
        return None
    # GPT-2's config omits the default inner size; the hidden size is a lower bound.
    inner = next((n for name in _INNER if isinstance(n := getattr(text, name, None), int)), hidden)
    weights = text.vocab_size * hidden + layers * 2 * hidden * (hidden + inner)
    block = 4 * hidden + 2 * inner
    activations = layers * hidden + block if settings.checkpointing else layers * block
    weight_memory = weights * (settings.weight + _TRAINED_BYTES * settings.trained)
    available = memory - weight_memory
    return int(available // (activations * settings.value)) if available > 0 else None


def device_memory(device: str) -> int:
    """Returns the total memory in bytes: of the GPU, or the RAM that this process may use."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return min(
        [
            int(psutil.virtual_memory().total),
            *get_memory_limits(control_groups(controller="memory")),
        ]
    )


def trim_heap() -> None:
    """Return freed pages of glibc's heap to the system (`malloc_trim`)."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def free_device_memory() -> None:
    """Delete unreferenced objects, and return cached GPU memory and freed heap pages."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def get_memory_limits(groups: Iterable[Path]) -> Iterator[int]:
    """Yields the memory limits of the control groups in bytes, skipping groups without limit."""
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                yield int((group / name).read_text())
            except (OSError, ValueError):  # "max" is not a number
                continue


def get_free_memory(groups: Iterable[Path]) -> Iterator[int]:
    """Yields the free bytes of each control group with a limit; cached files count as free."""
    for group in groups:
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                limit_bytes, used_bytes = (
                    int((group / name).read_text()) for name in (limit, used)
                )
                lines = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # "max" is not a number
                continue
            files = next((int(n) for name, n in map(str.split, lines) if name == cached), 0)
            yield max(0, limit_bytes - (used_bytes - files))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def select_device(requested: str) -> Choice:
    """Select the device type for auto, cpu, cuda or mps; raises `ConfigError` if unavailable."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if requested == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device. Use --device cpu.")
    if requested == "mps" and not has_mps:
        raise ConfigError("--device mps: torch finds no MPS device. Use --device cpu.")
    if requested != "auto":
        return Choice("device", requested, "" if requested == "cpu" else format_device(requested))
    device = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    return Choice("device", device, f"auto: {format_device(device)}")


def format_device(device: str) -> str:
    """Returns a short description of the device."""
    if device == "cuda":
        name, count = str(torch.cuda.get_device_name()), torch.cuda.device_count()
        if count == 1 or is_launched():
            return name
        return f"{name}, one of {count}; --num-processes {count} trains on all of them"
    if device == "mps":
        return "Apple GPU"
    return "no GPU here"


def select_dtype(
    dtype: str, device: str, model_type: str, *, float32_weights: bool = False
) -> Choice:
    """Returns the name of the compute dtype; `ConfigError` if device or model do not support it.

    `float32_weights` is whether trained base weights stay in float32.
    """
    if model_type == "deberta":  # transformers 5.24 masks with float32's minimum
        if dtype in ("auto", "float32"):
            why = "auto: DeBERTa's mask overflows anything shorter" if dtype == "auto" else ""
            return Choice("dtype", "float32", why)
        raise ConfigError(
            f"--dtype {dtype} cannot be used with deberta: its attention mask overflows it. "
            "Use --dtype float32."
        )
    if dtype == "float16":
        if device == "cpu":
            raise ConfigError(
                "--dtype float16 cannot be used on the CPU. Use --dtype bfloat16 or float32."
            )
        if _overflows_float16(model_type):
            raise ConfigError(
                f"--dtype float16 cannot be used with {model_type}: its activations overflow "
                "float16 and the loss becomes NaN. Use --dtype bfloat16 or float32."
            )
    weights = "weights in float32" if float32_weights else ""
    if dtype != "auto":
        return Choice("dtype", dtype, weights if dtype != "float32" else "")
    fast, why = _has_fast_bfloat16(device)
    name = "bfloat16" if fast else "float32"
    if device == "cuda" and not fast:
        overflows = _overflows_float16(model_type)
        name = "float32" if overflows else "float16"
        why += (
            f", and {model_type} overflows float16" if overflows else ": its fast type is float16"
        )
    note = f"; {weights}" if weights and name != "float32" else ""
    return Choice("dtype", name, f"auto: {why}{note}")


def _overflows_float16(model_type: str) -> bool:
    """Returns whether activations exceed 65,504: in T5's feed-forward layers, and in Gemma 3."""
    return "t5" in model_type or model_type.startswith("gemma3")


def _has_fast_bfloat16(device: str) -> tuple[bool, str]:
    if device == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return has, "the GPU has bfloat16" if has else "the GPU has no bfloat16"
    if device == "mps":
        return False, "float32 is the safe choice on MPS"
    if cpu_has("amx_tile"):
        return True, "CPU has amx_tile"
    if cpu_has("avx512_bf16"):
        return True, "CPU has avx512_bf16"
    return False, "the CPU has no bfloat16 instructions"


def autocast(device: str, dtype: str, *, cache: bool | None = None) -> torch.autocast:
    """Returns the autocast context for `dtype`, in which trained weights stay float32.

    `cache` is whether cast weights are kept until its end; by default as set in torch.
    """
    enabled = dtype != "float32"
    return torch.autocast(device, dtype=DTYPES[dtype], enabled=enabled, cache_enabled=cache)


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """In the `with` block, use eval mode; restores the training mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextlib.contextmanager
def evaluating(model: Any, device: str, dtype: str) -> Iterator[None]:
    """In the `with` block, use eval mode, no gradients and autocast; restores the training mode."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    with eval_mode(model), contextlib.ExitStack() as hooks:
        if head is not None:
            hooks.enter_context(head.register_forward_pre_hook(_make_contiguous))
        with torch.no_grad(), autocast(device, dtype):
            yield


def _make_contiguous(head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:  # noqa: ARG001 - a hook
    """Pre-hook of the language head that makes its input contiguous.

    For a slice, such as the last tokens of rows, torch copies a frozen weight per row: 1.6 s
    instead of 0.014 s and 432 MiB for 8 rows of SmolLM2 in bfloat16, 190 ms instead of 9 for one.
    """
    return (args[0].flatten(0, -2).contiguous().view(args[0].shape), *args[1:]) if args else None


def uses_tf32(enabled: bool | None, device: str, dtype: str) -> bool:
    """Returns whether float32 products use TF32: on Ampere or later, unless `enabled` is False."""
    if enabled is False or dtype != "float32" or device != "cuda":
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def select_tf32(tf32: bool | None, device: str, dtype: str) -> list[Choice]:
    """Returns 0 or 1 log lines on TF32; ConfigError if `tf32` is True and `device` lacks it."""
    if uses_tf32(tf32, device, dtype):
        message = "auto: an Ampere GPU or later; --no-tf32 is exact" if tf32 is None else ""
        return [Choice("float32 products", "in TF32 while training", message)]
    if tf32 and dtype != "float32":
        return [Choice("float32 products", "in TF32", f"but there are none: dtype is {dtype}")]
    if tf32:
        raise ConfigError(
            f"--tf32: {format_device(device)}. TF32 needs an NVIDIA GPU, Ampere or later. Drop "
            "--tf32."
        )
    return []


@contextlib.contextmanager
def using_tf32(enabled: bool) -> Iterator[None]:
    """Enable TF32 inside the `with` block if `enabled`; no effect on a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute float32 products on a GPU without TF32 inside the `with` block."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    # Reading the older setting after the newer one is set raises an error.
    is_new = hasattr(matmul, "fp32_precision")
    name, value = ("fp32_precision", "ieee") if is_new else ("allow_tf32", False)
    owners = (matmul, cudnn.conv) if is_new else (matmul, cudnn)
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, previous in zip(owners, before, strict=True):
            setattr(owner, name, previous)


def has_forced_tf32(device: str) -> bool:
    """Returns whether the driver computes all float32 products in TF32, which torch cannot undo."""
    return device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "1"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device` through pinned memory, without synchronizing with a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments(device: str) -> None:
    """Enable expandable CUDA segments, unless the user has configured the allocator.

    Micro-batches of different lengths fragment segments of fixed size. An environment variable
    would have no effect here, as CUDA may be initialized already.
    """
    if device == "cuda" and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        set_allocator("expandable_segments:True")


def peak_memory_bytes(device: str) -> int:
    """Returns peak memory in bytes: allocated on the GPU, or resident in this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import resource

    with contextlib.suppress(OSError):  # Linux: ru_maxrss includes the parent before exec
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reserved_memory_bytes() -> int:
    """Returns the peak GPU memory that torch's allocator reserved, in bytes."""
    return int(torch.cuda.max_memory_reserved())


def resident_bytes() -> int:
    """Returns the resident memory of this process in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def current_memory_bytes(device: str) -> int:
    """Returns current memory in bytes: reserved on the GPU, or resident in this process."""
    return int(torch.cuda.memory_reserved()) if device == "cuda" else resident_bytes()


def free_memory_bytes(device: str) -> int:
    """Returns free memory in bytes: of the GPU, or RAM that this process may use.

    Freed memory in the cache of torch's allocator is free, too, though not to other processes.
    """
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + cached)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return min([int(available) * 1024, *get_free_memory(control_groups(controller="memory"))])
