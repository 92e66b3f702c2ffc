"""Compare the planned speed of many GPUs with published runs.

    python benchmarks/plan_cluster.py

Each row is a run of data parallel or FSDP training in bfloat16 whose tokens a second and card its
authors print. The time is that of `ftlevel.extras.cluster.forecast`, from the model's shape, the
rows of a micro-batch and the cards. How much of a card's peak a program reaches is its own, and the
one constant that is fitted: for each source, card and kind of checkpointing the geometric mean
over the rows of the fewest machines, which is one machine but for torchtitan's A100s. All other
rows check what more cards cost. The second ratio is that of the plan's own share, 40 %, for which
nothing is fitted.

Weights are gathered in bfloat16 and gradients reduced in float32, or in bfloat16 where the source
says so. Where it does not say what the machines are connected by, `assumed` stands in the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ftlevel.extras.cluster.forecast import Network, StepLoad, StepTime, time_step
from ftlevel.training.forecast.seconds import GPUS, PEAK_FRACTION

TITAN = "torchtitan"
FOUNDRY = "llm-foundry"
KEMPNER = "KempnerForge"
SOURCES = {
    TITAN: "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md",
    f"{TITAN} of July 2024": "github.com/pytorch/torchtitan, docs/performance.md of 2024",
    FOUNDRY: "github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md",
    KEMPNER: "github.com/KempnerInstitute/KempnerForge, "
    "benchmarks/mfu_scaling/mfu_scaling_2026-04-05.md",
}
WITHIN = 0.15


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json has it."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool = True
    tied: bool = False

    @property
    def block(self) -> int:
        """Weights of a block."""
        attention = 2 * self.width**2 * (1 + self.kv_heads / self.heads)
        return round(attention + (2 + self.gated) * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.width

    @property
    def outside(self) -> int:
        """Weights of embeddings and head."""
        return self.head * (1 if self.tied else 2)


def mpt(layers: int, width: int, heads: int) -> Shape:
    """Return an MPT: no gate, as many heads for keys, one matrix for embeddings and head."""
    return Shape(layers, width, 4 * width, heads, heads, 50368, gated=False, tied=True)


SHAPES = {
    "Llama-3 8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama-3 13B": Shape(40, 5120, 17920, 40, 8, 128256),
    "Llama-3 70B": Shape(80, 8192, 28672, 64, 8, 128256),
    "MPT 1B": mpt(24, 2048, 16),
    "MPT 3B": mpt(32, 2560, 20),
    "MPT 7B": mpt(32, 4096, 32),
    "MPT 13B": mpt(40, 5120, 40),
    "MPT 30B": mpt(48, 7168, 56),
    "MPT 70B": mpt(80, 8192, 64),
}


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
        source: a key of `SOURCES`.
        card: a key of `GPUS`.
        model: a key of `SHAPES`.
        cards: of all machines.
        rows: of a micro-batch on a card.
        length: of a row.
        recomputed: share of the forward pass that is computed again.
        published: tokens a second and card.
        gbps: of each card, to other machines.
        assumed: whether the source does not say that.
        a_machine: cards of it.
        reduced: bytes of a gradient that is reduced.
        micro_batches: of a step, in each of which FSDP gathers and reduces.
    """

    source: str
    card: str
    model: str
    cards: int
    rows: int
    length: int
    recomputed: float
    published: float
    gbps: float = 400
    assumed: bool = False
    a_machine: int = 8
    reduced: int = 4
    micro_batches: int = 1

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.cards // self.a_machine)

    @property
    def setup(self) -> tuple[str, str, float]:
        """What has one share of the peak."""
        return self.source, self.card, self.recomputed


def foundry(model: str, cards: int, rows: int, many: int, published: float, *, again: bool = False,
            card: str = "h100", length: int = 2048) -> Run:  # fmt: skip
    """Return a run of llm-foundry: it names the network of the A100s, and not that of the H100s."""
    old = card != "h100"
    return Run(
        FOUNDRY, card, f"MPT {model}", cards, rows, length, float(again), published,
        gbps=200 if old else 400, assumed=not old, reduced=2 if old else 4, micro_batches=many,
    )  # fmt: skip


RUNS = (
    # torchtitan: selective checkpointing computes every second product again; 500 W cards.
    Run(f"{TITAN}, eager", "h100", "Llama-3 8B", 8, 2, 8192, 0.5, 5762),
    Run(f"{TITAN}, eager", "h100", "Llama-3 8B", 128, 2, 8192, 0.5, 5605),
    Run(f"{TITAN}, compiled", "h100", "Llama-3 8B", 8, 2, 8192, 0.5, 6667),
    Run(f"{TITAN}, compiled", "h100", "Llama-3 8B", 128, 2, 8192, 0.5, 6514),
    Run(f"{TITAN} of July 2024", "a100", "Llama-3 8B", 64, 1, 8192, 0.5, 2973, 200, assumed=True),
    Run(f"{TITAN} of July 2024", "a100", "Llama-3 70B", 64, 1, 8192, 1, 331, 200, assumed=True),
    # KempnerForge: machines of four cards.
    Run(KEMPNER, "h200", "Llama-3 8B", 1, 4, 4096, 1, 10471, a_machine=4, micro_batches=2),
    Run(KEMPNER, "h200", "Llama-3 8B", 2, 4, 4096, 1, 9364, a_machine=4, micro_batches=2),
    Run(KEMPNER, "h200", "Llama-3 8B", 4, 4, 4096, 1, 9746, a_machine=4, micro_batches=2),
    Run(KEMPNER, "h200", "Llama-3 13B", 8, 4, 4096, 1, 4426, assumed=True, a_machine=4,
        micro_batches=4),
    # llm-foundry on H100.
    foundry("1B", 8, 14, 1, 45455), foundry("1B", 16, 20, 1, 46037),
    foundry("1B", 32, 20, 1, 45130), foundry("1B", 64, 20, 1, 44402),
    foundry("3B", 16, 10, 3, 24142), foundry("3B", 32, 6, 3, 23021),
    foundry("3B", 64, 6, 3, 22525), foundry("7B", 8, 6, 1, 10643),
    foundry("13B", 8, 2, 1, 4792), foundry("13B", 16, 2, 1, 4767),
    foundry("13B", 32, 2, 1, 4811), foundry("13B", 64, 2, 1, 4800),
    foundry("30B", 8, 3, 21, 2002, again=True), foundry("30B", 16, 10, 3, 2263, again=True),
    foundry("30B", 32, 14, 3, 2308, again=True), foundry("70B", 32, 2, 16, 882, again=True),
    foundry("70B", 64, 8, 4, 1039, again=True),
    # llm-foundry on A100 of 40 GB.
    foundry("1B", 8, 8, 8, 19271, card="a100-40gb"),
    foundry("1B", 16, 8, 1, 19085, card="a100-40gb"),
    foundry("1B", 32, 10, 1, 15555, card="a100-40gb"),
    foundry("1B", 64, 10, 1, 19001, card="a100-40gb"),
    foundry("1B", 128, 10, 1, 18647, card="a100-40gb"),
    foundry("3B", 8, 5, 8, 10065, card="a100-40gb"),
    foundry("3B", 32, 6, 1, 9914, card="a100-40gb"),
    foundry("3B", 128, 6, 1, 9538, card="a100-40gb"),
    foundry("7B", 8, 12, 4, 3679, again=True, card="a100-40gb"),
    foundry("7B", 32, 18, 1, 3725, again=True, card="a100-40gb"),
    foundry("7B", 128, 18, 1, 3623, again=True, card="a100-40gb"),
    foundry("13B", 8, 4, 16, 1668, again=True, card="a100-40gb"),
    foundry("13B", 32, 14, 1, 1998, again=True, card="a100-40gb"),
    foundry("13B", 128, 16, 1, 1972, again=True, card="a100-40gb"),
    foundry("30B", 32, 4, 1, 857, again=True, card="a100-40gb"),
    foundry("30B", 128, 6, 1, 865, again=True, card="a100-40gb"),
    foundry("70B", 64, 2, 1, 276, again=True, card="a100-40gb"),
    foundry("70B", 128, 4, 1, 376, again=True, card="a100-40gb"),
)  # fmt: skip
GIB_APART = {"eager": 82.4 - 67.0, "compiled": 77.0 - 62.0}
"""By how much less a card of 128 holds than one of 8, of torchtitan's Llama-3 8B."""


def time_of(run: Run, share: float) -> StepTime:
    """Return the time of a step of `run` where so much of the peak is reached."""
    shape, card = SHAPES[run.model], GPUS[run.card]
    tokens = run.rows * run.length
    attention = 2 * shape.width * run.length  # causal: half of what all pairs would take
    forward = (2 * shape.block + attention) * tokens
    second = share * card.tflops * 1e12
    alone = run.cards == 1
    work = StepLoad(
        run.micro_batches, shape.layers, forward / second, (2 + run.recomputed) * forward / second,
        6 * shape.head * tokens / second, block=0 if alone else 2 * shape.block,
        root=0 if alone else 2 * shape.outside, regather=True,
        reduced=0 if alone else run.reduced * shape.block,
        reduced_root=0 if alone else run.reduced * shape.outside,
    )  # fmt: skip
    return time_step(work, Network(run.nodes, min(run.cards, run.a_machine), card.link, run.gbps))


def predict(run: Run, share: float) -> float:
    """Return tokens a second and card."""
    return run.micro_batches * run.rows * run.length / time_of(run, share).seconds


def fit(runs: list[Run]) -> tuple[float, list[Run]]:
    """Return the share that a setup reaches, and the runs by which it was fitted."""
    least = min(run.nodes for run in runs)
    by = [run for run in runs if run.nodes == least]
    shares = []
    for run in by:
        low, high = 0.05, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if predict(run, middle) < run.published else (low, middle)
        shares.append(math.log(low))
    return math.exp(sum(shares) / len(shares)), by


def rows() -> Iterator[tuple[Run, bool, float, float]]:
    """Yield each run, whether it was fitted to, and what is predicted by both shares."""
    for setup in dict.fromkeys(run.setup for run in RUNS):
        some = [run for run in RUNS if run.setup == setup]
        share, by = fit(some)
        for run in some:
            yield run, run in by, share, predict(run, share)


def main() -> None:
    """Print the table and what it comes to."""
    print("| source | card | model | cards | rows × length | published | share | predicted | "
          "ratio | by 40 % | hidden |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    checks, plain = [], []
    for run, fitted, share, found in rows():
        ratio, own = found / run.published, predict(run, PEAK_FRACTION) / run.published
        plain.append(own)
        if not fitted:
            checks.append(ratio)
        many = f" × {run.micro_batches}" if run.micro_batches > 1 else ""
        again, word = " (again)" if run.recomputed == 1 else "", " fitted" if fitted else ""
        print(f"| {run.source} | {run.card} | {run.model}{again} | {run.cards} | {run.rows} × "
              f"{run.length:,}{many} | {run.published:,.0f} | {share:.2f}{word} | {found:,.0f} | "
              f"{ratio:.2f} | {own:.2f} | {time_of(run, share).hidden:.0%} |")  # fmt: skip
    for name, ratios in (("checks", checks), ("all rows by the plan's own 40 %", plain)):
        near = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
        print(f"{name}: {near} of {len(ratios)} within ±15 %, {min(ratios):.2f} to "
              f"{max(ratios):.2f}")  # fmt: skip
    shape, state = SHAPES["Llama-3 8B"], 16  # weights, gradients and AdamW's states in float32
    weights = shape.layers * shape.block + shape.outside
    apart = state * weights * (1 / 8 - 1 / 128) / 2**30
    for how, gib in GIB_APART.items():
        print(f"memory, {TITAN} {how}, Llama-3 8B, 8 → 128 cards: {gib:.1f} GiB less published, "
              f"{apart:.1f} predicted, ratio {apart / gib:.2f}")  # fmt: skip
    for source, place in SOURCES.items():
        print(f"{source}: {place}")


if __name__ == "__main__":
    main()
