"""Write a manifest into each complete checkpoint, and select the last valid checkpoint.

A checkpoint without a manifest, or with a changed file, cannot be resumed from. best-N directories
contain the weights of the best model; one is kept for each checkpoint that a run may resume from.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ftlevel.artifacts.files import file_fingerprint, flush, flush_all, read_json, write_json
from ftlevel.errors import InputError

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-\d+")


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
    """Returns the names of the files in the manifest of `checkpoint`; empty without a manifest."""
    return set(_load_manifest(checkpoint) or ())


def _load_manifest(checkpoint: Path) -> dict[str, tuple[int, str]] | None:
    """Returns file → (size, SHA-256); None if the manifest is missing or invalid."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        return {name: (int(entry["size"]), entry["sha256"]) for name, entry in files.items()}
    except (InputError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return None


def detect_corruption(checkpoint: Path) -> str | None:
    """Returns what is wrong with `checkpoint` (changed file, NaN) as text; None if it is valid."""
    if not (checkpoint / MANIFEST).is_file():
        return "it was not finished (no manifest)"
    files = _load_manifest(checkpoint)
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
        if name.endswith(".safetensors") and (tensor := get_nonfinite_tensor(checkpoint / name)):
            return f"{name} has NaN or infinity in {tensor}"
    return None


def get_nonfinite_tensor(path: Path) -> str | None:
    """Returns the name of the first tensor with NaN or infinity in a .safetensors file, or None."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return str(name)
    return None


def get_last_valid_checkpoint(parent_dir: Path) -> tuple[Path | None, list[str]]:
    """Returns the last valid checkpoint, and a message for each later, corrupted one."""
    rejected: list[str] = []
    for checkpoint in reversed(numbered(parent_dir)):
        corruption = detect_corruption(checkpoint)
        if corruption is None:
            return checkpoint, rejected
        rejected.append(f"{checkpoint.name}: {corruption}")
    return None, rejected


def rotate(parent_dir: Path, keep: int) -> None:
    """Delete all checkpoints that have a manifest, except the last `keep`."""
    certified = [path for path in numbered(parent_dir) if (path / MANIFEST).is_file()]
    for checkpoint in certified[:-keep]:
        shutil.rmtree(checkpoint)


def numbered(parent_dir: Path) -> list[Path]:
    """Returns the checkpoint-N directories in `parent_dir`, sorted by step."""
    paths = (p for p in parent_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(paths, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the training step of a checkpoint, which is part of its name."""
    return int(checkpoint.name.rpartition("-")[2])


def reject_newer(parent_dir: Path, checkpoint: Path | None) -> None:
    """Rename the checkpoints after `checkpoint` to rejected-N; all of them if it is None."""
    for newer in numbered(parent_dir):
        if checkpoint is None or step_of(newer) > step_of(checkpoint):
            name, number = newer.name.replace("checkpoint", "rejected"), 1
            while newer.with_name(name).exists():
                number += 1
                name = f"rejected-{step_of(newer)}-{number}"
            newer.rename(newer.with_name(name))


_BEST_NAME = re.compile(r"best-\d+")


def best_of(parent_dir: Path, step: int) -> Path:
    """Returns the directory for the best model that was saved at training step `step`."""
    return parent_dir / f"best-{step}"


def save_best(parent_dir: Path, step: int, save: Callable[[Path], None]) -> None:
    """Save the best model of `step` atomically by calling `save(path)`; then call `rotate_best`."""
    partial, target = parent_dir / ".best.partial", best_of(parent_dir, step)
    if target.exists() and not (target / MANIFEST).is_file():  # not written by ftlevel
        target.rename(target.with_name(f"{target.name}-kept"))
    for left in (partial, target):
        if left.exists():
            shutil.rmtree(left)
    partial.mkdir()
    save(partial)
    certify(partial)
    partial.rename(target)
    rotate_best(parent_dir)


def rotate_best(parent_dir: Path) -> None:
    """Delete best-N directories, except the newest one and the newest up to each checkpoint."""
    best_models = _list_best_models(parent_dir)
    steps = [step_of(checkpoint) for checkpoint in numbered(parent_dir)]
    to_keep = set(best_models[-1:])
    for step in steps:
        to_keep |= set([path for path in best_models if step_of(path) <= step][-1:])
    for path in best_models:
        if path not in to_keep:
            shutil.rmtree(path)


def delete_best_after(parent_dir: Path, step: int) -> None:
    """Delete the best models saved after `step`, at which the run resumes."""
    for path in _list_best_models(parent_dir):
        if step_of(path) > step:
            shutil.rmtree(path)


def delete_unreachable_best(parent_dir: Path) -> None:
    """Delete all best models if the finished run has no checkpoint left."""
    if not numbered(parent_dir):
        delete_best_after(parent_dir, 0)


def _list_best_models(parent_dir: Path) -> list[Path]:
    candidates = [p for p in parent_dir.glob("best-*") if _BEST_NAME.fullmatch(p.name)]
    return sorted([p for p in candidates if (p / MANIFEST).is_file()], key=step_of)
