"""Which device and which precision a run uses, and why.

How many threads torch computes with on a CPU: one a physical core that this process may use.

More than that makes threads of one core take turns at its multipliers, and threads beyond a
container's quota stop all of them at every barrier. Fewer happens as well: accelerate's launcher
sets one where nothing is said.

The longest row that cannot be ruled out by the memory of a machine: a bound, not a promise.

    bytes(L) = P · (w + 12 where P is trained) + L · v · kept
    P        ≥ vocabulary · hidden + layers · 2 · hidden · (hidden + inner)
    kept     ≥ layers · (4 · hidden + 2 · inner), or with gradient checkpointing
               layers · hidden + 4 · hidden + 2 · inner

with weights of w bytes (and gradient and two moments of Adam in float32 beside those that are
trained) and activations of v bytes. For the backward pass a block keeps of each token at least the
inputs of its norms, what attention multiplies and gives, and two vectors of its inner part. Every
term is the least that it can be, so that a row beyond the bound fits nowhere, while one within it
may still need a smaller batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError
from ftlevel.models.upstream.tensors import cpu_has
from ftlevel.world import is_launched

_TOPOLOGY = Path("/sys/devices/system/cpu")
_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def choose_threads() -> Choice:
    """Set torch's threads for this process, unless somebody has, and return what holds."""
    if os.environ.get("OMP_NUM_THREADS"):
        return Choice("threads", torch.get_num_threads(), "OMP_NUM_THREADS")
    allowed = allowed_cpus()
    cores = count_cores(allowed)
    if torch.get_num_threads() not in (cores, len(allowed)):  # torch begins with one of these
        return Choice("threads", torch.get_num_threads(), "as torch was set")
    quota = read_quota()
    threads = cores if quota is None else max(1, min(cores, math.floor(quota)))
    torch.set_num_threads(threads)
    if threads < cores:
        return Choice("threads", threads, f"the container's quota is {quota:g} CPUs")
    return Choice("threads", threads, "auto: one a physical core")


def allowed_cpus() -> list[int]:
    """Return the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count_cores(cpus: list[int], topology: Path = _TOPOLOGY) -> int:
    """Return how many physical cores the logical `cpus` are; all of them where nothing says so."""
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(siblings)


def read_quota(membership: Path = _MEMBERSHIP, root: Path = _CGROUPS) -> float | None:
    """Return the CPUs' worth of time that the control groups of this process leave it, or None."""
    quotas = [quota for group in control_groups(membership, root) if (quota := _quota(group))]
    return min(quotas, default=None)


def control_groups(
    membership: Path = _MEMBERSHIP, root: Path = _CGROUPS, controller: str = "cpu"
) -> Iterator[Path]:
    """Give the directories that may hold a limit, from this process's group to the root.

    In a container the path may be the host's, which is not there, and the root is its own group.
    """
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
    """Return the quota of one group in CPUs, of version 2 (cpu.max) or 1 (cpu.cfs_…)."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        limit = float(quota) / float(period)  # "max" is no number, and version 1 writes -1
    except (OSError, ValueError):
        return None
    return limit if limit > 0 else None


_INNER = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "n_inner", "hidden_dim")
_TRAINED_BYTES = 12  # of a weight that is trained: gradient and two moments in float32


@dataclass(frozen=True)
class Holding:
    """How a model is held while it is trained.

    Attributes:
        weight: bytes of a weight of the base: 0.5 where it has 4 bits.
        value: bytes of an activation.
        trained: whether every weight is trained.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    weight: float
    value: int
    trained: bool = False
    checkpointing: bool = False


def longest_in_memory(config: Any, holding: Holding, memory: int) -> int | None:
    """Return the most tokens of a row that `memory` may hold; None where length decides nothing.

    Args:
        config: of the model.
        holding: how it is held.
        memory: bytes of the device.
    """
    text = config.get_text_config()
    hidden, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    if not (isinstance(hidden, int) and isinstance(layers, int) and hidden and layers):
        return None
    # GPT-2 names no inner size where it is the usual one; the hidden size is less than that.
    inner = next((n for name in _INNER if isinstance(n := getattr(text, name, None), int)), hidden)
    weights = text.vocab_size * hidden + layers * 2 * hidden * (hidden + inner)
    block = 4 * hidden + 2 * inner
    kept = layers * hidden + block if holding.checkpointing else layers * block
    held = weights * (holding.weight + _TRAINED_BYTES * holding.trained)
    left = memory - held
    return int(left // (kept * holding.value)) if left > 0 else None


def device_memory(device: str) -> int:
    """Return the bytes of memory of a torch device: of the GPU, or of what this process may use."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    import psutil

    return min(
        [int(psutil.virtual_memory().total), *read_limits(control_groups(controller="memory"))]
    )


def release_freed_memory() -> None:
    """Return the freed pages of the C heap to the system, where it is glibc's.

    Blocks below the size from which malloc maps pages stay in the process when they are freed, as
    holes in the heap that the next phase of a run does not fill.
    """
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def read_limits(groups: Iterable[Path]) -> Iterator[int]:
    """Yield the limits in bytes of control groups of version 2 (memory.max) or 1."""
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                yield int((group / name).read_text())
            except (OSError, ValueError):  # "max" is no number
                continue


def read_free(groups: Iterable[Path]) -> Iterator[int]:
    """Yield the bytes that control groups of version 2 or 1 leave; cached files count as free."""
    for group in groups:
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most, taken = (int((group / name).read_text()) for name in (limit, used))
                lines = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # "max" is no number
                continue
            files = next((int(n) for name, n in map(str.split, lines) if name == cached), 0)
            yield max(0, most - (taken - files))


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def choose_device(wish: str) -> Choice:
    """Return the torch device type for `wish` (auto, cpu, cuda or mps).

    Raises:
        ConfigError: the wished device is not on this machine.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wish == "cuda" and not has_cuda:
        raise ConfigError("--device cuda: torch finds no CUDA device here. Use --device cpu.")
    if wish == "mps" and not has_mps:
        raise ConfigError("--device mps: torch finds no MPS device here. Use --device cpu.")
    if wish != "auto":
        return Choice("device", wish, "" if wish == "cpu" else describe_device(wish))
    found = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    return Choice("device", found, f"auto: {describe_device(found)}")


def describe_device(device: str) -> str:
    """Say what the device is in a few words."""
    if device == "cuda":
        name, count = str(torch.cuda.get_device_name()), torch.cuda.device_count()
        if count == 1 or is_launched():
            return name
        return f"{name}, one of {count}; --num-processes {count} trains on all of them"
    if device == "mps":
        return "Apple GPU"
    return "no GPU here"


def choose_dtype(wish: str, device: str, method: str, model_type: str) -> Choice:
    """Return the compute precision's name.

    Weights that are trained are held in float32 in any case; this is what is multiplied in.

    Raises:
        ConfigError: float16 on a CPU, or for T5, whose activations overflow in it; half precision
            for DeBERTa (1), whose mask does.
    """
    if model_type == "deberta":  # transformers 5.24 masks by float32's minimum, whatever the type
        if wish in ("auto", "float32"):
            why = "auto: DeBERTa's mask overflows anything shorter" if wish == "auto" else ""
            return Choice("dtype", "float32", why)
        raise ConfigError(
            f"--dtype {wish} cannot be used with deberta: its attention mask overflows it. "
            "Use --dtype float32."
        )
    if wish == "float16":
        if device == "cpu":
            raise ConfigError(
                "--dtype float16 cannot be used on the CPU. Use --dtype bfloat16 or float32."
            )
        if "t5" in model_type:
            raise ConfigError(
                f"--dtype float16 cannot be used with {model_type}: its feed-forward activations "
                "overflow float16 and the loss becomes NaN. Use --dtype bfloat16 or float32."
            )
    if wish != "auto":
        return Choice("dtype", wish, _held(method, wish))
    fast, why = _has_fast_bfloat16(device)
    name = "bfloat16" if fast else "float32"
    if device == "cuda" and not fast:
        overflows = "t5" in model_type
        name = "float32" if overflows else "float16"
        why += (
            f", and {model_type} overflows float16" if overflows else ": its fast type is float16"
        )
    held = _held(method, name)
    return Choice("dtype", name, f"auto: {why}" + (f"; {held}" if held else ""))


def _held(method: str, dtype: str) -> str:
    return "weights in float32" if method == "full" and dtype != "float32" else ""


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


def autocast(device: str, dtype: str) -> torch.autocast:
    """Return the context in which a model computes in `dtype` while trained weights stay float32.

    Training, evaluation, generation and the check of a saved adapter all run in it, so that they
    see the same numbers.
    """
    return torch.autocast(device, dtype=DTYPES[dtype], enabled=dtype != "float32")


def uses_tf32(wish: bool | None, device: str, dtype: str) -> bool:
    """Whether float32 is multiplied in TF32: 8 bits of exponent and 10 of mantissa."""
    if wish is False or dtype != "float32" or device != "cuda":
        return False
    return torch.cuda.get_device_capability() >= (8, 0)


def choose_tf32(wish: bool | None, device: str, dtype: str) -> list[Choice]:
    """Return the line of the screen; none where nothing was asked for and nothing is done.

    Raises:
        ConfigError: it is wished for on a device that has no such products.
    """
    if uses_tf32(wish, device, dtype):
        why = "auto: an Ampere GPU or later; --no-tf32 is exact" if wish is None else ""
        return [Choice("float32 products", "in TF32 while training", why)]
    if wish and dtype != "float32":
        return [Choice("float32 products", "in TF32", f"but there are none: dtype is {dtype}")]
    if wish:
        raise ConfigError(
            f"--tf32: {describe_device(device)}. TF32 needs an NVIDIA GPU, Ampere or later. Drop "
            "--tf32."
        )
    return []


@contextlib.contextmanager
def using_tf32(enabled: bool) -> Iterator[None]:
    """Multiply float32 in TF32 inside the block, if `enabled`; it changes nothing on a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor`, made on the CPU, on `device`; a GPU's queue is not waited for.

    A copy out of memory that is not pinned would wait until the GPU has done all before it.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def peak_memory_bytes(device: str) -> int:
    """Return the most memory used so far: of the GPU, or resident in this process."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reserved_memory_bytes() -> int:
    """Return the most memory of the GPU that torch's allocator has held so far."""
    return int(torch.cuda.max_memory_reserved())


def resident_bytes() -> int:
    """Return the memory that this process has resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def held_memory_bytes(device: str) -> int:
    """Return the memory that is held now: by torch on the GPU, or resident in this process."""
    return int(torch.cuda.memory_reserved()) if device == "cuda" else resident_bytes()


def free_memory_bytes(device: str) -> int:
    """Return how much memory is free: of the GPU, or of what this process may use."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return min([int(available) * 1024, *read_free(control_groups(controller="memory"))])
