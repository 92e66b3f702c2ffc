"""What models say of rows, on disk, under a digest of all that decides it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlevel.artifacts.fingerprint import base_digest
from ftlevel.config import TrainConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.prepare.cache import cache_root, file_digest, is_writable
from ftlevel.models.upstream.tensors import inner_tensors
from ftlevel.training.model import Adapted
from ftlevel.training.plan.plan import Plan


def read_or_fill(
    config: TrainConfig, start: str, rows: Sequence[Encoded], fill: Callable[[np.ndarray], None]
) -> tuple[np.ndarray, bool]:
    """Return (rows, 2) as `fill` writes it, and whether all of it was kept from before.

    A file that a run was killed in is gone on with. Of several processes one computes.
    """
    path = place_of(config, "reference", start, rows)
    array, was_whole = open_or_fill(path, (len(rows), 2), np.dtype(np.float32), fill)
    return np.array(array), was_whole


def open_or_fill(
    path: Path | None, shape: tuple[int, ...], dtype: Any, fill: Callable[[np.ndarray], None]
) -> tuple[np.ndarray, bool]:
    """Return the array in the file at `path` as `fill` writes it, and whether it was whole before.

    Args:
        path: None where nothing may be kept: the array is in memory.
        shape: of the array.
        dtype: of an item; a record's first field holds its numbers.
        fill: writes what is missing of it, of each row the first number last.
    """
    from filelock import FileLock

    if path is None:
        into = np.empty(shape, dtype=dtype)
        numbers_of(into)[:] = np.nan
        fill(into)
        return into, False
    with FileLock(path.with_suffix(".lock")):
        into = _open(path, shape, dtype)
        missing = bool(is_missing(into).any())
        if missing:
            fill(into)
            into.flush()
        return into, not missing


def numbers_of(array: np.ndarray) -> np.ndarray:
    """Return what of `array` is NaN until it is filled."""
    names = array.dtype.names
    found: np.ndarray = array[names[0]] if names else array
    return found


def is_missing(array: np.ndarray) -> np.ndarray:
    """Return whether each item of `array`, along its first axis, is still to be filled."""
    numbers = numbers_of(array)
    found: np.ndarray = np.isnan(numbers if array.dtype.names is None else numbers[..., 0])
    return found


def place_of(config: TrainConfig, kind: str, start: str, rows: Sequence[Encoded]) -> Path | None:
    """Return the file of these rows and this start; None where nothing may be kept.

    Args:
        config: the whole configuration.
        kind: of what is kept.
        start: all else that decides it.
        rows: what it is of.
    """
    if not config.data.cache or not is_writable():
        return None
    digest = hashlib.sha256(start.encode())
    for row in rows:
        for part in (*row.branches, *row.contrasts):
            digest.update(np.array(part.input_ids, np.int32).tobytes() + b"|")
            digest.update(np.array(part.labels, np.int32).tobytes() + b";")
    return cache_root() / f"{kind}-{digest.hexdigest()[:40]}.npy"


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """Map the file at `path`, or a new one without numbers."""
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            known = np.lib.format.open_memmap(path, mode="r+")
            if known.shape == shape and known.dtype == dtype:
                path.touch()
                return known
    fresh = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    numbers_of(fresh)[:] = np.nan
    fresh.flush()
    return fresh


def digest_start(config: TrainConfig, plan: Plan, adapted: Adapted) -> str:
    """Return a digest of all that decides what the model says of a row as it begins."""
    model, fast = plan.model, adapted.fast.plan if adapted.fast is not None else plan.fast
    place = model.source.path
    digest = hashlib.sha256()
    for name, tensor in sorted(adapted.model.named_parameters()):
        if tensor.requires_grad or place is None:
            digest.update(name.encode())
            for part in inner_tensors(tensor) or (tensor,):
                digest.update(part.detach().float().cpu().numpy().tobytes())
    decides = {
        "base": place and (base_digest(place) if place.is_dir() else file_digest(place)),
        "name": [model.source.name, model.auto_class],
        "start": digest.hexdigest(),
        "method": config.method.model_dump(mode="json"),
        "quant": model.quant.model_dump(mode="json"),
        "precision": [model.device, model.dtype, config.model.attn_implementation],
        "path": [fast.enabled, fast.packs, fast.chunked_cross_entropy, fast.prefix_tree,
                 fast.tokens],
        "weighting": [config.preference.loss, config.preference.ld_alpha]
        if config.preference.loss == "ld-dpo" else [],
        "versions": torch.__version__,
    }  # fmt: skip
    return json.dumps(decides, sort_keys=True, default=str)
