"""Which device and which precision a run uses, and why."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ftlevel.config.choices import Choice
from ftlevel.errors import ConfigError
from ftlevel.models.memory import read_free
from ftlevel.models.threads import control_groups
from ftlevel.models.upstream.tensors import cpu_has
from ftlevel.world import is_launched

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
