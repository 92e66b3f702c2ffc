"""Checkpoints that can be trusted: each has a manifest of its files, written last.

A checkpoint without a manifest, or with a file that does not match it, was cut short; it is never
resumed from.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from ftlevel.artifacts.files import flush, flush_all, write_json
from ftlevel.artifacts.fingerprint import file_fingerprint

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def certify(checkpoint: Path) -> None:
    """Flush `checkpoint` and its files to the disk, and write its manifest."""
    files = {}
    (checkpoint / MANIFEST).unlink(missing_ok=True)  # of a former save after the same step
    flush_all(checkpoint)
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        files[str(path.relative_to(checkpoint))] = {
            "size": path.stat().st_size,
            "sha256": file_fingerprint(path),
        }
    write_json(checkpoint / MANIFEST, {"files": files})
    flush(checkpoint.parent)


def listed(checkpoint: Path) -> set[str]:
    """Return the names in the manifest of `checkpoint`; of one without, none."""
    return set(_read_manifest(checkpoint) or ())


def _read_manifest(checkpoint: Path) -> dict[str, tuple[int, str]] | None:
    """Return file → size and digest; None of a manifest that is not there or of another shape."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (int(entry["size"]), entry["sha256"]) for name, entry in files.items()}
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
        OverflowError,
    ):  # fmt: skip
        return None


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with `checkpoint`, or None if every file is as it was written."""
    if not (checkpoint / MANIFEST).is_file():
        return "it was not finished (no manifest)"
    files = _read_manifest(checkpoint)
    if files is None:
        return "its manifest cannot be read"
    there = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    unknown = sorted(there - set(files) - {MANIFEST})
    if unknown:
        return f"{unknown[0]} is not in its manifest"
    for name, (size, digest) in files.items():
        if name not in there:
            return f"{name} is missing"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found:,} bytes, not {size:,}"
        if file_fingerprint(checkpoint / name) != digest:
            return f"{name} has changed since it was written"
        if name.endswith(".safetensors") and (tensor := find_not_finite(checkpoint / name)):
            return f"{name} has NaN or infinity in {tensor}"
    return None


def find_not_finite(path: Path) -> str | None:
    """Return the name of a tensor of a .safetensors file with NaN or infinity in it, if any."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return str(name)
    return None


def newest_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is whole, and a line for each newer one that is not."""
    rejected: list[str] = []
    for checkpoint in reversed(numbered(directory)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, rejected
        rejected.append(f"{checkpoint.name}: {damage}")
    return None, rejected


def rotate(directory: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints; those without a manifest are not of the run."""
    certified = [path for path in numbered(directory) if (path / MANIFEST).is_file()]
    for checkpoint in certified[:-keep]:
        shutil.rmtree(checkpoint)


def numbered(directory: Path) -> list[Path]:
    """Return the checkpoint-N directories of `directory`, by their step."""
    found = [(p, _NAME.fullmatch(p.name)) for p in directory.glob("checkpoint-*") if p.is_dir()]
    return [p for p, match in sorted(((p, m) for p, m in found if m), key=lambda i: int(i[1][1]))]


def step_of(checkpoint: Path) -> int:
    """Return the step after which `checkpoint` was written."""
    return int(checkpoint.name.rpartition("-")[2])


def set_aside_newer(directory: Path, checkpoint: Path | None) -> None:
    """Rename the checkpoints that are newer than `checkpoint`, or all, to rejected-N."""
    for newer in numbered(directory):
        if checkpoint is None or step_of(newer) > step_of(checkpoint):
            name, number = newer.name.replace("checkpoint", "rejected"), 1
            while newer.with_name(name).exists():
                number += 1
                name = f"rejected-{step_of(newer)}-{number}"
            newer.rename(newer.with_name(name))
