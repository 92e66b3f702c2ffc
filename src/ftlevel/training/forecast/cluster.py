"""A run on many cards: what each sends, how long a step takes, how much of it is waiting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.data.encoding.store import lengths_of
from ftlevel.training.forecast.cards import Card
from ftlevel.training.forecast.need import Need
from ftlevel.training.forecast.network import Network, StepTime, Work, time_step
from ftlevel.training.forecast.seconds import SHARE, TimeForecast, count_operations
from ftlevel.training.forecast.shares import Shares
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.schedule import steps_an_epoch


@dataclass(frozen=True)
class ClusterForecast:
    """A run on many cards.

    Attributes:
        network: its machines.
        step: the time of an optimizer step, and what is sent in it.
        micro_batches: of a step, on each card.
        tokens: of a step, on all cards.
        steps: of an epoch; None where rows are imagined.
    """

    network: Network
    step: StepTime
    micro_batches: int
    tokens: float
    steps: int | None

    @property
    def tokens_per_s(self) -> float:
        """Of all cards."""
        return self.tokens / self.step.seconds

    @property
    def seconds_per_epoch(self) -> float | None:
        """Of its steps alone."""
        return None if self.steps is None else self.steps * self.step.seconds

    def time(self) -> TimeForecast | None:
        """Return the time of an epoch; None where rows are imagined."""
        if self.seconds_per_epoch is None:
            return None
        how = f"a roofline and rings on {self.network.ranks:,} cards, not measured"
        return TimeForecast(self.seconds_per_epoch, self.tokens_per_s, how)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        step, ranks = self.step, self.network.ranks
        return {
            "nodes": self.network.nodes,
            "gpus_per_node": self.network.cards,
            "interconnect_gbps": self.network.gbps,
            "micro_batches_per_step": self.micro_batches,
            "sent_bytes_per_step": round(step.gathered + step.reduced),
            "gathered_bytes_per_step": round(step.gathered),
            "reduced_bytes_per_step": round(step.reduced),
            "seconds_per_step": step.seconds,
            "computing_s": step.computing,
            "communicating_s": step.talking,
            "waiting_s": step.waiting,
            "hidden": step.hidden,
            "tokens_per_s": self.tokens_per_s,
            "tokens_per_s_per_gpu": self.tokens_per_s / ranks,
            "steps_per_epoch": self.steps,
            "seconds_per_epoch": self.seconds_per_epoch,
        }


def forecast_cluster(
    config: TrainConfig, plan: Plan, need: Need, shares: Shares, card: Card, network: Network
) -> ClusterForecast:
    """Return how the run that `plan` is goes on `network`.

    Args:
        config: the whole configuration.
        plan: its plan.
        need: what each card needs: says how large a micro-batch is, and whether it recomputes.
        shares: how the model is shared out.
        card: each of them, of known speed.
        network: of them.
    """
    train, rows = config.train, plan.data.train
    a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    tokens = a_step * float(lengths_of(rows).mean())
    micro_batches = max(math.ceil(tokens / need.tokens), 1)
    recomputes = train.recomputes or need.recomputed_peak is not None
    operations = count_operations(config, plan, recomputes=recomputes)
    second = SHARE * card.tflops * 1e12 / (tokens / micro_batches)
    work = Work(
        micro_batches, shares.count, operations.blocks / shares.count / second,
        operations.backward / shares.count / second, operations.outside / second,
        **_sent(shares, network.ranks, train.shard),
    )  # fmt: skip
    several = train.model_copy(update={"num_processes": network.ranks})
    imagined = plan.data.table.source == "imagined rows"
    steps = None if imagined else steps_an_epoch(several, len(rows))
    if plan.data.stream is not None:
        steps = plan.schedule.steps
    step = time_step(work, network)
    return ClusterForecast(network, step, micro_batches, tokens * network.ranks, steps)


def _sent(shares: Shares, ranks: int, way: str) -> dict[str, Any]:
    """Return what of `Work` is sent, in bytes."""
    if way == "none":
        base = shares.blocks.reduced(1) + shares.root.reduced(1)
        return {"everywhere": base if shares.trains_base else shares.trained}
    block, root = shares.blocks.gathered(ranks) / shares.count, shares.root.gathered(ranks)
    sent = {"block": block, "root": root, "again": way == "full"}
    if shares.trains_base:
        reduced = shares.blocks.reduced(ranks) / shares.count
        return {**sent, "reduced": reduced, "reduced_root": shares.root.reduced(ranks)}
    return {**sent, "everywhere": shares.trained}
