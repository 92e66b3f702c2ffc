"""Auxiliary models, which are used but not trained, and the outputs that they precompute.

Outputs are cached on disk under a digest of all inputs. Several processes of a machine compute some
rows each, in the same micro-batches as one process. Of a teacher, the predictions for the top
tokens, or for all, are stored; a training step reads those of its rows.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlevel.config import DataConfig
from ftlevel.config.constraints import flag_name
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.dataset import cache_root, is_writable
from ftlevel.errors import ConfigError, InputError
from ftlevel.events import Listener
from ftlevel.fast.cross_entropy import Observe
from ftlevel.fast.likelihoods import prepare_inputs
from ftlevel.fast.packing import using_layout
from ftlevel.fast.plan import plan_forward
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import load_config
from ftlevel.objectives import Objective
from ftlevel.tasks.losses import DistillationRows, outcome_dtype, select_top_k
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.identity import get_config_values
from ftlevel.training.model import PreparedModel, apply_fast_step
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes

TEACHER = "distillation.teacher"
"""Field that names the teacher."""
CHUNK_SIZE = 64
"""Rows that are split into micro-batches together."""
Fill = Callable[[np.ndarray, int, int], None]
"""Function (array, index, count) that computes the missing values of part `index` of `count`."""


def resolve_auxiliary_models(run: Run) -> dict[str, ReferenceModel]:
    """Returns dotted field → model named there, without loading weights."""
    names = {
        **run.hooks.get_auxiliary_names(run),
        TEACHER: run.config.distillation.teacher,
    }
    return {
        field: _resolve(run, flag_name(field), name)
        for field, name in names.items()
        if name is not None
    }


def _resolve(run: Run, flag: str, name: str) -> ReferenceModel:
    path, output_dir = Path(name).expanduser(), run.config.output.dir
    if (
        output_dir is not None
        and path.exists()
        and path.resolve().is_relative_to(output_dir.resolve())
    ):
        raise ConfigError(
            f"--output-dir {output_dir} contains {flag} {name}, which is not changed. Choose "
            "another directory."
        )
    return run.hooks.resolve_auxiliary(run, flag, name)


def open_or_compute(
    path: Path | None, shape: tuple[int, ...], dtype: Any, fill: Fill, processes: Processes
) -> tuple[np.ndarray, bool]:
    """Returns the array stored at `path`, completed by `fill`, and whether the file was complete.

    `fill` replaces missing values, which are NaN. In a structured dtype, the first field marks an
    item as filled, so `fill` must write it last. If `path` is None, the array is in memory.

    Call it in all processes. Those of a machine write their parts into one memory-mapped file. Each
    machine has a file of its own, which the others may not see. One run at a time writes a file.
    """
    from filelock import FileLock

    if processes.any(path is None) or path is None:
        array = np.empty(shape, dtype=dtype)
        get_nan_values(array)[:] = np.nan
        processes.in_all(lambda: fill(array, processes.world.rank, processes.count))
        is_filled = ~is_missing(array)
        for is_theirs, values in processes.all_gather((is_filled, array[is_filled])):
            array[is_theirs] = values
        return array, False
    ranks = processes.ranks_on_machine()
    index = ranks.index(processes.world.rank)
    if ranks[0]:
        path = path.with_stem(f"{path.stem}-{ranks[0]}")
    lock = FileLock(path.with_suffix(".lock")) if index == 0 else contextlib.nullcontext()
    with lock:
        stored = _open(path, shape, dtype) if index == 0 else None
        processes.wait()
        if stored is None:
            stored = _open(path, shape, dtype)
        is_incomplete = processes.any(bool(is_missing(stored).any()))
        if is_incomplete:
            processes.in_all(lambda: fill(stored, index, len(ranks)))
            stored.flush()
        return stored, not is_incomplete


def get_nan_values(array: np.ndarray) -> np.ndarray:
    """Returns the values that are NaN until filled: `array`, or a view of its first field."""
    names = array.dtype.names
    result: np.ndarray = array[names[0]] if names else array
    return result


def is_missing(array: np.ndarray) -> np.ndarray:
    """Returns a boolean mask of the items of `array` that are not filled yet."""
    values = get_nan_values(array)
    result: np.ndarray = np.isnan(values if array.dtype.names is None else values[..., 0])
    return result


def cache_path(
    data: DataConfig, prefix: str, key: str, sequences: Iterable[Encoded]
) -> Path | None:
    """Returns the file PREFIX-DIGEST.npy for the model `key`; None if caching is off."""
    if not data.cache or not is_writable():
        return None
    hasher = hashlib.sha256(key.encode())
    for part in sequences:
        hasher.update(np.array(part.input_ids, np.int32).tobytes() + b"|")
        hasher.update(np.array(part.labels, np.int32).tobytes() + b";")
    return cache_root() / f"{prefix}-{hasher.hexdigest()[:40]}.npy"


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            array = np.lib.format.open_memmap(path, mode="r+")
            if array.shape == shape and array.dtype == dtype:
                path.touch()
                return array
    fresh = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    get_nan_values(fresh)[:] = np.nan
    fresh.flush()
    return fresh


def iterate_batches(
    run: Run, fast: FastStep | None, rows: Sequence[Encoded]
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yields the row indices and inputs of each micro-batch, split and packed as in training."""
    pad_id, device = run.model.pad_id, run.model.device
    collate = Collator(pad_id)
    split_batches: Iterable[tuple[list[int], dict[str, Any]]] = (
        StepCollator(pad_id, fast.plan).split(rows)
        if fast is not None
        else (([index], collate([row])) for index, row in enumerate(rows))
    )
    for indices, batch in split_batches:
        layout = batch.pop("layout", None)
        with using_layout(layout.to(device) if layout is not None else None):
            yield indices, {name: value.to(device) for name, value in batch.items()}


def get_model_key(model: ReferenceModel, run: Run) -> dict[str, object]:
    """Returns name → value of all that determines the outputs of `model`, for a cache key."""
    fast = run.fast
    return {
        "model": model.fingerprint,
        "config": get_config_values(model.ref.model_config),
        "precision": [run.model.device, run.model.dtype],
        "packs": fast.enabled and fast.packs,
        "versions": torch.__version__,
    }


@contextlib.contextmanager
def load_auxiliary_model(
    reference: ReferenceModel, run: Run, listener: Listener
) -> Iterator[tuple[Run, PreparedModel]]:
    """Load `reference` in a `with` block; yields `run` with settings for it, and the model."""
    trained = reference.ref.load(run.model.device, run.model.dtype)
    forward = plan_forward(
        trained.model,
        trained.kind,
        trained.ref.card.method,
        run.objective,
        run.model.device,
        run.fast.tokens,
    )
    forward = replace(
        forward, enabled=run.fast.enabled, prefix_tree=forward.packs and run.fast.prefix_tree
    )
    reference_run = replace(run, fast=forward, model=replace(run.model, dtype=trained.dtype))
    fast = apply_fast_step(trained.model, reference_run, listener)
    try:
        yield reference_run, PreparedModel(trained.model, {}, fast, {})
    finally:
        if fast is not None:
            fast.remove()
        del trained, fast
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def precompute_teacher(
    run: Run, listener: Listener, processes: Processes
) -> tuple[Sequence[Encoded], dict[str, Any]] | None:
    """Returns training rows with the teacher's predictions, and their entry in summary.json.

    None if the run needs none.
    """
    teacher, config = run.auxiliary.get(TEACHER), run.config.distillation
    objective = run.objective
    if teacher is None or not objective.predicts_tokens or objective.samples:
        return None
    listener.stage("running the teacher")
    rows = run.data.train
    vocab_size = load_config(teacher.ref.source).get_text_config().vocab_size
    dtype = outcome_dtype(config, min(run.model.vocabulary, vocab_size))
    offsets = np.cumsum([0, *(_num_targets(objective, row) for row in rows)]).tolist()
    key = json.dumps([get_model_key(teacher, run), config.kd_temperature, str(dtype)])
    sequences = (sequence for row in rows for sequence in row.sequences)
    path = cache_path(run.config.data, "teacher", key, sequences)
    size = offsets[-1] * dtype.itemsize
    _check_disk_space(path, size)

    def fill(into: np.ndarray, index: int, count: int) -> None:
        with load_auxiliary_model(teacher, run, listener) as (teacher_model, adapted):
            _fill(teacher_model, adapted, offsets, into, index, count)

    predictions, was_cached = open_or_compute(path, (offsets[-1],), dtype, fill, processes)
    status = "cached" if was_cached else "computed before step 1"
    num_tokens = dtype["ids"].shape[0]
    probability = float(1 - np.exp(predictions["known"][:, -1]).mean()) if num_tokens else 1.0
    tokens = f"the top {num_tokens} tokens" if num_tokens else "all tokens"
    text = f"{tokens} at {offsets[-1]:,} positions, {probability:.1%} of its probability; "
    text += f"{size / 1e6:,.1f} MB"
    listener.choices("teacher", [Choice("teacher", teacher.name, f"{status}: {text}")])
    info = {
        "teacher": teacher.name,
        "fingerprint": teacher.fingerprint,
        "cached": was_cached,
        "tokens_kept": num_tokens or dtype["known"].shape[0],
        "places": offsets[-1],
        "probability_kept": probability,
        "bytes": size,
    }
    return DistillationRows(rows, predictions, offsets), info


def _num_targets(objective: Objective, row: Encoded) -> int:
    return int(objective.count(torch.tensor([row.labels])))


def _check_disk_space(path: Path | None, size: int) -> None:
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(
            f"--teacher: its predictions take {size / 1e9:,.1f} GB, and {path.parent} has "
            f"{free / 1e9:,.1f} GB free. Lower --kd-top-k, or move the cache with XDG_CACHE_HOME."
        )


def _fill(
    run: Run,
    model: PreparedModel,
    offsets: Sequence[int],
    array: np.ndarray,
    index: int,
    count: int,
) -> None:
    rows, module = run.data.train, model.model
    module.eval()
    with torch.no_grad(), autocast(run.model.device, run.model.dtype):
        for start in range(0, len(rows), CHUNK_SIZE)[index::count]:
            chunk = range(start, min(start + CHUNK_SIZE, len(rows)))
            if not is_missing(array[offsets[chunk.start] : offsets[chunk.stop]]).any():
                continue
            batch_rows = [rows[i] for i in chunk]
            for indices, log_probs, ids in _predict(run, model, batch_rows, array.dtype):
                num_targets = [offsets[start + i + 1] - offsets[start + i] for i in indices]
                ends = np.cumsum(num_targets)
                for i, begin, end in zip(indices, ends - num_targets, ends, strict=True):
                    target, source = (
                        slice(offsets[start + i], offsets[start + i + 1]),
                        slice(begin, end),
                    )
                    array["ids"][target] = ids[source]
                    array["known"][target, 1:] = log_probs[source, 1:]
                    array["known"][target, 0] = log_probs[source, 0]  # last: marks it as filled
            if isinstance(array, np.memmap):
                array.flush()


def _predict(
    run: Run, model: PreparedModel, rows: Sequence[Encoded], dtype: np.dtype
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields (row indices, top log-probabilities of each target, token ids) per micro-batch."""
    settings, vocabulary, objective = run.config.distillation, run.model.vocabulary, run.objective
    chunks: list[tuple[Tensor, Tensor]] = []

    def keep(scores: Tensor, _: Tensor) -> None:
        values, ids = select_top_k(scores[:, :vocabulary], settings, dtype)
        chunks.append((values.cpu(), ids.cpu()))

    for indices, inputs in iterate_batches(run, model.fast, rows):
        chunks.clear()
        _observe_logits(model, objective, inputs, keep)
        log_probs, ids = (torch.cat([part[i] for part in chunks]).numpy() for i in (0, 1))
        yield indices, log_probs, ids


def _observe_logits(
    model: PreparedModel, objective: Any, batch: Mapping[str, Tensor], observe: Observe
) -> None:
    """Call `observe(logits (targets, vocabulary), target ids)` on each chunk of the targets."""
    inputs, labels = prepare_inputs(model.model, objective, batch)
    at, targets = objective.locate(labels)
    if model.fast is not None and model.fast.cross_entropy is not None:
        model.fast.cross_entropy.loss_sum(lambda: model.model(**inputs), at, targets, observe)
        return
    observe(objective.logits(model.model(**inputs)).flatten(0, 1).index_select(0, at), targets)
