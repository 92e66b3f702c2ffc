"""How long a run takes: from a roofline for a card that is named, from a few real steps here.

    operations of a token = 2 N · (1 forward + 1 to inputs + 1 to weights that are trained
                            + 1 recomputed with checkpointing)
    seconds = tokens · operations / (SHARE · dense peak)

N counts the weights of products: those of the blocks, and of the head where it is computed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.events import Silence
from ftlevel.methods import METHODS
from ftlevel.training.forecast.cards import Card
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.schedule import steps_an_epoch

SHARE = 0.4
"""Of a card's peak that a step is taken to reach: NeMo AutoModel reaches 0.41 with LoRA on
Llama-3-8B on an H100 (docs/plan.md); ftlevel was not measured on a card."""

PROBED = 5
"""Steps of a probe, of which the first is not counted."""


@dataclass(frozen=True)
class TimeForecast:
    """The time of a run.

    Attributes:
        seconds_per_epoch: of its steps alone.
        tokens_per_s: of the rows.
        how: where the figures are from.
        tokens_per_cpu_s: the same by the processor's time of all threads, which others that
            compute here do not stretch; None where no steps were run.
    """

    seconds_per_epoch: float
    tokens_per_s: float
    how: str
    tokens_per_cpu_s: float | None = None


def by_roofline(config: TrainConfig, plan: Plan, card: Card) -> TimeForecast | None:
    """Return the time on `card`, or None where its speed is not known."""
    if not card.tflops:
        return None
    tokens = plan.data.facts["tokens"]
    products = _weights(plan)
    passes = 2 + METHODS[config.method.kind].trains_base(config.method)
    passes += config.train.recomputes
    operations = 2 * products * passes * tokens
    seconds = operations / (SHARE * card.tflops * 1e12)
    how = f"a roofline: {SHARE:.0%} of {card.tflops:,g} TFLOP/s, not measured"
    return TimeForecast(seconds, tokens / seconds, how)


def _weights(plan: Plan) -> int:
    """Return how many weights a token is multiplied by."""
    text = plan.model.config.get_text_config()
    width = getattr(text, "hidden_size", 0) or 0
    vocabulary = plan.model.vocabulary * width
    shares = plan.data.facts["supervised"] / max(1, plan.data.facts["tokens"])
    head = vocabulary * min(1.0, shares) if not plan.objective.per_row else 0
    return int(max(plan.model.total_parameters - vocabulary, 0) + head)


def by_probe(config: TrainConfig, plan: Plan) -> TimeForecast:
    """Return the time of the run here, from some of its steps."""
    import tempfile
    from pathlib import Path

    import torch

    from ftlevel.artifacts.run_directory import RunDirectory
    from ftlevel.training.build_trainer import build_trainer
    from ftlevel.training.callbacks.gradient_proof import are_finite
    from ftlevel.training.going_on.resume import GoingOn
    from ftlevel.training.model import load_adapted
    from ftlevel.training.processes import Processes

    adapted = load_adapted(config, plan, Silence())
    with tempfile.TemporaryDirectory() as nowhere:
        run = RunDirectory(Path(nowhere))
        trainer = build_trainer(config, plan, adapted, run, GoingOn(), Processes())
    size = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    optimizer: Any = trainer.create_optimizer()
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    adapted.model.train()
    spent, computed, tokens = 0.0, 0.0, 0
    with trainer.computing_alone(plan.model.dtype):
        for step in range(PROBED):
            rows = _rows_of(plan, step, size)
            begun, busy = time.perf_counter(), time.process_time()
            batch = trainer.data_collator(rows)
            count = trainer.count_targets([batch], trainer.args.device)
            trainer.training_step(adapted.model, batch, count)
            are_finite(weight.grad for weight in trained)  # as the run looks at them
            if trainer.args.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
            optimizer.step()
            are_finite(trained)
            optimizer.zero_grad()
            if step:
                spent += time.perf_counter() - begun
                computed += time.process_time() - busy
                tokens += sum(len(row.input_ids) for row in rows)
    speed = tokens / spent
    if plan.data.stream is None:
        seconds = plan.data.facts["tokens"] / speed
    else:
        seconds = spent / (PROBED - 1) * plan.schedule.steps
    return TimeForecast(seconds, speed, f"{PROBED - 1} steps here", tokens / max(computed, 1e-9))


def _rows_of(plan: Plan, step: int, size: int) -> list[Any]:
    """Return the rows of a step, spread over the data."""
    rows = plan.data.train
    apart = max(1, len(rows) // (PROBED * size))
    return [rows[(step + PROBED * at) * apart % len(rows)] for at in range(min(size, len(rows)))]


def steps_per_epoch(config: TrainConfig, plan: Plan) -> int:
    """Return the optimizer steps of an epoch, or of the run where rows are streamed."""
    if plan.data.stream is not None:
        return plan.schedule.steps
    return steps_an_epoch(config.train, len(plan.data.train))
