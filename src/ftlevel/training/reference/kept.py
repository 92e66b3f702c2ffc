"""Log-likelihoods by the reference on disk, under a digest of all that decides them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

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
    from filelock import FileLock

    shape, path = (len(rows), 2), _path(config, start, rows)
    if path is None:
        into = np.full(shape, np.nan, dtype=np.float32)
        fill(into)
        return into, False
    with FileLock(path.with_suffix(".lock")):
        into = _open(path, shape)
        missing = bool(np.isnan(into).any())
        if missing:
            fill(into)
            into.flush()
        return np.array(into), not missing


def _path(config: TrainConfig, start: str, rows: Sequence[Encoded]) -> Path | None:
    """Return the file of these rows and this start; None where nothing may be kept."""
    if not config.data.cache or not is_writable():
        return None
    digest = hashlib.sha256(start.encode())
    for row in rows:
        for part in (*row.branches, *row.contrasts):
            digest.update(np.array(part.input_ids, np.int32).tobytes() + b"|")
            digest.update(np.array(part.labels, np.int32).tobytes() + b";")
    return cache_root() / f"reference-{digest.hexdigest()[:40]}.npy"


def _open(path: Path, shape: tuple[int, int]) -> np.memmap:
    """Map the file at `path`, or a new one without numbers."""
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            known = np.lib.format.open_memmap(path, mode="r+")
            if known.shape == shape and known.dtype == np.float32:
                path.touch()
                return known
    fresh = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    fresh[:] = np.nan
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
