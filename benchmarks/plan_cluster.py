"""Compare the planned speed of many GPUs with published runs.

    python benchmarks/plan_cluster.py

Each row is a run of data parallel or FSDP training in bfloat16 with published tokens per second and
GPU. `ftlevel.extras.cluster.forecast` estimates the time from the model's shape, the rows of a
micro-batch and the GPUs. One constant is fitted, the share of a GPU's peak that a program reaches:
for each source, GPU and kind of checkpointing, the geometric mean over the rows with the fewest
machines (one machine, except for torchtitan's A100s). All other rows check the cost of more GPUs.
The second ratio uses the plan's share, 40 %, without a fit.

Weights are gathered in bfloat16 and gradients reduced in float32, or in bfloat16 where the source
says so. `assumed` marks rows whose source does not state the network.
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
    """Sizes of a decoder, as in its config.json."""

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
    """Return the shape of an MPT: no gate, as many key heads as heads, tied embeddings."""
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
    """A published run: `published` tokens per second and GPU (`card`) with `cards` GPUs in all.

    A micro-batch has `rows` of `length` tokens per GPU; `recomputed` is the share of the forward
    pass that is recomputed. `gbps` is the network bandwidth of each GPU, `assumed` if the source
    does not state it; `a_machine` the GPUs per machine, `reduced` the bytes of a reduced gradient.
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
        """Number of machines."""
        return -(-self.cards // self.a_machine)

    @property
    def setup(self) -> tuple[str, str, float]:
        """Key of the runs that share one fitted share of the peak."""
        return self.source, self.card, self.recomputed


def foundry(model: str, cards: int, rows: int, micro_batches: int, published: float, *,
            recomputed: bool = False, card: str = "h100", length: int = 2048) -> Run:  # fmt: skip
    """Return a run of llm-foundry, which states the network of the A100s but not of the H100s."""
    old = card != "h100"
    return Run(
        FOUNDRY, card, f"MPT {model}", cards, rows, length, float(recomputed), published,
        gbps=200 if old else 400, assumed=not old, reduced=2 if old else 4,
        micro_batches=micro_batches,
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
    foundry("30B", 8, 3, 21, 2002, recomputed=True),
    foundry("30B", 16, 10, 3, 2263, recomputed=True),
    foundry("30B", 32, 14, 3, 2308, recomputed=True),
    foundry("70B", 32, 2, 16, 882, recomputed=True),
    foundry("70B", 64, 8, 4, 1039, recomputed=True),
    # llm-foundry on A100 of 40 GB.
    foundry("1B", 8, 8, 8, 19271, card="a100-40gb"),
    foundry("1B", 16, 8, 1, 19085, card="a100-40gb"),
    foundry("1B", 32, 10, 1, 15555, card="a100-40gb"),
    foundry("1B", 64, 10, 1, 19001, card="a100-40gb"),
    foundry("1B", 128, 10, 1, 18647, card="a100-40gb"),
    foundry("3B", 8, 5, 8, 10065, card="a100-40gb"),
    foundry("3B", 32, 6, 1, 9914, card="a100-40gb"),
    foundry("3B", 128, 6, 1, 9538, card="a100-40gb"),
    foundry("7B", 8, 12, 4, 3679, recomputed=True, card="a100-40gb"),
    foundry("7B", 32, 18, 1, 3725, recomputed=True, card="a100-40gb"),
    foundry("7B", 128, 18, 1, 3623, recomputed=True, card="a100-40gb"),
    foundry("13B", 8, 4, 16, 1668, recomputed=True, card="a100-40gb"),
    foundry("13B", 32, 14, 1, 1998, recomputed=True, card="a100-40gb"),
    foundry("13B", 128, 16, 1, 1972, recomputed=True, card="a100-40gb"),
    foundry("30B", 32, 4, 1, 857, recomputed=True, card="a100-40gb"),
    foundry("30B", 128, 6, 1, 865, recomputed=True, card="a100-40gb"),
    foundry("70B", 64, 2, 1, 276, recomputed=True, card="a100-40gb"),
    foundry("70B", 128, 4, 1, 376, recomputed=True, card="a100-40gb"),
)  # fmt: skip
GIB_SAVED = {"eager": 82.4 - 67.0, "compiled": 77.0 - 62.0}
"""GiB per GPU that torchtitan's Llama-3 8B uses less on 128 than on 8 GPUs."""


def estimate_step(run: Run, share: float) -> StepTime:
    """Return the time of a step of `run` that reaches `share` of the peak."""
    shape, card = SHAPES[run.model], GPUS[run.card]
    tokens = run.rows * run.length
    attention = 2 * shape.width * run.length  # causal: half of all pairs
    forward = (2 * shape.block + attention) * tokens
    flops = share * card.tflops * 1e12
    is_single = run.cards == 1
    load = StepLoad(
        run.micro_batches, shape.layers, forward / flops, (2 + run.recomputed) * forward / flops,
        6 * shape.head * tokens / flops, block=0 if is_single else 2 * shape.block,
        root=0 if is_single else 2 * shape.outside, regather=True,
        reduced=0 if is_single else run.reduced * shape.block,
        reduced_root=0 if is_single else run.reduced * shape.outside,
    )  # fmt: skip
    return time_step(load, Network(run.nodes, min(run.cards, run.a_machine), card.link, run.gbps))


def predict(run: Run, share: float) -> float:
    """Return tokens per second and GPU."""
    return run.micro_batches * run.rows * run.length / estimate_step(run, share).seconds


def fit(runs: list[Run]) -> tuple[float, list[Run]]:
    """Return the share of the peak that a setup reaches, and the runs used for the fit."""
    fewest = min(run.nodes for run in runs)
    fit_runs = [run for run in runs if run.nodes == fewest]
    shares = []
    for run in fit_runs:
        low, high = 0.05, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if predict(run, middle) < run.published else (low, middle)
        shares.append(math.log(low))
    return math.exp(sum(shares) / len(shares)), fit_runs


def rows() -> Iterator[tuple[Run, bool, float, float]]:
    """Yield each run, whether it was used for the fit, its share and its predicted speed."""
    for setup in dict.fromkeys(run.setup for run in RUNS):
        setup_runs = [run for run in RUNS if run.setup == setup]
        share, fit_runs = fit(setup_runs)
        for run in setup_runs:
            yield run, run in fit_runs, share, predict(run, share)


def main() -> None:
    """Print the table and a summary."""
    print("| source | card | model | cards | rows × length | published | share | predicted | "
          "ratio | by 40 % | hidden |\n|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    checks, plain = [], []
    for run, fitted, share, predicted in rows():
        ratio, plan_ratio = predicted / run.published, predict(run, PEAK_FRACTION) / run.published
        plain.append(plan_ratio)
        if not fitted:
            checks.append(ratio)
        count = f" × {run.micro_batches}" if run.micro_batches > 1 else ""
        note, mark = " (again)" if run.recomputed == 1 else "", " fitted" if fitted else ""
        print(f"| {run.source} | {run.card} | {run.model}{note} | {run.cards} | {run.rows} × "
              f"{run.length:,}{count} | {run.published:,.0f} | {share:.2f}{mark} | "
              f"{predicted:,.0f} | {ratio:.2f} | {plan_ratio:.2f} | "
              f"{estimate_step(run, share).hidden:.0%} |")  # fmt: skip
    for name, ratios in (("checks", checks), ("all rows by the plan's own 40 %", plain)):
        within = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
        print(f"{name}: {within} of {len(ratios)} within ±15 %, {min(ratios):.2f} to "
              f"{max(ratios):.2f}")  # fmt: skip
    shape, state = SHAPES["Llama-3 8B"], 16  # weights, gradients and AdamW's states in float32
    weights = shape.layers * shape.block + shape.outside
    predicted_gib = state * weights * (1 / 8 - 1 / 128) / 2**30
    for mode, gib in GIB_SAVED.items():
        print(f"memory, {TITAN} {mode}, Llama-3 8B, 8 → 128 cards: {gib:.1f} GiB less published, "
              f"{predicted_gib:.1f} predicted, ratio {predicted_gib / gib:.2f}")  # fmt: skip
    for source, url in SOURCES.items():
        print(f"{source}: {url}")


if __name__ == "__main__":
    main()
