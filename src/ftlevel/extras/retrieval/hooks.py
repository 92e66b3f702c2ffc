"""What embedding models and rerankers change in training, estimates and evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ftlevel.evaluation.scoring import Evaluator
from ftlevel.events import Listener
from ftlevel.extras.retrieval.auxiliary import GUIDE, resolve_text_model, with_text_models
from ftlevel.extras.retrieval.batches import DistinctTextSampler, TextCollator
from ftlevel.extras.retrieval.config import EmbeddingConfig
from ftlevel.extras.retrieval.evaluators import EmbeddingEvaluator, RerankingEvaluator
from ftlevel.extras.retrieval.whole_step import GRAPH_MEMORY_RATIO, EmbeddingTrainer
from ftlevel.fast.step_collator import StepCollator
from ftlevel.trained.resolve import ReferenceModel
from ftlevel.training.forecast.memory import PERSISTENT_PARTS, StepBatch
from ftlevel.training.forecast.meta_model import ACTIVATIONS, BACKWARD, FIRST_BLOCK, FORWARD
from ftlevel.training.hooks import TrainingHooks
from ftlevel.training.plan.run import Run
from ftlevel.training.processes import Processes


class RetrievalHooks(TrainingHooks):
    """Hooks of rerankers: a teacher model scores documents."""

    evaluator: ClassVar[type[Evaluator]] = RerankingEvaluator

    def resolve_auxiliary(self, run: Run, flag: str, name: str) -> ReferenceModel:
        """Resolve a guide or teacher, which may have another tokenizer."""
        return resolve_text_model(flag, name, run.model.device, run.model.dtype)

    def with_auxiliary_outputs(self, run: Run, listener: Listener, processes: Processes) -> Run:
        """Returns the run with vectors of the guide or scores of the teacher in its rows."""
        return with_text_models(run, listener, processes)


class EmbeddingHooks(RetrievalHooks):
    """Hooks of embedding models: the loss needs the vectors of all texts of a step."""

    collator: ClassVar[type[StepCollator]] = TextCollator
    evaluator: ClassVar[type[Evaluator]] = EmbeddingEvaluator

    def get_auxiliary_names(self, run: Run) -> Mapping[tuple[str, str], str]:
        """Returns the name of the guide, if there is one."""
        guide = run.config.get_section(EmbeddingConfig).guide
        return {GUIDE: guide} if guide is not None else {}

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
        """Returns `EmbeddingTrainer`."""
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
