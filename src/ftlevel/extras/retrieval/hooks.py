"""What embedding models and rerankers change in training, estimates and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from ftlevel.config.section import Choice
from ftlevel.errors import InputError
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.events import Listener
from ftlevel.extras.retrieval.auxiliary import embed_rows, score_rows
from ftlevel.extras.retrieval.batches import DistinctTextSampler, TextCollator
from ftlevel.extras.retrieval.config import EmbeddingConfig
from ftlevel.extras.retrieval.embedding import get_task_of_texts
from ftlevel.extras.retrieval.evaluators import EmbeddingEvaluator, RerankingEvaluator
from ftlevel.extras.retrieval.whole_step import GRAPH_MEMORY_RATIO, EmbeddingTrainer
from ftlevel.fast.step_collator import StepCollator
from ftlevel.models.loading import load_config
from ftlevel.trained.resolve import (
    ReferenceModel,
    compute_fingerprint,
    get_model_dir,
    resolve_model,
)
from ftlevel.training.forecast.memory import StepBatch
from ftlevel.training.forecast.meta_model import (
    ACTIVATIONS,
    BACKWARD,
    FIRST_BLOCK,
    FORWARD,
    PERSISTENT_PARTS,
)
from ftlevel.training.hooks import TrainingHooks
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes


class RetrievalHooks(TrainingHooks):
    """Hooks of rerankers: a teacher model scores documents."""

    evaluator: ClassVar[type[Evaluator]] = RerankingEvaluator

    def resolve_auxiliary(self, run: Run, flag: str, name: str) -> ReferenceModel:
        """Resolve a guide or teacher, which reads texts: its tokenizer may differ.

        Its fingerprint also covers pooling, normalization and prompts.
        """
        label, device, dtype = f"{flag} {name}", run.model.device, run.model.dtype
        ref = resolve_model(name, device=device, dtype=dtype, label=label, require_task=False)
        task = ref.task or get_task_of_texts(get_model_dir(name), load_config(ref.source))
        allowed = ("embedding",) if flag == "--guide" else ("embedding", "reranking")
        if task not in allowed:
            raise InputError(
                f"{label} was trained for {task}. Name a model for {' or '.join(allowed)}."
            )
        if not ref.task:
            ref = resolve_model(name, task, device=device, dtype=dtype, label=label)
        content = [compute_fingerprint(ref), ref.card.options]
        text = json.dumps(content, sort_keys=True, default=str)
        return ReferenceModel(name, ref, hashlib.sha256(text.encode()).hexdigest())

    def with_auxiliary_outputs(self, run: Run, listener: Listener, processes: Processes) -> Run:
        """Returns the run with vectors of the guide or scores of the teacher in its rows.

        With several processes, they may differ in rounding from those of one process.
        """
        for path, model in run.auxiliary.items():
            flag = path.rpartition(".")[2]
            listener.stage(f"running the {flag}")
            loaded, data = model.ref.load(run.model.device), run.data
            if flag == "guide":
                data = replace(data, train=embed_rows(data.train, loaded, processes))
            else:
                train, validation = (
                    score_rows(rows, loaded, processes) for rows in (data.train, data.validation)
                )
                data = replace(data, train=train, validation=validation)
            rows: Sequence[Any] = data.train
            num_texts = len({text for row in rows for text in row.words})
            choice = Choice(flag, model.name, f"{num_texts:,} texts, {model.ref.task}")
            listener.choices("train", [choice])
            run = replace(run, data=data)
        return run


class EmbeddingHooks(RetrievalHooks):
    """Hooks of embedding models: the loss needs the vectors of all texts of a step."""

    collator: ClassVar[type[StepCollator]] = TextCollator
    evaluator: ClassVar[type[Evaluator]] = EmbeddingEvaluator

    def get_auxiliary_names(self, run: Run) -> Mapping[str, str | None]:
        return {"embedding.guide": run.config.get_section(EmbeddingConfig).guide}

    def create_order(self, run: Run) -> DistinctTextSampler | None:
        """Returns a sampler by which no text occurs twice in a step, or each has one dataset."""
        is_distinct = run.config.get_section(EmbeddingConfig).batch_sampler == "no_duplicates"
        data, train = run.data, run.config.train
        if not (data.sets or is_distinct):
            return None
        return DistinctTextSampler(
            data.train, train.rows_per_step, train.order_seed, data.sets, is_distinct=is_distinct
        )

    def select_trainer(
        self, run: Run, sampler: Any, rows: Any, order: Any
    ) -> tuple[Any, dict[str, Any], Any]:
        grad_cache = run.config.get_section(EmbeddingConfig).grad_cache
        return EmbeddingTrainer, {"grad_cache": grad_cache}, order

    def add_memory(self, run: Run, peaks: dict[str, dict[str, float]], batch: StepBatch) -> None:
        """Add the autograd graphs of all micro-batches to `peaks` (modified), if they are kept."""
        cache = run.config.get_section(EmbeddingConfig).grad_cache
        if (run.config.train.num_processes or 1) > 1 or cache == "always":
            return
        tokens = batch.tokens * batch.num_workers
        per_token = peaks[FORWARD].get(ACTIVATIONS, 0) / tokens
        others = sum(size for part, size in peaks[FORWARD].items() if part in PERSISTENT_PARTS)
        needed = batch.step_tokens * per_token
        if cache == "auto" and needed > GRAPH_MEMORY_RATIO * (batch.memory - others):
            return
        if graph_bytes := per_token * max(batch.step_tokens - tokens, 0):
            for moment in (FORWARD, BACKWARD, FIRST_BLOCK):
                peaks[moment][ACTIVATIONS] += graph_bytes
