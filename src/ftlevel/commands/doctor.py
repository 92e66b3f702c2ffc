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

Verdict = Literal["good", "note", "bad"]

_LITTLE_MEMORY, _LITTLE_DISK = 4 * 2**30, 5 * 2**30  # bytes free


@dataclass(frozen=True)
class CheckResult:
    """Result of a check; `note` marks what runs can do without, `bad` what prevents some."""

    name: str
    verdict: Verdict
    value: str
    advice: str = ""


def doctor() -> list[CheckResult]:
    """Run all checks, in the order in which a run would depend on them."""
    found: list[CheckResult] = []
    for look in (
        _program,
        _versions,
        _device,
        _precision,
        _four_bit,
        _attention,
        _threads,
        _memory,
        _disk,
        _hub,
    ):
        found += _judged(look)
    return found


def to_dict(found: list[CheckResult]) -> dict[str, Any]:
    """Return the output of `--json`."""
    return {
        "ftlevel": __version__,
        "ok": all(finding.verdict != "bad" for finding in found),
        "findings": [asdict(finding) for finding in found],
    }


def _judged(look: Callable[[], Iterator[CheckResult]]) -> list[CheckResult]:
    """Return the findings of `look`; a failing import becomes a finding too."""
    try:
        return list(look())
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        name = look.__name__.strip("_").replace("_", " ")
        advice = "Reinstall ftlevel in a virtual environment of its own."
        return [CheckResult(name, "bad", f"{type(error).__name__}: {reason}", advice)]


def _program() -> Iterator[CheckResult]:
    python = f"Python {platform.python_version()} ({platform.system()} {platform.machine()})"
    yield CheckResult("ftlevel", "good", f"{__version__}, {python}")


def _versions() -> Iterator[CheckResult]:
    """Yield unmet requirements of ftlevel, or one finding if all are met."""
    from packaging.requirements import Requirement

    needed = [Requirement(line) for line in metadata.requires("ftlevel") or ()]
    core = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = 0
    for requirement in core:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = ""
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong += 1
            advice = f"pip install '{requirement.name}{requirement.specifier}'"
            shown = version or "not installed"
            yield CheckResult(
                requirement.name, "bad", f"{shown}; needs {requirement.specifier}", advice
            )
    if not wrong:
        names = ("torch", "transformers", "peft", "bitsandbytes", "datasets")
        shown = ", ".join(f"{name} {metadata.version(name)}" for name in names)
        yield CheckResult("versions", "good", f"all {len(core)} requirements are met: {shown}")


def _device() -> Iterator[CheckResult]:
    import torch

    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(at)
            free, _ = torch.cuda.mem_get_info(at)
            size = f"{free / 2**30:.1f} of {facts.total_memory / 2**30:.1f} GiB free"
            yield CheckResult(f"GPU {at}", "good", f"{facts.name}, {size}")
        return
    if torch.backends.mps.is_available():
        yield CheckResult("GPU", "good", "Apple GPU")
        return
    if shutil.which("nvidia-smi") is None:
        yield CheckResult("GPU", "note", "none; runs use the CPU")
        return
    built = torch.version.cuda
    why = f"torch {torch.__version__} " + (
        f"is built for CUDA {built}, which the driver does not serve" if built else "is a CPU build"
    )
    advice = "Install the torch that pytorch.org names for this driver."
    yield CheckResult(
        "GPU", "bad", f"nvidia-smi is installed, but torch sees no GPU: {why}", advice
    )


def _precision() -> Iterator[CheckResult]:
    from ftlevel.models.hardware import choose_device, choose_dtype

    choice = choose_dtype("auto", str(choose_device("auto").value), "lora", "llama")
    advice = "" if choice.value == "bfloat16" else "bfloat16 would need half the memory."
    verdict: Verdict = "good" if choice.value == "bfloat16" else "note"
    yield CheckResult("precision", verdict, f"{choice.value} ({choice.reason})", advice)


def _four_bit() -> Iterator[CheckResult]:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=device)
    codes, state = quantize_4bit(weight, quant_type="nf4")
    error = float((dequantize_4bit(codes, state) - weight).abs().mean())
    fine = error < 0.2  # NF4: 0.07 standard deviations
    version = metadata.version("bitsandbytes")
    advice = "" if fine else "--quant 4bit would train on garbage: pip install -U bitsandbytes"
    said = f"bitsandbytes {version} on {device}: mean error {error:.3f} of a standard deviation"
    yield CheckResult("4 bits", "good" if fine else "bad", said, advice)


def _attention() -> Iterator[CheckResult]:
    import torch

    if not torch.cuda.is_available():
        yield CheckResult("attention", "good", "packed rows by blocks and SDPA, on the CPU")
        return
    there = [name for name in ("flash_attn", "liger_kernel") if find_spec(name)]
    advice = "" if "liger_kernel" in there else "pip install 'ftlevel[gpu]' for fused kernels."
    said = f"SDPA; extra kernels: {', '.join(there) or 'none'}"
    yield CheckResult("attention", "good" if there else "note", said, advice)


def _threads() -> Iterator[CheckResult]:
    import torch

    cores, used = os.cpu_count() or 1, torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    fine = used <= usable
    said = f"{used} of torch, {usable} cores may be used of {cores}"
    advice = (
        "" if fine else f"More threads than cores slow each other down: OMP_NUM_THREADS={usable}"
    )
    yield CheckResult("threads", "good" if fine else "note", said, advice)


def _memory() -> Iterator[CheckResult]:
    from ftlevel.models.hardware import device_memory, free_memory_bytes

    free, whole = free_memory_bytes("cpu"), device_memory("cpu")
    said = f"{free / 2**30:.1f} GiB free of the {whole / 2**30:.1f} that may be used"
    low = min(free, whole) < _LITTLE_MEMORY
    advice = "See what fits: ftlevel plan" if low else ""
    yield CheckResult("memory", "note" if low else "good", said, advice)


def _disk() -> Iterator[CheckResult]:
    from huggingface_hub import constants

    for name, place in (
        ("disk here", Path.cwd()),
        ("disk of the Hub's cache", Path(constants.HF_HUB_CACHE)),
    ):
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        low = free < _LITTLE_DISK
        advice = "Free space, or set HF_HOME to another disk." if low else ""
        said = f"{free / 2**30:.1f} GiB free at {place}"
        yield CheckResult(name, "bad" if low else "good", said, advice)


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
        advice = "Local directories, .gguf files and builtin:tiny-llama work without it."
        yield CheckResult("Hub", "note", f"{constants.ENDPOINT} does not answer", advice)
