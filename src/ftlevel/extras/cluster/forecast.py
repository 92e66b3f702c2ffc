"""Step time of a run on several GPUs: collectives, overlap and throughput.

    bytes     S · (n − 1) / n per GPU for an all-gather or reduce-scatter of S bytes over n GPUs;
              twice that for an all-reduce (nccl-tests, doc/PERFORMANCE.md)
    seconds   bytes / min(link, GPUs per machine · network per GPU)
              + (n − N) · 3.4 µs + (N − 1) · 9.6 µs, for N machines
    step      micro-batches · (g + Σ max(forward, g) + outside + Σ max(backward, g + r) + r)
              + all-reduce

NCCL is assumed to build as many rings as a machine has network cards; the hop latencies are NCCL's
own (ring, simple protocol: src/graph/tuning.cc). g gathers a block while the previous one computes,
r reduces the gradients of the following one. Overlap is assumed not to slow computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ftlevel.cli.preview import format_size
from ftlevel.commands.plan import PlanOptions
from ftlevel.data.encoding.store import row_lengths
from ftlevel.training.forecast.fits import MemoryRequirement
from ftlevel.training.forecast.meta_model import SYNTHETIC_ROWS
from ftlevel.training.forecast.seconds import PEAK_FRACTION, Gpu, TimeForecast, get_operations
from ftlevel.training.forecast.shares import ShardedModel, get_sharded_model
from ftlevel.training.plan.run import Run
from ftlevel.training.plan.schedule import count_steps_per_epoch

HOP, NETWORK_HOP = 3.4e-6, 9.6e-6
"""Seconds from one GPU to the next on the same machine, and on a different machine."""


@dataclass(frozen=True)
class Network:
    """GPUs of a run: `nodes` machines with `cards` GPUs each, and their connections.

    `link` is GB/s (10⁹ bytes) each way between GPUs of a machine; `gbps` is Gbit/s (10⁹ bits) each
    way per GPU to other machines.
    """

    nodes: int
    cards: int
    link: float
    gbps: float

    @property
    def ranks(self) -> int:
        """Total number of GPUs."""
        return self.nodes * self.cards

    def sent(self, size: float) -> float:
        """Returns the bytes that each GPU sends to all-gather tensors of `size` bytes in total."""
        return size * (self.ranks - 1) / self.ranks

    def seconds(self, size: float) -> float:
        """Returns the seconds of an all-gather or reduce-scatter of `size` bytes in total."""
        if self.ranks == 1 or not size:
            return 0.0
        bandwidth = self.link
        if self.nodes > 1:
            network_bandwidth = self.cards * self.gbps / 8
            bandwidth = network_bandwidth if self.cards == 1 else min(bandwidth, network_bandwidth)
        hops = (self.ranks - self.nodes) * HOP + (self.nodes - 1) * NETWORK_HOP
        return self.sent(size) / (bandwidth * 1e9) + hops


@dataclass(frozen=True)
class StepLoad:
    """What one GPU must compute and communicate in an optimizer step.

    Attributes:
        backward: seconds per block, including recomputation.
        outside: seconds per micro-batch outside the blocks (embeddings, head), both passes.
        block: weight bytes gathered per block; 0 where each GPU has the whole model.
        root: weight bytes gathered outside the blocks, once per micro-batch.
        regather: whether blocks are gathered again for the backward pass.
        reduced: gradient bytes reduce-scattered per block in every micro-batch.
        reduced_root: gradient bytes outside the blocks reduce-scattered in every micro-batch.
        everywhere: gradient bytes all-reduced over all GPUs at the end of the step.
    """

    micro_batches: int
    blocks: int
    forward: float
    backward: float
    outside: float
    block: float = 0.0
    root: float = 0.0
    regather: bool = False
    reduced: float = 0.0
    reduced_root: float = 0.0
    everywhere: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Time and traffic of one optimizer step.

    Attributes:
        computing: seconds of computation, without waiting.
        talking: seconds of communication, whether computation overlaps it or not.
        waiting: seconds of communication without overlapping computation.
        gathered: bytes each GPU sends to gather weights.
        reduced: bytes each GPU sends to reduce gradients.
    """

    computing: float
    talking: float
    waiting: float
    gathered: float
    reduced: float

    @property
    def seconds(self) -> float:
        """Duration of the step in seconds."""
        return self.computing + self.waiting

    @property
    def hidden(self) -> float:
        """Fraction of the communication time that computation overlaps."""
        return 1 - self.waiting / self.talking if self.talking else 1.0


def time_step(load: StepLoad, network: Network) -> StepTime:
    """Estimate time and traffic of an optimizer step in which each GPU of `network` has `load`."""
    count, many = load.blocks, load.micro_batches
    gather, root = network.seconds(load.block), network.seconds(load.root)
    reduce, reduce_root = network.seconds(load.reduced), network.seconds(load.reduced_root)
    behind = (gather if load.regather else 0.0) + reduce
    waits = root + gather + (count - 1) * max(0.0, gather - load.forward)
    waits += behind + reduce_root
    waits += (count - 1) * max(0.0, behind - load.backward)
    talks = root + reduce_root + count * (gather + behind)
    once = 2 * network.seconds(load.everywhere)
    times = 2 if load.regather else 1
    return StepTime(
        computing=many * (count * (load.forward + load.backward) + load.outside),
        talking=many * talks + once,
        waiting=many * waits + once,
        gathered=many * network.sent(times * count * load.block + load.root),
        reduced=many * network.sent(count * load.reduced + load.reduced_root)
        + 2 * network.sent(load.everywhere),
    )


@dataclass(frozen=True)
class ClusterForecast:
    """Estimate for several GPUs. `tokens`: per step, over all GPUs; `steps`: per epoch, or None."""

    network: Network
    step: StepTime
    micro_batches: int
    tokens: float
    steps: int | None

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all GPUs together."""
        return self.tokens / self.step.seconds

    @property
    def seconds_per_epoch(self) -> float | None:
        """Seconds of all steps of an epoch, without evaluation; None if `steps` is unknown."""
        return None if self.steps is None else self.steps * self.step.seconds

    def time(self) -> TimeForecast | None:
        """Returns the estimated time of an epoch; None if the number of steps is unknown."""
        seconds = self.seconds_per_epoch
        how = f"a roofline and rings on {self.network.ranks:,} GPUs, not measured"
        return None if seconds is None else TimeForecast(seconds, self.tokens_per_s, how)

    def lines(self) -> Iterator[str]:
        """Yields the estimate as lines of text for the terminal."""
        network, step = self.network, self.step
        yield (
            f"on {network.nodes:,} × {network.cards} GPUs, a step takes "
            f"{step.seconds:,.3g} s for {self.tokens:,.0f} tokens, {self.tokens_per_s:,.0f} "
            f"tokens/s, {self.tokens_per_s / network.ranks:,.0f} per GPU"
        )
        yield (
            f"  each GPU sends {format_size(step.gathered)} of weights and "
            f"{format_size(step.reduced)} of gradients per step: {step.talking:,.3g} s of "
            f"communication, {step.hidden:.0%} of it overlapped with {step.computing:,.3g} s of "
            "computation"
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the values for `--json`."""
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
    run: Run, need: MemoryRequirement, gpu: Gpu, options: PlanOptions
) -> ClusterForecast:
    """Estimate step time, traffic and throughput of `run` on the machines of `options`.

    `need` is the memory estimate, which sets micro-batch size and recomputation. The speed of
    `gpu` must be known.
    """
    network = Network(options.nodes, options.gpus_per_node, gpu.link, options.interconnect_gbps)
    sharded = get_sharded_model(run)
    train, rows = run.config.train, run.data.train
    tokens = train.rows_per_device_step * float(row_lengths(rows).mean())
    micro_batches = max(math.ceil(tokens / need.tokens), 1)
    recomputes = train.recomputes or need.recomputed_peak is not None
    operations = get_operations(run, recomputes=recomputes)
    second = PEAK_FRACTION * gpu.tflops * 1e12 / (tokens / micro_batches)
    load = StepLoad(
        micro_batches,
        sharded.count,
        operations.blocks / sharded.count / second,
        operations.backward / sharded.count / second,
        operations.head_total / second,
        **_sent(sharded, network.ranks, train.shard),
    )
    train_config = train.model_copy(update={"num_processes": network.ranks})
    is_synthetic = run.data.table.source == SYNTHETIC_ROWS
    steps = None if is_synthetic else count_steps_per_epoch(train_config, len(rows))
    if run.data.stream is not None:
        steps = run.schedule.steps
    step = time_step(load, network)
    return ClusterForecast(network, step, micro_batches, tokens * network.ranks, steps)


def _sent(sharded: ShardedModel, ranks: int, shard: str) -> dict[str, Any]:
    """Returns the communication fields of `StepLoad`; `shard` is the value of `--shard`."""
    if shard == "none":
        base = sharded.blocks.reduced_bytes(1) + sharded.root.reduced_bytes(1)
        return {"everywhere": base if sharded.trains_base else sharded.trained}
    block = sharded.blocks.gathered_bytes(ranks) / sharded.count
    sent = {"block": block, "root": sharded.root.gathered_bytes(ranks), "regather": shard == "full"}
    if sharded.trains_base:
        reduced = sharded.blocks.reduced_bytes(ranks) / sharded.count
        return {**sent, "reduced": reduced, "reduced_root": sharded.root.reduced_bytes(ranks)}
    return {**sent, "everywhere": sharded.trained}
