"""`doctor`: check the machine and the installation, with advice for each problem."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ftlevel._version import __version__

Status = Literal["good", "note", "bad"]

_MIN_MEMORY, _MIN_DISK = 4 * 2**30, 5 * 2**30  # bytes free


@dataclass(frozen=True)
class CheckResult:
    """Result of a check; `verdict` is `note` for a missing optional part, `bad` if runs fail."""

    name: str
    verdict: Status
    value: str
    advice: str = ""


def run_checks() -> list[CheckResult]:
    """Returns the results of all checks."""
    checks = (_program, _versions, _device, _precision, _four_bit, _attention, _threads, _memory)
    return [result for check in (*checks, _disk, _hub) for result in _run(check)]


def to_dict(results: list[CheckResult]) -> dict[str, Any]:
    """Returns the output of `--json`."""
    return {
        "ftlevel": __version__,
        "ok": all(result.verdict != "bad" for result in results),
        "findings": [asdict(result) for result in results],
    }


def _run(check: Callable[[], Iterator[CheckResult]]) -> list[CheckResult]:
    try:
        return list(check())
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        message = " ".join(str(error).split())[:200]
        name = check.__name__.strip("_").replace("_", " ")
        fix = "Reinstall ftlevel in a virtual environment of its own."
        return [CheckResult(name, "bad", f"{type(error).__name__}: {message}", fix)]


def _program() -> Iterator[CheckResult]:
    python = f"Python {platform.python_version()} ({platform.system()} {platform.machine()})"
    yield CheckResult("ftlevel", "good", f"{__version__}, {python}")


def _versions() -> Iterator[CheckResult]:
    from packaging.requirements import Requirement

    requirements = [Requirement(line) for line in metadata.requires("ftlevel") or ()]
    core = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    is_complete = True
    for requirement in core:
        name, specifier = requirement.name, requirement.specifier
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not specifier.contains(version, prereleases=True):
            is_complete = False
            value = f"{version or 'not installed'}; needs {specifier}"
            yield CheckResult(name, "bad", value, f"pip install '{name}{specifier}'")
    if is_complete:
        names = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        yield CheckResult("versions", "good", f"all {len(core)} requirements are met: {versions}")


def _device() -> Iterator[CheckResult]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            free_bytes, _ = torch.cuda.mem_get_info(index)
            size = f"{free_bytes / 2**30:.1f} of {gpu.total_memory / 2**30:.1f} GiB free"
            yield CheckResult(f"GPU {index}", "good", f"{gpu.name}, {size}")
        return
    if torch.backends.mps.is_available():
        yield CheckResult("GPU", "good", "Apple GPU")
        return
    if shutil.which("nvidia-smi") is None:
        yield CheckResult("GPU", "note", "none; runs use the CPU")
        return
    cuda_version = torch.version.cuda
    message = f"torch {torch.__version__} " + (
        f"is built for CUDA {cuda_version}, which the driver does not support"
        if cuda_version
        else "is a CPU build"
    )
    fix = "Install the torch that pytorch.org names for this driver."
    yield CheckResult(
        "GPU", "bad", f"nvidia-smi is installed, but torch sees no GPU: {message}", fix
    )


def _precision() -> Iterator[CheckResult]:
    from ftlevel.models.hardware import select_device, select_dtype

    choice = select_dtype("auto", str(select_device("auto").value), "llama")
    fix = "" if choice.value == "bfloat16" else "bfloat16 would need half the memory."
    status: Status = "good" if choice.value == "bfloat16" else "note"
    yield CheckResult("precision", status, f"{choice.value} ({choice.reason})", fix)


def _four_bit() -> Iterator[CheckResult]:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=device)
    codes, state = quantize_4bit(weight, quant_type="nf4")
    error = float((dequantize_4bit(codes, state) - weight).abs().mean())
    is_ok = error < 0.2  # NF4: 0.07 standard deviations
    version = metadata.version("bitsandbytes")
    fix = "" if is_ok else "--quant 4bit would use wrong weights: pip install -U bitsandbytes"
    value = f"bitsandbytes {version} on {device}: mean error {error:.3f} of a standard deviation"
    yield CheckResult("4 bits", "good" if is_ok else "bad", value, fix)


def _attention() -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        yield CheckResult("attention", "good", "packed rows by blocks and SDPA, on the CPU")
        return
    kernels = [name for name in ("flash_attn", "liger_kernel") if find_spec(name)]
    fix = "" if "liger_kernel" in kernels else "pip install 'ftlevel[gpu]' for fused kernels."
    value = f"SDPA; extra kernels: {', '.join(kernels) or 'none'}"
    yield CheckResult("attention", "good" if kernels else "note", value, fix)


def _threads() -> Iterator[CheckResult]:
    import torch

    cores, used = os.cpu_count() or 1, torch.get_num_threads()
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    is_ok = used <= num_cores
    value = f"{used} of torch, {num_cores} cores may be used of {cores}"
    fix = f"More threads than cores slow each other down: OMP_NUM_THREADS={num_cores}"
    yield CheckResult("threads", "good" if is_ok else "note", value, "" if is_ok else fix)


def _memory() -> Iterator[CheckResult]:
    from ftlevel.models.hardware import device_memory, free_memory_bytes

    free_bytes, total = free_memory_bytes("cpu"), device_memory("cpu")
    value = f"{free_bytes / 2**30:.1f} GiB free of the {total / 2**30:.1f} that may be used"
    low = min(free_bytes, total) < _MIN_MEMORY
    fix = "See what fits: ftlevel plan" if low else ""
    yield CheckResult("memory", "note" if low else "good", value, fix)


def _disk() -> Iterator[CheckResult]:
    from huggingface_hub import constants

    for name, path in (
        ("disk here", Path.cwd()),
        ("disk of the Hub's cache", Path(constants.HF_HUB_CACHE)),
    ):
        parent = next(p for p in (path, *path.parents) if p.exists())
        free_bytes = shutil.disk_usage(parent).free
        low = free_bytes < _MIN_DISK
        fix = "Free space, or set HF_HOME to another disk." if low else ""
        value = f"{free_bytes / 2**30:.1f} GiB free at {path}"
        yield CheckResult(name, "bad" if low else "good", value, fix)


def _hub() -> Iterator[CheckResult]:
    from huggingface_hub import constants

    from ftlevel.models.sources import is_reachable

    if constants.HF_HUB_OFFLINE:
        yield CheckResult(
            "Hub", "note", "HF_HUB_OFFLINE is set", "Local models and the cache are used."
        )
    elif is_reachable(constants.ENDPOINT):
        yield CheckResult("Hub", "good", f"{constants.ENDPOINT} answers")
    else:
        fix = "Local directories, .gguf files and builtin:tiny-llama work without it."
        yield CheckResult("Hub", "note", f"{constants.ENDPOINT} does not answer", fix)
