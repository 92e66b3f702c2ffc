"""Precompute teacher predictions before the trained model loads.

Predictions for the top tokens, or for all, are cached on disk; a training step reads those of its
rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import ConfigError, InputError
from ftlevel.events import Listener
from ftlevel.fast.cross_entropy import Observe
from ftlevel.fast.likelihoods import prepare_inputs
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import load_config
from ftlevel.objectives import TokenObjective
from ftlevel.tasks.losses import DistillationRows, outcome_dtype, select_top_k
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import AuxiliaryModels, Run
from ftlevel.training.processes import Processes
from ftlevel.training.reference import (
    CHUNK_SIZE,
    Reference,
    cache_path,
    check_first_loss,
    get_model_key,
    is_missing,
    iterate_batches,
    load_auxiliary_model,
    open_or_compute,
)


@dataclass(frozen=True)
class TeacherPredictions:
    """Training rows with the teacher's predictions; `facts` is the entry in summary.json."""

    rows: Sequence[Encoded]
    facts: Mapping[str, Any]


def precompute_teacher(
    run: Run, listener: Listener, processes: Processes
) -> TeacherPredictions | None:
    """Returns training rows with the teacher's predictions; None if the run needs none."""
    teacher, config = run.auxiliary.teacher, run.config.distillation
    objective = run.objective
    if teacher is None or not isinstance(objective, TokenObjective) or objective.samples:
        return None
    listener.stage("running the teacher")
    rows = run.data.train
    vocab_size = load_config(teacher.ref.source).get_text_config().vocab_size
    dtype = outcome_dtype(config, min(run.model.vocabulary, vocab_size))
    offsets = np.cumsum([0, *(_num_targets(objective, row) for row in rows)]).tolist()
    key = json.dumps([get_model_key(teacher, run), config.kd_temperature, str(dtype)])
    path, size = cache_path(run.config.data, "teacher", key, rows), offsets[-1] * dtype.itemsize
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
    return TeacherPredictions(DistillationRows(rows, predictions, offsets), info)


def _num_targets(objective: TokenObjective, row: Encoded) -> int:
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


@dataclass(frozen=True)
class AuxiliaryOutputs:
    """Outputs of the reference and the teacher model, each None if not needed.

    `scorer` is what `TrainingHooks.create_scorer` returned, with `teacher`, the teacher model.
    """

    reference: Reference | None
    teacher_predictions: TeacherPredictions | None
    scorer: Any

    @property
    def files(self) -> Any:
        """Temporary directory with the reference's files to save; None if there are none."""
        return self.reference.files if self.reference is not None else None

    def describe(
        self, run: Run, records: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns sections of summary.json, and notes that explain an unexpected first loss."""
        facts, notes = dict[str, Any](), list[str]()
        if self.reference is not None:
            facts["reference"], notes = check_first_loss(self.reference, run, records)
        if self.teacher_predictions is not None:
            facts["distillation"] = dict(self.teacher_predictions.facts)
        if self.scorer is not None:
            teacher = self.scorer.teacher
            facts["distillation"] = {"teacher": teacher.name, "fingerprint": teacher.fingerprint}
        return facts, notes


def resolve_auxiliary_models(run: Run) -> AuxiliaryModels:
    """Resolve the configured names of auxiliary models; loads no weights."""
    return AuxiliaryModels(
        reference=_resolve(run, "--reference", run.config.preference.other_reference),
        teacher=_resolve(run, "--teacher", run.config.distillation.teacher),
        others={
            path: _resolve(run, f"--{path[1]}", name)
            for path, name in run.hooks.get_auxiliary_names(run).items()
        },
    )


def _resolve(run: Run, flag: str, name: str | None) -> ReferenceModel | None:
    if name is None:
        return None
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
