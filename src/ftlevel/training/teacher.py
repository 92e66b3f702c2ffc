"""Precompute teacher predictions before the trained model loads.

Predictions for the top tokens, or for all, are cached on disk; a training step reads those of its
rows. Auxiliary models are located before any weights load; `text_models` runs those that read
texts.
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
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.rollouts import compute_token_logps
from ftlevel.events import Listener
from ftlevel.fast.cross_entropy import Observe
from ftlevel.fast.likelihoods import prepare_inputs
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import load_config
from ftlevel.objectives import PolicyObjective, TokenObjective
from ftlevel.tasks.embedding.objective import Embeddings
from ftlevel.tasks.losses import DistillationRows, outcome_dtype, select_top_k
from ftlevel.tasks.reranking.objective import Ranking
from ftlevel.tasks.rl.rows import CompletionRow
from ftlevel.trained.resolve import (
    ReferenceModel,
    resolve_reference,
    resolve_text_model,
)
from ftlevel.training.model import PreparedModel
from ftlevel.training.plan.run import AuxiliaryModels, Run
from ftlevel.training.reference import (
    AT_ONCE,
    Reference,
    cache_path,
    describe_cache_key,
    describe_first_loss,
    is_missing,
    load_auxiliary_model,
    micro_batches,
    open_or_fill,
)


@dataclass(frozen=True)
class TeacherPredictions:
    """Training rows with the teacher's predictions; `facts` is their entry in summary.json."""

    rows: Sequence[Encoded]
    facts: Mapping[str, Any]


def precompute_teacher(run: Run, listener: Listener) -> TeacherPredictions | None:
    """Returns the training rows with the teacher's predictions; None if none are needed.

    Raises InputError if the disk has no space for them.
    """
    teacher, settings = run.auxiliary.teacher, run.config.distillation
    if (
        teacher is None
        or not isinstance(run.objective, TokenObjective)
        or isinstance(run.objective, PolicyObjective)
    ):
        return None
    listener.stage("running the teacher")
    objective, rows = run.objective, run.data.train
    teacher_vocabulary = load_config(teacher.ref.source).get_text_config().vocab_size
    dtype = outcome_dtype(settings, min(run.model.vocabulary, teacher_vocabulary))
    offsets = np.cumsum([0, *(_count(objective, row) for row in rows)]).tolist()
    key = json.dumps([describe_cache_key(teacher, run), settings.kd_temperature, str(dtype)])
    path, size = cache_path(run.config.data, "teacher", key, rows), offsets[-1] * dtype.itemsize
    _check_room(path, size)

    def fill(into: np.ndarray) -> None:
        with load_auxiliary_model(teacher, run, listener) as (asking, adapted):
            _fill(asking, adapted, offsets, into)

    predictions, was_cached = open_or_fill(path, (offsets[-1],), dtype, fill)
    status = "cached" if was_cached else "computed before step 1"
    count = dtype["ids"].shape[0]
    share = float(1 - np.exp(predictions["known"][:, -1]).mean()) if count else 1.0
    tokens = f"the top {count} tokens" if count else "all tokens"
    details = f"{tokens} at {offsets[-1]:,} positions, {share:.1%} of its probability; "
    details += f"{size / 1e6:,.1f} MB"
    listener.choices("teacher", [Choice("teacher", teacher.name, f"{status}: {details}")])
    facts = {
        "teacher": teacher.name,
        "fingerprint": teacher.fingerprint,
        "cached": was_cached,
        "tokens_kept": count or dtype["known"].shape[0],
        "places": offsets[-1],
        "probability_kept": share,
        "bytes": size,
    }
    return TeacherPredictions(DistillationRows(rows, predictions, offsets), facts)


def _count(objective: TokenObjective, row: Encoded) -> int:
    return int(objective.count(torch.tensor([row.labels])))


def _check_room(path: Path | None, size: int) -> None:
    """Raise InputError if the file `path` must be created and the disk lacks `size` bytes."""
    if path is None or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(
            f"--teacher: its predictions take {size / 1e9:,.1f} GB, and {path.parent} has "
            f"{free / 1e9:,.1f} GB free. Lower --kd-top-k, or move the cache with XDG_CACHE_HOME."
        )


def _fill(run: Run, adapted: PreparedModel, offsets: Sequence[int], array: np.ndarray) -> None:
    """Compute missing predictions in `array` (modified), one per target, a few rows at a time."""
    rows, model = run.data.train, adapted.model
    model.eval()
    with torch.no_grad(), autocast(run.model.device, run.model.dtype):
        for start in range(0, len(rows), AT_ONCE):
            chunk = range(start, min(start + AT_ONCE, len(rows)))
            if not is_missing(array[offsets[chunk.start] : offsets[chunk.stop]]).any():
                continue
            batch_rows = [rows[i] for i in chunk]
            for indices, log_probs, ids in _predict(run, adapted, batch_rows, array.dtype):
                counts = [offsets[start + i + 1] - offsets[start + i] for i in indices]
                ends = np.cumsum(counts)
                for i, count, end in zip(indices, counts, ends, strict=True):
                    target, source = (
                        slice(offsets[start + i], offsets[start + i + 1]),
                        slice(end - count, end),
                    )
                    array["ids"][target] = ids[source]
                    array["known"][target, 1:] = log_probs[source, 1:]
                    array["known"][target, 0] = log_probs[source, 0]  # last: marks it as filled
            if isinstance(array, np.memmap):
                array.flush()


def _predict(
    run: Run, adapted: PreparedModel, rows: Sequence[Encoded], dtype: np.dtype
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yields micro-batches: row indices, and the teacher's log-probabilities and ids at targets."""
    objective, settings, vocabulary = run.objective, run.config.distillation, run.model.vocabulary
    if not isinstance(objective, TokenObjective):
        return
    parts: list[tuple[Tensor, Tensor]] = []

    def keep(scores: Tensor, _: Tensor) -> None:
        values, ids = select_top_k(scores[:, :vocabulary], settings, dtype)
        parts.append((values.cpu(), ids.cpu()))

    for indices, inputs in micro_batches(run, adapted.fast, rows):
        parts.clear()
        _observe_logits(adapted, objective, inputs, keep)
        log_probs, ids = (torch.cat([part[i] for part in parts]).numpy() for i in (0, 1))
        yield indices, log_probs, ids


def _observe_logits(
    adapted: PreparedModel, objective: TokenObjective, batch: Mapping[str, Tensor], show: Observe
) -> None:
    """Call `show` with chunks of the logits (targets, vocabulary) at the targets of `batch`."""
    inputs, labels = prepare_inputs(adapted.model, objective, batch)
    at, targets = objective.locate(labels)
    if adapted.fast is not None and adapted.fast.cross_entropy is not None:
        head = adapted.fast.cross_entropy
        head.loss_sum(lambda: adapted.model(**inputs), at, targets, show)
        return
    scores = objective.logits(adapted.model(**inputs)).flatten(0, 1)
    show(scores.index_select(0, at), targets)


class TeacherScorer:
    """Computes the teacher's log-probabilities of sampled completions, packed as in training.

    The teacher loads at the first call and stays loaded.
    """

    def __init__(self, teacher: ReferenceModel, run: Run, listener: Listener) -> None:
        self.teacher = teacher
        self._run = run
        self._context = load_auxiliary_model(teacher, run, listener)
        self._loaded: tuple[Run, PreparedModel] | None = None

    def __call__(self, rows: Sequence[CompletionRow]) -> list[list[float]]:
        """Returns, for each row, the log-probabilities of the completion's tokens."""
        objective = self._run.objective
        if not rows or not isinstance(objective, PolicyObjective):
            return []
        self._loaded = self._loaded or self._context.__enter__()
        run, adapted = self._loaded
        head = adapted.fast.cross_entropy if adapted.fast is not None else None
        with autocast(run.model.device, run.model.dtype):
            batches = micro_batches(run, adapted.fast, rows)
            logps = compute_token_logps(adapted.model, objective, batches, head)
        return [logps[index] for index in range(len(rows))]


def build_scorer(run: Run, listener: Listener) -> TeacherScorer | None:
    """Build the teacher of on-policy distillation, for reinforcement learning; None without one."""
    if run.auxiliary.teacher is None or not isinstance(run.objective, PolicyObjective):
        return None
    return TeacherScorer(run.auxiliary.teacher, run, listener)


@dataclass(frozen=True)
class AuxiliaryOutputs:
    """Outputs of the reference and the teacher model, each None if not needed.

    `scorer` is the teacher in reinforcement learning, which scores completions as they are sampled.
    """

    reference: Reference | None
    teacher_predictions: TeacherPredictions | None
    scorer: TeacherScorer | None = None

    @property
    def start(self) -> Any:
        """Temporary directory with the reference's files to save; None if there are none."""
        return self.reference.start if self.reference is not None else None

    def describe(
        self, run: Run, records: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Returns sections of summary.json, and notes that explain an unexpected first loss."""
        facts, notes = dict[str, Any](), list[str]()
        if self.reference is not None:
            facts["reference"], notes = describe_first_loss(self.reference, run, records)
        if self.teacher_predictions is not None:
            facts["distillation"] = dict(self.teacher_predictions.facts)
        if self.scorer is not None:
            teacher = self.scorer.teacher
            facts["distillation"] = {"teacher": teacher.name, "fingerprint": teacher.fingerprint}
        return facts, notes


def find_auxiliary_models(run: Run) -> AuxiliaryModels:
    """Find the reference, teacher and guide models named in the configuration.

    Raises ConfigError if the run would overwrite one, InputError if one is missing or unsuitable.
    """
    return AuxiliaryModels(
        reference=_find(run, "--reference", run.config.preference.other_reference),
        teacher=_find(run, "--teacher", run.config.distillation.teacher),
        guide=_find(run, "--guide", run.config.embedding.guide),
    )


def _find(run: Run, flag: str, name: str | None) -> ReferenceModel | None:
    if name is None:
        return None
    path, output_dir = Path(name).expanduser(), run.config.output.dir
    if (
        output_dir is not None
        and path.exists()
        and path.resolve().is_relative_to(output_dir.resolve())
    ):
        raise ConfigError(
            f"--output-dir {output_dir} holds {flag} {name}, which is not changed. Choose another "
            f"directory."
        )
    model = run.model
    if isinstance(run.objective, Embeddings | Ranking):
        return resolve_text_model(flag, name, model.device, model.dtype)
    return resolve_reference(flag, name, model.kind, model.tokenizer, model.device)
