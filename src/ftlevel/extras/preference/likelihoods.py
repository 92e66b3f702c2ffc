"""Log-likelihoods of answers: evaluation, KTO's baseline, and the reference model's.

The reference is the initial model, with any adapter that training continues from, without dropout.
It is not the base with the adapter disabled, because PiSSA, OLoRA and LoftQ rewrite the base. The
model to be trained computes its values once before step 1, on the fast step's packed rows. With
`--reference`, a different model computes them before the run's weights load, and is freed
afterwards. They are cached on disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlevel.artifacts.files import Workspace, file_fingerprint, hash_weights, read_json, write_json
from ftlevel.artifacts.paths import relative_path, resolve_relative
from ftlevel.config.section import Choice
from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import InputError
from ftlevel.evaluation.intervals import ExampleRecord, ExampleStats
from ftlevel.evaluation.scoring import BatchScores, Evaluator, merge_scores
from ftlevel.events import Listener
from ftlevel.extras.preference.config import PreferenceConfig
from ftlevel.extras.preference.objective import Preferences
from ftlevel.extras.preference.rows import LabeledAnswerRow, ReferencedRows
from ftlevel.fast.cross_entropy import ChunkedCrossEntropy
from ftlevel.fast.likelihoods import compute_token_likelihoods
from ftlevel.fast.packing import using_layout
from ftlevel.fast.plan import get_dropout
from ftlevel.fast.step import chunked_cross_entropy
from ftlevel.methods import METHODS
from ftlevel.models.hardware import eval_mode, evaluating
from ftlevel.models.upstream.tensors import inner_tensors
from ftlevel.trained.adapt import save_adapter
from ftlevel.trained.generation import batches
from ftlevel.trained.model_ref import LoadedModel
from ftlevel.trained.resolve import (
    ReferenceModel,
    compute_fingerprint,
    get_card_dir,
    resolve_base,
    resolve_model,
)
from ftlevel.training.build_trainer import create_evaluator
from ftlevel.training.identity import get_config_values
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes
from ftlevel.training.teacher import (
    CHUNK_SIZE,
    cache_path,
    get_model_key,
    iterate_batches,
    load_auxiliary_model,
    open_or_compute,
)

LABELS = "preference_labels"
"""Name of the labels in a batch: `(answers, 3)`, see `Preferences`."""


def compute_answers(
    head: ChunkedCrossEntropy | None, model: Any, objective: Preferences, batch: Mapping[str, Any]
) -> Tensor:
    """Returns each answer's log-likelihood and length, (answers, 2); `head` None: all logits."""
    likelihoods, owners = compute_token_likelihoods(head, model, objective, batch)
    return objective.answers(likelihoods, owners, len(batch["labels"]))


def sum_log_ratios(
    head: ChunkedCrossEntropy | None,
    model: Any,
    objective: Preferences,
    batches: Sequence[dict[str, Any]],
) -> Tensor:
    """Returns the sum and the number of the answers' log-ratios (policy / reference), (2,)."""
    total = torch.zeros(2, device=next(model.parameters()).device)
    with eval_mode(model), torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "layout"}
            with using_layout(batch.get("layout")):
                answers = compute_answers(head, model, objective, inputs)
            ratios = answers[:, 0] - inputs[LABELS][:, 1]
            total += torch.stack([ratios.sum(), torch.ones_like(ratios).sum()])
    return total


def with_baseline(labels: Tensor, total: Tensor) -> Tensor:
    """Returns `labels` (answers, 3) with KTO's baseline in the last column.

    The baseline is the mean of the log-ratios whose sum and number `total` has, or 0 if negative.
    """
    baseline = (total[0] / total[1]).clamp(min=0).to(labels.device)
    return torch.cat([labels[:, :2], baseline.expand(len(labels), 1)], dim=1)


def get_contrasts(rows: Sequence[Encoded]) -> list[Encoded]:
    """Returns the mismatched prompt-answer pairs of `rows`; empty except for KTO."""
    labeled = (row for row in rows if isinstance(row, LabeledAnswerRow))
    return [other for row in labeled for other in row.contrasts]


@dataclass(frozen=True)
class PreferenceEvaluator(Evaluator):
    """Evaluator of losses of the answers' log-likelihoods."""

    objective: Preferences

    def score(self, model: Any, record: ExampleRecord | None) -> dict[str, float]:
        """Returns loss and metrics; adds the rows to `record`, if any."""
        objective, total = self.objective, None
        with self._head(model) as head:
            if objective.needs_baseline:
                ratios = self._map_batches(
                    get_contrasts(self.rows),
                    lambda _, batch: sum_log_ratios(head, model, objective, [batch]),
                )
                total = sum((part for _, part in ratios), torch.zeros(2))

            def score(rows: Sequence[Encoded], batch: dict[str, Tensor]) -> BatchScores:
                log_probs = compute_answers(head, model, objective, batch)
                labels = batch[LABELS] if total is None else with_baseline(batch[LABELS], total)
                scores = BatchScores(objective, record)
                loss = objective.preference_sum(log_probs, labels, training=False)
                scores.stats.loss = loss.item()
                scores.stats.targets = int(objective.count(batch["labels"]))
                scores.stats.meter.update(log_probs, labels, rows)
                if scores.record is not None:
                    self._add(scores.record, rows, log_probs, labels)
                return scores

            parts = [part for _, part in self._map_batches(self.rows, score)]
        return merge_scores(objective, parts, record)

    def _add(
        self, record: ExampleRecord, rows: Sequence[Encoded], log_probs: Tensor, labels: Tensor
    ) -> None:
        width = len(log_probs) // len(rows)
        for index, row in enumerate(rows):
            of_row = slice(index * width, (index + 1) * width)
            own, own_labels = log_probs[of_row], labels[of_row]
            unit = record.units.setdefault(row.row, ExampleStats(self.objective.meter()))
            unit.loss += self.objective.preference_sum(own, own_labels, training=False).item()
            unit.targets += 1
            unit.meter.update(own, own_labels, [row])

    def compute_likelihoods(self, model: Any) -> np.ndarray:
        """Returns log-likelihoods `(rows, 2)`: of both answers, or of answer and mismatched one."""
        result = np.zeros((len(self.rows), 2), dtype=np.float32)
        with evaluating(model, self.device, self.dtype), self._head(model) as head:

            def score(rows: Sequence[Encoded], batch: dict[str, Tensor]) -> np.ndarray:
                log_probs = compute_answers(head, model, self.objective, batch)
                values: np.ndarray = log_probs[:, 0].float().cpu().numpy()
                return values.reshape(len(rows), -1)

            for indices, values in self._map_batches(self.rows, score):
                result[indices, : values.shape[1]] = values
            for indices, values in self._map_batches(get_contrasts(self.rows), score):
                result[indices, 1:] = values
        return result

    def _head(self, model: Any) -> Any:
        objective = self.objective if self.chunked_cross_entropy else None
        longest_rows = sorted(self.rows, key=lambda row: -row.length)[:2]
        return chunked_cross_entropy(
            model, objective, longest_rows, self.pad_id, self.device, self.dtype
        )

    def _map_batches(
        self,
        rows: Sequence[Encoded],
        compute: Callable[[Sequence[Encoded], dict[str, Tensor]], Any],
    ) -> list[tuple[Sequence[int], Any]]:
        """Returns row indices and `compute(rows, batch)` of batches of rows of similar length.

        Batches are padded, and divided among processes.
        """
        collate = Collator(self.pad_id)
        order = sorted(range(len(rows)), key=lambda i: rows[i].length, reverse=True)
        parts = list(batches(order, self.batch_size))

        def compute_batch(indices: Sequence[int]) -> Any:
            own = [rows[i] for i in indices]
            batch = collate(own)
            return compute(own, {name: value.to(self.device) for name, value in batch.items()})

        outputs = self.divide(lambda own: [compute_batch(indices) for indices in own], parts)
        return list(zip(parts, outputs, strict=True))


FOLDER = "reference"
"""Folder next to an adapter, with the initial adapter or the name of the reference model."""
_NAMED = "model.json"
"""File with the name and fingerprint of a reference model."""


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
) -> Run:
    """Returns the run with the initial model's log-probabilities in its rows, and a `Reference`."""
    listener.stage("computing reference log-probabilities")
    key, name = _get_initial_key(run, prepared), "initial model"
    run, info = _add_logps(run, name, key, lambda: (run, prepared), listener, processes)
    return replace(run, resources=Reference(info, _save_initial_adapter(run, prepared)))


def precompute_reference(
    run: Run, reference: ReferenceModel, listener: Listener, processes: Processes
) -> Run:
    """Returns the run with log-probabilities of `reference` in its rows, and a `Reference`."""
    listener.stage("running the reference model")
    config = run.config.get_section(PreferenceConfig)
    weighting = config.ld_alpha if config.loss == "ld-dpo" else None
    batch_plan = [run.fast.prefix_tree, run.fast.tokens]  # same rounding as the policy's rows
    key = json.dumps([get_model_key(reference, run), batch_plan, weighting])
    with contextlib.ExitStack() as stack:
        load = functools.cache(
            lambda: stack.enter_context(load_auxiliary_model(reference, run, listener))
        )
        run, info = _add_logps(run, reference.name, key, load, listener, processes)
    workspace = Workspace("reference")
    base_dir = (run.config.output.dir or Path("runs/run")) / "adapter"
    path = Path(reference.name).expanduser()
    local = {"path": relative_path(path, base_dir)} if path.exists() else {}
    name, fingerprint = str(path.absolute()) if local else reference.name, reference.fingerprint
    write_json(Path(workspace.name) / _NAMED, {"name": name, **local, "fingerprint": fingerprint})
    return replace(run, resources=Reference({**info, "fingerprint": fingerprint}, workspace))


def _get_initial_key(run: Run, prepared: PreparedModel) -> str:
    """Returns a JSON string of all that determines the initial model's log-probabilities."""
    model, fast = run.model, prepared.fast.plan if prepared.fast is not None else run.fast
    path, config = model.source.path, run.config.get_section(PreferenceConfig)
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
        "weighting": [config.loss, config.ld_alpha] if config.loss == "ld-dpo" else [],
        "versions": torch.__version__,
    }
    return json.dumps(key_values, sort_keys=True, default=str)


def _add_logps(
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

    def load_or_compute(
        key: str, rows: Sequence[Encoded], fill: Callable[[np.ndarray, int, int], None]
    ) -> tuple[Sequence[Encoded], bool]:
        sequences = (part for row in rows for part in (*row.sequences, *get_contrasts([row])))
        path = cache_path(run.config.data, "reference", key, sequences)
        shape, dtype = (len(rows), 2), np.dtype(np.float32)
        array, is_cached = open_or_compute(path, shape, dtype, fill, processes)
        return ReferencedRows(rows, np.array(array)), is_cached

    train, is_cached = load_or_compute(key, run.data.train, lambda *part: _fill(*load(), *part))
    data = replace(run.data, train=train)
    if run.data.validation:
        evaluator: Any = create_evaluator(run, processes)

        def score(into: np.ndarray, *_: int) -> None:  # the evaluator divides the rows
            into[:] = evaluator.compute_likelihoods(load()[1].model)

        padded_key = f"{key} padded by {evaluator.batch_size}"
        validation, _ = load_or_compute(padded_key, run.data.validation, score)
        data = replace(data, validation=validation)
    status = "log-probabilities cached" if is_cached else "log-probabilities precomputed"
    rows = len(run.data.train) + len(run.data.validation)
    listener.choices("reference", [Choice("reference", name, f"{status} for {rows:,} rows")])
    return replace(run, data=data), {"is": name, "rows": rows, "cached": is_cached}


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
    objective: Any = run.objective
    head = model.fast.cross_entropy if model.fast is not None else None
    for column, sequences in ((0, rows), (1, get_contrasts(rows))):
        if not sequences:
            continue
        for indices, inputs in iterate_batches(run, model.fast, sequences):
            answers = compute_answers(head, model.model, objective, inputs)
            sums = answers[:, 0].float().cpu().numpy().reshape(len(indices), -1)
            values[indices, column : column + sums.shape[1]] = sums
    return values


def with_reference(evaluator: PreferenceEvaluator, trained: LoadedModel) -> PreferenceEvaluator:
    """Returns `evaluator` with log-probabilities of the reference of `trained` in its rows."""
    log_probs = _compute_reference(evaluator, trained)
    return replace(evaluator, rows=ReferencedRows(evaluator.rows, log_probs))


def _compute_reference(evaluator: PreferenceEvaluator, trained: LoadedModel) -> np.ndarray:
    ref = trained.ref
    path = ref.directory or Path(ref.source.location)
    if (path / FOLDER / _NAMED).is_file():
        ref = _load_reference(path, evaluator.device)
    elif ref.directory is not None and (path / FOLDER).is_dir():
        ref = replace(ref, directory=path / FOLDER)
    elif trained.has_adapter:
        with trained.without_adapter():
            return evaluator.compute_likelihoods(trained.model)
    else:
        ref = replace(ref, source=resolve_base(ref.card, get_card_dir(path) or path))
    return evaluator.compute_likelihoods(ref.load(evaluator.device, evaluator.dtype).model)


def _load_reference(base_dir: Path, device: str) -> Any:
    """Resolve the model that model.json names; InputError if its weights changed."""
    record = read_json(base_dir / FOLDER / _NAMED)
    name = record["name"]
    if record.get("path") and (path := resolve_relative(record["path"], base_dir)).exists():
        name = str(path)
    label = f"{name} (the reference of {base_dir})"
    ref = resolve_model(name, device=device, label=label)
    if compute_fingerprint(ref) != record["fingerprint"]:
        raise InputError(
            f"{label} has other weights than in training, so rewards would change. Restore the "
            "weights, or train again."
        )
    return ref
