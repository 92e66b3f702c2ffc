"""Cards on a network: how long it takes to gather, and a step of many cards, block by block.

    bytes     S · (n − 1) / n a card to gather S bytes, or to add them up and share out the sum;
              twice that to add them up everywhere (nccl-tests, doc/PERFORMANCE.md)
    seconds   bytes / min(link, cards of a machine · its network a card)
              + (n − N) · 3.4 µs + (N − 1) · 9.6 µs

NCCL lays as many rings as a machine has network cards over n cards of N machines: each card sends
by its link within the machine, and all network cards carry what leaves it. The times of a hop are
those that NCCL itself reckons with (ring, simple: src/graph/tuning.cc). A step is

    micro-batches · (g + Σ max(forward, g) + outside + Σ max(backward, g + r) + r) + all-reduce

where g gathers a block while the one before it computes, and r reduces the gradients of the block
behind: first and last wait for nobody. What overlaps is taken to cost the computing nothing.

A run on many cards: what each sends, how long a step takes, how much of it is waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.data.encoding.store import lengths_of
from ftlevel.training.forecast.fits import Need
from ftlevel.training.forecast.seconds import SHARE, Card, TimeForecast, count_operations
from ftlevel.training.forecast.shares import Shares
from ftlevel.training.plan.plan import Plan
from ftlevel.training.plan.schedule import steps_an_epoch

HOP, NETWORK_HOP = 3.4e-6, 9.6e-6
"""Seconds from a card to the next one of its machine, and to one of another machine."""


@dataclass(frozen=True)
class Network:
    """Machines with cards.

    Attributes:
        nodes: machines.
        cards: of each.
        link: 10⁹ bytes a second, each way, from a card to the others of its machine.
        gbps: 10⁹ bits a second, each way, that a card has to other machines.
    """

    nodes: int
    cards: int
    link: float
    gbps: float

    @property
    def ranks(self) -> int:
        """All cards."""
        return self.nodes * self.cards

    def sent(self, size: float) -> float:
        """Return the bytes that a card sends for `size` of them to be gathered."""
        return size * (self.ranks - 1) / self.ranks

    def seconds(self, size: float) -> float:
        """Return how long it takes to gather `size` bytes, or to add them up and share them out."""
        if self.ranks == 1 or not size:
            return 0.0
        speed = self.link
        if self.nodes > 1:
            beyond = self.cards * self.gbps / 8
            speed = beyond if self.cards == 1 else min(speed, beyond)
        hops = (self.ranks - self.nodes) * HOP + (self.nodes - 1) * NETWORK_HOP
        return self.sent(size) / (speed * 1e9) + hops


@dataclass(frozen=True)
class Work:
    """What a card does in a step.

    Attributes:
        micro_batches: of a step.
        blocks: of the model.
        forward: seconds of a block.
        backward: seconds of a block, with what it recomputes.
        outside: seconds of all else of a micro-batch, both ways.
        block: bytes of a block that are gathered; 0 where each card has the whole model.
        root: bytes of what is outside of blocks, likewise, once a micro-batch.
        again: whether blocks are gathered for the backward pass once more.
        reduced: bytes of the gradients of a block that are added up in every micro-batch.
        reduced_root: those of what is outside of blocks.
        everywhere: bytes of gradients that are added up for every card, once a step.
    """

    micro_batches: int
    blocks: int
    forward: float
    backward: float
    outside: float
    block: float = 0.0
    root: float = 0.0
    again: bool = False
    reduced: float = 0.0
    reduced_root: float = 0.0
    everywhere: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """A step.

    Attributes:
        computing: seconds, if nothing had to be waited for.
        talking: seconds on the wire, hidden or not.
        waiting: seconds of these in which nothing is computed.
        gathered: bytes that a card sends so that weights are gathered.
        reduced: bytes that it sends so that gradients are added up.
    """

    computing: float
    talking: float
    waiting: float
    gathered: float
    reduced: float

    @property
    def seconds(self) -> float:
        """How long the step takes."""
        return self.computing + self.waiting

    @property
    def hidden(self) -> float:
        """The share of the time on the wire that is hidden behind computing."""
        return 1 - self.waiting / self.talking if self.talking else 1.0


def time_step(work: Work, network: Network) -> StepTime:
    """Return how long a step of `work` takes each card of `network`."""
    count, many = work.blocks, work.micro_batches
    gather, root = network.seconds(work.block), network.seconds(work.root)
    reduce, reduce_root = network.seconds(work.reduced), network.seconds(work.reduced_root)
    behind = (gather if work.again else 0.0) + reduce
    waits = root + gather + (count - 1) * max(0.0, gather - work.forward)
    waits += (gather if work.again else 0.0) + reduce + reduce_root
    waits += (count - 1) * max(0.0, behind - work.backward)
    talks = root + reduce_root + count * (gather + behind)
    once = 2 * network.seconds(work.everywhere)
    times = 2 if work.again else 1
    return StepTime(
        computing=many * (count * (work.forward + work.backward) + work.outside),
        talking=many * talks + once,
        waiting=many * waits + once,
        gathered=many * network.sent(times * count * work.block + work.root),
        reduced=many * network.sent(count * work.reduced + work.reduced_root)
        + 2 * network.sent(work.everywhere),
    )


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
