"""Reference log-probabilities for preference training, computed once before step 1 and cached.

The reference is the initial model, with any adapter that training continues from, without dropout.
It is not the base with the adapter disabled, because PiSSA, OLoRA and LoftQ rewrite the base. The
model to be trained computes the values itself, on the fast step's packed rows. They are cached
under a digest of all inputs. With `--reference`, a different model computes them before the run's
weights load, and is freed afterwards. Several processes of a machine compute some rows each, in the
same micro-batches as one process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlevel.artifacts.files import Workspace, file_fingerprint, hash_weights
from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.dataset import cache_root, is_writable
from ftlevel.evaluation.scoring import compute_likelihoods
from ftlevel.events import Listener
from ftlevel.fast.likelihoods import compute_answer_likelihoods
from ftlevel.fast.packing import using_layout
from ftlevel.fast.plan import get_dropout, plan_forward
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.models.hardware import evaluating
from ftlevel.models.upstream.tensors import inner_tensors
from ftlevel.objectives import LikelihoodObjective
from ftlevel.trained.adapt import save_adapter
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.build_trainer import create_evaluator
from ftlevel.training.identity import get_config_values
from ftlevel.training.model import PreparedModel, apply_fast_step
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes

Fill = Callable[[np.ndarray, int, int], None]
"""Function (array, index, count) that computes the missing values of part `index` of `count`."""


def load_or_compute(
    data: DataConfig, key: str, rows: Sequence[Encoded], fill: Fill, processes: Processes
) -> tuple[np.ndarray, bool]:
    """Returns the (rows, 2) float32 array that `fill` computes, and whether it came from the cache.

    `key` identifies the reference model in the cache. See `open_or_compute`.
    """
    path = cache_path(data, "reference", key, rows)
    array, was_cached = open_or_compute(path, (len(rows), 2), np.dtype(np.float32), fill, processes)
    return np.array(array), was_cached


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


def cache_path(data: DataConfig, prefix: str, key: str, rows: Sequence[Encoded]) -> Path | None:
    """Returns the file PREFIX-DIGEST.npy for `rows` and the model `key`; None if caching is off."""
    if not data.cache or not is_writable():
        return None
    hasher = hashlib.sha256(key.encode())
    for row in rows:
        for part in (*row.sequences, *row.contrasts):
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


def get_initial_key(run: Run, prepared: PreparedModel) -> str:
    """Returns a JSON string of all that determines the initial model's log-probabilities."""
    model, fast = run.model, prepared.fast.plan if prepared.fast is not None else run.fast
    path = model.source.path
    hasher = hashlib.sha256()
    for name, tensor in sorted(prepared.model.named_parameters()):
        if tensor.requires_grad or path is None:
            hasher.update(name.encode())
            for part in inner_tensors(tensor) or (tensor,):
                hasher.update(part.detach().float().cpu().numpy().tobytes())
    key_values = {
        "base": path and (hash_weights(path) if path.is_dir() else file_fingerprint(path)),
        "name": [model.source.name, model.auto_class],
        "config": get_config_values(model.config),
        "start": hasher.hexdigest(),
        "method": run.config.method.model_dump(mode="json"),
        "quant": model.quant.model_dump(mode="json"),
        "precision": [model.device, model.dtype, run.config.model.attn_implementation],
        "path": [
            fast.enabled,
            fast.packs,
            fast.chunked_cross_entropy,
            fast.prefix_tree,
            fast.tokens,
        ],
        "weighting": [run.config.preference.loss, run.config.preference.ld_alpha]
        if run.config.preference.loss == "ld-dpo"
        else [],
        "versions": torch.__version__,
    }
    return json.dumps(key_values, sort_keys=True, default=str)


CHUNK_SIZE = 64
"""Rows that are split into micro-batches together."""


@dataclass(frozen=True)
class Reference:
    """Facts on the reference model of a run, whose log-probabilities are in the run's rows.

    Attributes:
        info: entry in summary.json.
        files: temporary directory of files to save: the initial adapter, or model.json, which
            names a `--reference` model. None if the base is the reference.
    """

    info: Mapping[str, Any]
    files: Any


def compute_initial_reference(
    run: Run, prepared: PreparedModel, listener: Listener, processes: Processes
) -> tuple[Run, Reference | None]:
    """Returns the run with the initial model's log-probabilities in its rows, and the reference.

    If the objective needs no reference, the run is unchanged and the reference None.
    """
    if not needs_reference(run):
        return run, None
    listener.stage("computing reference log-probabilities")
    key, name = get_initial_key(run, prepared), "initial model"
    run, info = add_reference_logps(run, name, key, lambda: (run, prepared), listener, processes)
    return run, Reference(info, _save_initial_adapter(run, prepared))


def needs_reference(run: Run) -> bool:
    """Whether the run's objective needs log-probabilities of a reference model."""
    objective = run.objective
    return isinstance(objective, LikelihoodObjective) and objective.needs_reference


def add_reference_logps(
    run: Run,
    name: str,
    key: str,
    load: Callable[[], tuple[Run, PreparedModel]],
    listener: Listener,
    processes: Processes,
) -> tuple[Run, dict[str, Any]]:
    """Returns `run` with reference log-probabilities in its rows, and their entry in summary.json.

    `name` and `key` identify the reference model for the user and in the cache. `load`, called only
    if values are missing, returns the model and a run with settings for it.
    """
    task: Any = run.task
    settings = run.config.data
    train, cached = load_or_compute(
        settings, key, run.data.train, lambda *part: _fill(*load(), *part), processes
    )
    data = replace(run.data, train=task.with_reference(run.data.train, train))
    if run.data.validation:
        evaluator: Any = create_evaluator(run, processes)

        def score(into: np.ndarray, *_: int) -> None:  # the evaluator divides the rows
            into[:] = compute_likelihoods(evaluator, load()[1].model)

        padded_key = f"{key} padded by {evaluator.batch_size}"
        validation, _ = load_or_compute(settings, padded_key, run.data.validation, score, processes)
        data = replace(data, validation=task.with_reference(run.data.validation, validation))
    status = "log-probabilities cached" if cached else "log-probabilities precomputed"
    rows = len(run.data.train) + len(run.data.validation)
    listener.choices("reference", [Choice("reference", name, f"{status} for {rows:,} rows")])
    return replace(run, data=data), {"is": name, "rows": rows, "cached": cached}


FIRST_LOSS = 1e-6
"""Relative deviation of the first loss from its expected value that is accepted without a note."""


def check_first_loss(
    reference: Reference, run: Run, records: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the entry in summary.json, and notes: one if the first loss is unexpected."""
    expected, info = run.objective.first_loss, dict(reference.info)
    first = next((r["loss"] for r in records if r["step"] == 1 and "loss" in r), None)
    if expected is None or first is None:
        return info, []
    info |= {"first_loss": first, "first_loss_expected": expected}
    if abs(first - expected) <= FIRST_LOSS * expected:
        return info, []
    dropout = get_dropout(run.config.method, run.model)
    message = (
        f"{dropout}, which the reference does not use"
        if dropout
        else f"rounding to {run.model.dtype}, which depends on the other rows of a micro-batch"
    )
    return info, [f"the first loss is {first:.7f}; without {message}, it is {expected:.7f}."]


def _save_initial_adapter(run: Run, prepared: PreparedModel) -> Any:
    """Returns a temporary directory with the initial adapter; None if the base alone is equal."""
    model = prepared.model
    is_base_modified = METHODS[run.config.method.kind].initialization.rewrites_base(
        run.config.method
    )
    if not hasattr(model, "peft_config") or (run.adapter is None and is_base_modified):
        return None
    on, off = (_score_first_row(run, prepared, off=off) for off in (False, True))
    if run.adapter is None and np.array_equal(on, off):
        return None
    workspace = Workspace("start")
    save_adapter(model, run.config.method, Path(workspace.name), prepared.initial_state)
    return workspace


def _score_first_row(run: Run, prepared: PreparedModel, *, off: bool) -> np.ndarray:
    row, model = run.data.train[0], prepared.model
    with (
        evaluating(model, run.model.device, run.model.dtype),
        model.disable_adapter() if off else contextlib.nullcontext(),
    ):
        return _compute_logps(run, prepared, [row])


def _fill(run: Run, model: PreparedModel, array: np.ndarray, index: int, count: int) -> None:
    rows, module = run.data.train, model.model
    with evaluating(module, run.model.device, run.model.dtype):
        for start in range(0, len(rows), CHUNK_SIZE)[index::count]:
            chunk = slice(start, start + CHUNK_SIZE)
            if not np.isnan(array[chunk]).any():
                continue
            batch = [rows[i] for i in range(*chunk.indices(len(rows)))]
            array[chunk] = _compute_logps(run, model, batch)
            if isinstance(array, np.memmap):
                array.flush()


def _compute_logps(run: Run, model: PreparedModel, rows: Sequence[Encoded]) -> np.ndarray:
    """Returns log-probabilities (rows, 2) of both answers; for KTO, of own and mismatched one."""
    values = np.full((len(rows), 2), np.nan, dtype=np.float32)
    for column, sequences in ((0, rows), (1, [other for row in rows for other in row.contrasts])):
        for indices, answers in _score(run, model, sequences):
            sums = answers[:, 0].float().cpu().numpy().reshape(len(indices), -1)
            values[indices, column : column + sums.shape[1]] = sums
    return values


def _score(
    run: Run, model: PreparedModel, rows: Sequence[Encoded]
) -> Iterator[tuple[list[int], Tensor]]:
    objective: Any = run.objective
    if not rows:
        return
    head = model.fast.cross_entropy if model.fast is not None else None
    for indices, inputs in iterate_batches(run, model.fast, rows):
        yield indices, compute_answer_likelihoods(head, model.model, objective, inputs)


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


def precompute_reference(
    run: Run, listener: Listener, processes: Processes
) -> tuple[Run, Reference | None]:
    """Returns the run with log-probabilities of the `--reference` model, and the `Reference`.

    If the run needs no such model, the run is unchanged and the `Reference` None.
    """
    reference = run.auxiliary.reference
    if reference is None or not needs_reference(run):
        return run, None
    listener.stage("running the reference model")
    config = run.config.preference
    weighting = config.ld_alpha if config.loss == "ld-dpo" else None
    batch_plan = [run.fast.prefix_tree, run.fast.tokens]  # same rounding as the policy's rows
    key = json.dumps([get_model_key(reference, run), batch_plan, weighting])
    with contextlib.ExitStack() as stack:
        load = functools.cache(
            lambda: stack.enter_context(load_auxiliary_model(reference, run, listener))
        )
        run, info = add_reference_logps(run, reference.name, key, load, listener, processes)
    workspace = Workspace("reference")
    reference.write(Path(workspace.name), (run.config.output.dir or Path("runs/run")) / "adapter")
    return run, Reference({**info, "fingerprint": reference.fingerprint}, workspace)


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
