"""What the model says of the answers as it begins: the reference that preferences are held against.

It is the model at step 0, with whatever adapter it begins with, and nothing dropped: where a method
rewrites the base (PiSSA, OLoRA, LoftQ) the base without its adapter is another model, and where the
run goes on from an adapter that is what must not be left. It is computed once, by the packed rows
of the fast step, and kept under a digest of all that decides it; so no second model is ever loaded.

What models say of rows, on disk, under a digest of all that decides it.

The reference of preferences that another run, adapter or model is: asked, and let go.

It goes through the rows before the weights of the run load, so that no two models are in memory.

What models say of the rows before the first step, computed once and kept.

`fill` asks the model as it begins, which preferences are held against; `another` asks a model that
is not trained in its place, and `teacher` one whose predictions are learned. `beside` finds these
two before weights load, `asked` is the order of it all, and `kept` is the file in which answers lie
between runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlevel.artifacts.files import base_digest
from ftlevel.config import TrainConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.prepare.dataset import cache_root, file_digest, is_writable
from ftlevel.evaluation.likelihoods import measure_likelihoods
from ftlevel.events import Listener
from ftlevel.fast.head.likelihoods import measure_answers
from ftlevel.fast.packing import using_layout
from ftlevel.fast.plan import plan_forward
from ftlevel.fast.step import FastStep
from ftlevel.fast.step_collator import StepCollator
from ftlevel.methods import METHODS
from ftlevel.models.hardware import autocast
from ftlevel.models.upstream.tensors import inner_tensors
from ftlevel.task import LikelihoodObjective
from ftlevel.trained.adapt import save_adapter
from ftlevel.trained.another import Another
from ftlevel.trained.load import load_found
from ftlevel.training.build_trainer import build_evaluator
from ftlevel.training.model import Adapted, speed_up
from ftlevel.training.plan.plan import Plan
from ftlevel.workspace import Workspace


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


AT_ONCE = 64
"""Rows that are cut into micro-batches together."""


@dataclass(frozen=True)
class Reference:
    """What is known of the reference.

    Attributes:
        facts: what summary.json says of it.
        start: a temporary directory with the adapter as it began, or the name of another model;
            None where it began as nothing.
    """

    facts: Mapping[str, Any]
    start: Any = None


def fill_reference(
    config: TrainConfig, plan: Plan, adapted: Adapted, listener: Listener
) -> tuple[Plan, Reference | None]:
    """Return the plan with rows that know their reference, and what is known of that.

    Args:
        config: the whole configuration.
        plan: of the run.
        adapted: its model, as it begins, with the fast step on it.
        listener: told of it.
    """
    if not needs_reference(plan):
        return plan, None
    listener.stage("compute the reference")
    key, name = digest_start(config, plan, adapted), "initial model"
    plan, facts = fill_rows(config, plan, name, key, lambda: (plan, adapted), listener)
    return plan, Reference(facts, _keep_start(config, plan, adapted))


def needs_reference(plan: Plan) -> bool:
    """Whether the rows of a run have to know a reference."""
    objective = plan.objective
    return isinstance(objective, LikelihoodObjective) and objective.needs_reference


def fill_rows(
    config: TrainConfig,
    plan: Plan,
    name: str,
    key: str,
    ask: Callable[[], tuple[Plan, Adapted]],
    listener: Listener,
) -> tuple[Plan, dict[str, Any]]:
    """Return `plan` with rows that know their reference, and what summary.json says of that.

    Args:
        config: the whole configuration.
        plan: of the run.
        name: of the reference, for the screen.
        key: all that decides what the reference says of a row.
        ask: gives the reference, and the plan by which it computes; not called where all is kept.
        listener: told of it.
    """
    task: Any = plan.task
    train, cached = read_or_fill(config, key, plan.data.train, lambda into: _fill(*ask(), into))
    data = replace(plan.data, train=task.with_reference(plan.data.train, train))
    if plan.data.validation:
        evaluator = build_evaluator(config, plan)
        if evaluator is None:
            raise TypeError("validation rows are evaluated")

        def score(into: np.ndarray) -> None:
            into[:] = measure_likelihoods(evaluator, ask()[1].model)

        padded = f"{key} padded by {evaluator.batch_size}"
        held_out, _ = read_or_fill(config, padded, plan.data.validation, score)
        data = replace(data, validation=task.with_reference(plan.data.validation, held_out))
    how = "log-probabilities cached" if cached else "log-probabilities precomputed"
    rows = len(plan.data.train) + len(plan.data.validation)
    listener.choices("reference", [Choice("reference", name, f"{how} for {rows:,} rows")])
    return replace(plan, data=data), {"is": name, "rows": rows, "cached": cached}


FIRST_LOSS = 1e-6
"""How far the first loss may be from what it has to be, relative, without a word about it."""


def describe_first_loss(
    reference: Reference, config: TrainConfig, plan: Plan, records: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """Return what summary.json says of the reference, and why the first loss is another.

    Args:
        reference: of the run.
        config: the whole configuration.
        plan: of the run.
        records: what was logged.
    """
    expected, facts = plan.objective.first_loss, dict(reference.facts)
    first = next((r["loss"] for r in records if r["step"] == 1 and "loss" in r), None)
    if expected is None or first is None:
        return facts, []
    facts |= {"first_loss": first, "first_loss_expected": expected}
    if abs(first - expected) <= FIRST_LOSS * expected:
        return facts, []
    dropped = getattr(config.method, "lora_dropout", 0.0)
    why = (
        f"dropout of {dropped:g} is on in the policy and off in the reference"
        if dropped
        else f"in {plan.model.dtype} the same rows, packed otherwise, are rounded otherwise"
    )
    return facts, [f"the first loss is {first:.7f}, and {expected:.7f} at the reference: {why}."]


def _keep_start(config: TrainConfig, plan: Plan, adapted: Adapted) -> Any:
    """Return a temporary directory with the adapter as it begins; None where that is nothing.

    An adapter that takes its start out of the base is saved for the untouched base, and nothing
    there as well.
    """
    model = adapted.model
    rewrites = METHODS[config.method.kind].rewrites_base(config.method)
    if not hasattr(model, "peft_config") or (plan.adapter is None and rewrites):
        return None
    on, off = (_switched(plan, adapted, off=off) for off in (False, True))
    if plan.adapter is None and np.array_equal(on, off):
        return None
    kept = Workspace("start")
    save_adapter(model, config.method, Path(kept.name), adapted.start)
    return kept


def _switched(plan: Plan, adapted: Adapted, *, off: bool) -> np.ndarray:
    """Return what the model says of a row, with its adapter or without."""
    row, model = plan.data.train[0], adapted.model
    training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            autocast(plan.model.device, plan.model.dtype),
            model.disable_adapter() if off else contextlib.nullcontext(),
        ):
            return _measure(plan, adapted, [row])
    finally:
        model.train(training)


def _fill(plan: Plan, adapted: Adapted, into: np.ndarray) -> None:
    """Write what is missing of `into` (rows, 2; mutated), some rows at a time."""
    rows, model = plan.data.train, adapted.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(plan.model.device, plan.model.dtype):
            for begin in range(0, len(rows), AT_ONCE):
                part = slice(begin, begin + AT_ONCE)
                if not np.isnan(into[part]).any():
                    continue
                own = [rows[i] for i in range(*part.indices(len(rows)))]
                into[part] = _measure(plan, adapted, own)
                if isinstance(into, np.memmap):
                    into.flush()
    finally:
        model.train(training)


def _measure(plan: Plan, adapted: Adapted, rows: Sequence[Encoded]) -> np.ndarray:
    """Return (rows, 2): of a pair its two answers, else the answer and what it contrasts with."""
    found = np.full((len(rows), 2), np.nan, dtype=np.float32)
    contrasts = [other for row in rows for other in row.contrasts]
    for column, some in ((0, rows), (1, contrasts)):
        for chosen, answers in _score(plan, adapted, some):
            sums = answers[:, 0].float().cpu().numpy().reshape(len(chosen), -1)
            found[chosen, column : column + sums.shape[1]] = sums
    return found


def _score(
    plan: Plan, adapted: Adapted, rows: Sequence[Encoded]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield indices of rows and how likely their answers are, by the path of the training step."""
    objective, device = plan.objective, plan.model.device
    if not rows or not isinstance(objective, LikelihoodObjective):
        return
    head = adapted.fast.cross_entropy if adapted.fast is not None else None
    for chosen, batch in micro_batches(adapted.fast, rows, plan.model.pad_id):
        layout = batch.pop("layout", None)
        moved = {name: value.to(device) for name, value in batch.items()}
        with using_layout(layout.to(device) if layout is not None else None):
            yield chosen, measure_answers(head, adapted.model, objective, moved)


def micro_batches(
    fast: FastStep | None, rows: Sequence[Encoded], pad_id: int
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield indices of rows and their batch, as the training step would cut them."""
    if fast is not None:
        yield from StepCollator(pad_id, fast.plan).split(rows)
        return
    collate = Collator(pad_id)
    for index, row in enumerate(rows):
        yield [index], collate([row])


def ask_reference(
    config: TrainConfig, plan: Plan, listener: Listener
) -> tuple[Plan, Reference | None]:
    """Return the plan with rows that know what another model says of them, where one is named.

    Args:
        config: the whole configuration.
        plan: of the run.
        listener: told of it.
    """
    another = plan.beside.reference
    if another is None or not needs_reference(plan):
        return plan, None
    listener.stage("ask the reference")
    preference = config.preference
    weighting = preference.ld_alpha if preference.loss == "ld-dpo" else None
    cut = [plan.fast.prefix_tree, plan.fast.tokens]  # as the policy's rows, rounded alike
    key = json.dumps([describe_asking(another, plan), cut, weighting])
    with contextlib.ExitStack() as held:
        ask = functools.cache(lambda: held.enter_context(loaded(another, plan, listener)))
        plan, facts = fill_rows(config, plan, another.name, key, ask, listener)
    kept = Workspace("reference")
    beside = (config.output.dir or Path("runs/run")) / "adapter"
    another.write(Path(kept.name), beside)
    return plan, Reference({**facts, "fingerprint": another.fingerprint}, kept)


def describe_asking(another: Another, plan: Plan) -> dict[str, object]:
    """Return all that decides what `another` says of a row."""
    fast = plan.fast
    return {
        "model": another.fingerprint,
        "precision": [plan.model.device, plan.model.dtype],
        "packs": fast.enabled and fast.packs,
        "versions": torch.__version__,
    }


@contextlib.contextmanager
def loaded(another: Another, plan: Plan, listener: Listener) -> Iterator[tuple[Plan, Adapted]]:
    """Give the plan by which `another` computes the rows of `plan`, and its model, in the block."""
    trained = load_found(another.found, plan.model.device)
    forward = plan_forward(
        trained.model, trained.kind, trained.method, plan.objective, plan.fast.tokens
    )
    forward = replace(forward, enabled=plan.fast.enabled,
                      prefix_tree=forward.packs and plan.fast.prefix_tree)  # fmt: skip
    asking = replace(plan, fast=forward, model=replace(plan.model, dtype=trained.dtype))
    fast = speed_up(trained.model, asking, listener)
    try:
        yield asking, Adapted(trained.model, {}, fast, {})
    finally:
        if fast is not None:
            fast.remove()
        del trained, fast
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
