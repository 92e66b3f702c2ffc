"""Certify checkpoints with a manifest that is written last, and find the latest intact one.

A checkpoint without a manifest, or with a changed file, is incomplete and must not be resumed from.
best-N directories contain the weights of the best model; one is kept for each checkpoint that a run
may resume from.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ftlevel.artifacts.files import file_fingerprint, flush, flush_all, write_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def certify(checkpoint: Path) -> None:
    """Flush `checkpoint` to disk and write its manifest of file sizes and SHA-256 digests."""
    files = {}
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # of a previous save of the same step
    flush_all(checkpoint)
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        files[str(path.relative_to(checkpoint))] = {
            "size": path.stat().st_size,
            "sha256": file_fingerprint(path),
        }
    write_json(checkpoint / MANIFEST, {"files": files})
    flush(checkpoint.parent)


def listed(checkpoint: Path) -> set[str]:
    """Returns the file names in the manifest of `checkpoint`; empty without a manifest."""
    return set(_read_manifest(checkpoint) or ())


def _read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]] | None:
    """Read file → size and digest; None if the manifest is missing or invalid."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (int(entry["size"]), entry["sha256"]) for name, entry in files.items()}
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):
        return None


def find_damage(checkpoint: Path) -> str | None:
    """Returns the first mismatch with the manifest or non-finite tensor as text; None if intact."""
    if not (checkpoint / MANIFEST).is_file():
        return "it was not finished (no manifest)"
    files = _read_manifest(checkpoint)
    if files is None:
        return "its manifest cannot be read"
    files_on_disk = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    unknown = sorted(files_on_disk - set(files) - {MANIFEST})
    if unknown:
        return f"{unknown[0]} is not in its manifest"
    for name, (size, digest) in files.items():
        if name not in files_on_disk:
            return f"{name} is missing"
        if (size_on_disk := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {size_on_disk:,} bytes, not {size:,}"
        if file_fingerprint(checkpoint / name) != digest:
            return f"{name} has changed since it was written"
        if name.endswith(".safetensors") and (tensor := find_not_finite(checkpoint / name)):
            return f"{name} has NaN or infinity in {tensor}"
    return None


def find_not_finite(path: Path) -> str | None:
    """Find the name of the first tensor with NaN or infinity in a .safetensors file, or None."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return str(name)
    return None


def find_newest_intact(directory: Path) -> tuple[Path | None, list[str]]:
    """Find the latest intact checkpoint, and a message for each newer one that is corrupted."""
    rejected: list[str] = []
    for checkpoint in reversed(numbered(directory)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, rejected
        rejected.append(f"{checkpoint.name}: {damage}")
    return None, rejected


def rotate(directory: Path, keep: int) -> None:
    """Delete all certified checkpoints but the `keep` latest; others are not deleted."""
    certified = [path for path in numbered(directory) if (path / MANIFEST).is_file()]
    for checkpoint in certified[:-keep]:
        shutil.rmtree(checkpoint)


def numbered(directory: Path) -> list[Path]:
    """Returns the checkpoint-N directories of `directory`, sorted by step."""
    matches = [(p, _NAME.fullmatch(p.name)) for p in directory.glob("checkpoint-*") if p.is_dir()]
    return [p for p, match in sorted(((p, m) for p, m in matches if m), key=lambda i: int(i[1][1]))]


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint, from the name."""
    return int(checkpoint.name.rpartition("-")[2])


def set_aside_newer(directory: Path, checkpoint: Path | None) -> None:
    """Rename checkpoints newer than `checkpoint` to rejected-N; all of them if it is None."""
    for newer in numbered(directory):
        if checkpoint is None or step_of(newer) > step_of(checkpoint):
            name, number = newer.name.replace("checkpoint", "rejected"), 1
            while newer.with_name(name).exists():
                number += 1
                name = f"rejected-{step_of(newer)}-{number}"
            newer.rename(newer.with_name(name))


_BEST_NAME = re.compile(r"best-(\d+)")


def best_of(directory: Path, step: int) -> Path:
    """Returns the path of the best model at `step`."""
    return directory / f"best-{step}"


def write_best(directory: Path, step: int, write: Callable[[Path], None]) -> None:
    """Write the best model of `step` atomically by calling `write`; then call `rotate_best`."""
    partial, target = directory / ".best.partial", best_of(directory, step)
    if target.exists() and not (target / MANIFEST).is_file():  # not written by ftlevel
        target.rename(target.with_name(f"{target.name}-kept"))
    for left in (partial, target):
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir()
    write(partial)
    certify(partial)
    partial.rename(target)
    rotate_best(directory)


def rotate_best(directory: Path) -> None:
    """Keep the latest best model, and the best model as of each checkpoint; delete the others."""
    best_models = _numbered_best(directory)
    steps = [step_of(checkpoint) for checkpoint in numbered(directory)]
    needed = {_newest(best_models, step) for step in steps} | set(best_models[-1:])
    for path in best_models:
        if path not in needed:
            shutil.rmtree(path)


def delete_best_after(directory: Path, step: int) -> None:
    """Delete the best models after `step`, where the run resumes."""
    for path in _numbered_best(directory):
        if step_of(path) > step:
            shutil.rmtree(path)


def forget_unreachable(directory: Path) -> None:
    """Delete all best models of a finished run that has no checkpoint left."""
    if not numbered(directory):
        delete_best_after(directory, 0)


def _newest(best_models: list[Path], step: int) -> Path | None:
    return next((path for path in reversed(best_models) if step_of(path) <= step), None)


def _numbered_best(directory: Path) -> list[Path]:
    """Returns the certified best-N directories of `directory`, sorted by step."""
    candidates = [p for p in directory.glob("best-*") if _BEST_NAME.fullmatch(p.name)]
    certified = [p for p in candidates if (p / MANIFEST).is_file()]
    return sorted(certified, key=step_of)
