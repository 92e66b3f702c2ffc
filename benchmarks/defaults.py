"""Compare every method's default learning rate with the rates around it, and print the tables.

    python scripts/fetch_models.py
    python scripts/build_data.py wordnet-supersense factbook-ner factbook-qa wordnet-define \
        cldr-names
    python scripts/pretrain_tiny_t5.py runs/tiny-t5
    python benchmarks/defaults.py run --out runs/defaults.jsonl       # hours; goes on where it was
    python benchmarks/defaults.py table runs/defaults.jsonl

Rates are 1 and 3 times powers of ten. A method begins at one of them and goes up or down until the
best has a worse one on either side, so a table shows the peak and not the end of a grid. All runs
are in one process: what is compared is what a run learns, not how fast it starts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from two_classes import write_rows

from ftlevel import TrainConfig, train
from ftlevel.config import SPECS
from ftlevel.errors import RunError
from ftlevel.methods import METHODS
from ftlevel.methods.rates import RunFacts, choose_head_rate

_CLASSES, _TAGS, _SPAN = "text-classification", "token-classification", "question-answering"
_TEXT = "text-generation"


@dataclass(frozen=True)
class Model:
    """What is trained: a folder or a built-in one, its kind and the width of its hidden states."""

    name: str
    kind: str
    width: int


MINILM = Model(".models/all-MiniLM-L6-v2", "encoder", 384)
SMOLLM2 = Model(".models/SmolLM2-135M-Instruct", "decoder", 576)
TINY_LLAMA = Model("builtin:tiny-llama", "decoder", 192)
TINY_T5 = Model("runs/tiny-t5", "encoder-decoder", 128)


@dataclass(frozen=True)
class Workload:
    """A short run on a small model, the same for all methods but for the rate.

    Attributes:
        task: ftlevel's name.
        model: what is trained.
        data: the section of the configuration; its dataset is below --data.
        steps: optimizer steps of 8 rows.
        score: key of the metrics that decides; the loss where it is "loss".
        keep: which rows of the set are used; all where there is none.
        shift: how many grid steps above a method's first rate the search begins.
        warmup: share of the steps.
        one_rate: whether a new head learns at the rate of everything else.
    """

    task: str
    model: Model
    data: dict[str, Any]
    steps: int
    score: str
    keep: Callable[[dict[str, Any]], bool] | None = None
    shift: int = 0
    warmup: float = 0.0
    one_rate: bool = False

    @property
    def facts(self) -> RunFacts:
        """What is known before the run."""
        new_head = self.task in (_CLASSES, _TAGS, _SPAN)
        per_token = self.task == _TAGS
        return RunFacts(
            self.model.kind, self.model.width, new_head, self.steps, token_head=per_token
        )

    @property
    def head_rate(self) -> float | None:
        """The default rate of the new head; None where there is none, or it has no rate apart."""
        apart = self.facts.new_head and not self.one_rate
        return float(choose_head_rate(self.facts).value) if apart else None


_SUPERSENSE = {"dataset": "wordnet-supersense/train.jsonl", "validation_split": 0.5,
               "max_eval_samples": 500}  # fmt: skip
_NER = {"dataset": "factbook-ner", "max_eval_samples": 150}
_QA = {"dataset": "factbook-qa", "max_length": 192}
_DEFINE = {"dataset": "wordnet-define", "max_eval_samples": 64}
_NAMES = {"dataset": "cldr-names", "columns": {"source": "en", "target": "de"}}

WORKLOADS = {
    "classes": Workload(_CLASSES, MINILM, _SUPERSENSE, 100, "accuracy"),
    "tags": Workload(_TAGS, MINILM, _NER, 60, "f1", lambda row: len(row["tokens"]) <= 31),
    "span": Workload(_SPAN, MINILM, _QA, 100, "f1", lambda row: len(row["context"]) <= 280),
    "text": Workload(_TEXT, SMOLLM2, _DEFINE, 25, "loss", shift=-1),
    "tiny-llama": Workload(_TEXT, TINY_LLAMA, _DEFINE, 100, "loss"),
    "tiny-t5": Workload("translation", TINY_T5, _NAMES, 100, "loss"),
    # What else was tried.
    "one rate": Workload(_CLASSES, MINILM, _SUPERSENSE, 100, "accuracy", one_rate=True),
    "one rate, warm-up": Workload(
        _CLASSES, MINILM, _SUPERSENSE, 100, "accuracy", one_rate=True, warmup=0.1
    ),
    # Not fitted to: another length, another set, another width.
    "classes, 25 steps": Workload(_CLASSES, MINILM, _SUPERSENSE, 25, "accuracy", shift=1),
    "classes, 400 steps": Workload(_CLASSES, MINILM, _SUPERSENSE, 400, "accuracy", shift=-1),
    "two classes": Workload(_CLASSES, MINILM, {"dataset": "two classes"}, 100, "accuracy"),
    "tiny-llama, 30 steps": Workload(_TEXT, TINY_LLAMA, _DEFINE, 30, "loss"),
    "tiny-llama, 400 steps": Workload(_TEXT, TINY_LLAMA, _DEFINE, 400, "loss"),
    "tiny-t5, 400 steps": Workload("translation", TINY_T5, _NAMES, 400, "loss"),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A method as it is run.

    Attributes:
        spec: the section of the configuration.
        first: the rate with which the search begins, on the grid.
    """

    spec: dict[str, Any]
    first: float


ENTRIES = {
    "lora": Entry({"kind": "lora"}, 1e-3),
    "full": Entry({"kind": "full"}, 1e-4),
    "ia3": Entry({"kind": "ia3"}, 3e-2),
    "prefix": Entry({"kind": "prefix"}, 1e-1),
    "adapter": Entry({"kind": "adapter"}, 3e-3),
    "ln-tuning": Entry({"kind": "ln-tuning"}, 3e-3),
    "prompt": Entry({"kind": "prompt"}, 1e-1),
    "p-tuning": Entry({"kind": "p-tuning"}, 1e-2),
    "vera": Entry({"kind": "vera"}, 3e-2),
    "adalora": Entry({"kind": "adalora"}, 3e-3),
    "oft": Entry({"kind": "oft"}, 3e-3),
    "lokr": Entry({"kind": "lokr"}, 1e-2),
    "loha": Entry({"kind": "loha"}, 3e-3),
    "miss": Entry({"kind": "miss"}, 3e-3),
    "shira": Entry({"kind": "shira"}, 1e-2),
    "hira": Entry({"kind": "hira"}, 3e-2),
    "gralora": Entry({"kind": "gralora"}, 3e-3),
    "c3a": Entry({"kind": "c3a"}, 3e-1),
    "qlora": Entry({"kind": "qlora"}, 3e-3),
    "dora": Entry({"kind": "lora", "use_dora": True}, 3e-3),
    "rslora": Entry({"kind": "lora", "use_rslora": True}, 1e-3),
    "lora+": Entry({"kind": "lora", "lora_plus_ratio": 16}, 1e-3),
    "adapter, pfeiffer": Entry({"kind": "adapter", "placement": "pfeiffer"}, 3e-3),
    "adapter, parallel": Entry({"kind": "adapter", "placement": "parallel"}, 3e-3),
    "projected prefix": Entry({"kind": "prefix", "prefix_projection": True}, 3e-3),
    "linear-probe": Entry({"kind": "full", "freeze_base": True}, 3e-2),
    "boft": Entry({"kind": "boft"}, 3e-3),
    # Forms that have a method's own rate.
    "gaussian": Entry({"kind": "lora", "init_lora_weights": "gaussian"}, 1e-3),
    "orthogonal": Entry({"kind": "lora", "init_lora_weights": "orthogonal"}, 1e-3),
    "pissa": Entry({"kind": "lora", "init_lora_weights": "pissa"}, 1e-3),
    "olora": Entry({"kind": "lora", "init_lora_weights": "olora"}, 1e-3),
    "eva": Entry({"kind": "lora", "init_lora_weights": "eva"}, 1e-3),
    "adapter, seq_bn": Entry({"kind": "adapter", "placement": "seq_bn"}, 3e-3),
    "adapter, par_bn": Entry({"kind": "adapter", "placement": "par_bn"}, 1e-3),
    "adapter, adapter_plus": Entry({"kind": "adapter", "placement": "adapter_plus"}, 3e-3),
    "p-tuning, LSTM": Entry({"kind": "p-tuning", "encoder_reparameterization_type": "LSTM"}, 1e-2),
}
NO_NEW_HEAD = ("text", "tiny-llama", "tiny-t5")


def grid_rate(step: int) -> float:
    """Return the rate at a place of the grid: 0 is 1, −1 is 0.3, −2 is 0.1."""
    power, half = divmod(step, 2)
    return float(f"{(1, 3)[half]}e{power}")


def grid_step(rate: float) -> int:
    """Return the place of a rate on the grid, or of the nearest one on it."""
    return round(2 * math.log10(rate))


class Log:
    """The runs that were made, a JSON line each."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = {self._key(run): run for run in map(json.loads, lines)}

    @staticmethod
    def _key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["workload"], run["method"], f"{run['rate']:g}", run["seed"]

    def find(self, workload: str, method: str, rate: float, seed: int) -> dict[str, Any] | None:
        """Return a run that was made before."""
        return self.runs.get((workload, method, f"{rate:g}", seed))

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs[self._key(run)] = run
        with self.path.open("a") as file:
            file.write(json.dumps(run) + "\n")


def prepare_data(workload: Workload, name: str, folder: Path, work: Path) -> dict[str, Any]:
    """Return the section of the data, with a copy of the rows where only some are kept."""
    dataset = workload.data["dataset"]
    if dataset.startswith("builtin:"):
        return workload.data
    if dataset == "two classes":
        if not (work / name).exists():
            write_rows(work / name)
        return {**workload.data, "dataset": str(work / name)}
    if workload.keep is None:
        return {**workload.data, "dataset": str(folder / dataset)}
    kept = work / name
    if not kept.exists():
        kept.mkdir(parents=True)
        for part in ("train", "validation"):
            rows = (folder / dataset / f"{part}.jsonl").read_text().splitlines()
            kept_rows = [row for row in rows if workload.keep(json.loads(row))]
            (kept / f"{part}.jsonl").write_text("\n".join(kept_rows) + "\n")
    return {**workload.data, "dataset": str(kept)}


def measure(
    workload: Workload, entry: Entry, data: dict[str, Any], rate: float | None, seed: int
) -> dict[str, Any]:
    """Train once and return what it gave; None is the method's default rate."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.model_validate({
            "task": workload.task,
            "model": {"name_or_path": workload.model.name},
            "data": {**data, "cache": False},
            "method": entry.spec,
            "train": {"max_steps": workload.steps, "learning_rate": rate, "seed": seed,
                      "per_device_eval_batch_size": 32, "predict_with_generate": False,
                      "eval_steps": workload.steps, "warmup_steps": workload.warmup,
                      "head_learning_rate": workload.head_rate},
            "output": {"dir": str(Path(folder) / "run")},
        })  # fmt: skip
        try:
            summary = train(config).summary
        except RunError as error:  # a rate at which it diverges
            return {"metrics": {}, "error": str(error)[:200]}
    return {
        "metrics": {k: round(v, 5) for k, v in summary["metrics"].items()},
        "loss_first": round(summary["loss_first"], 4),
        "loss_last": round(summary["loss_last"], 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


def score_of(workload: Workload, runs: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean score of runs and, where nothing was learned, their loss; more is better."""
    found = list(runs)
    if any(not run["metrics"] or not math.isfinite(run["metrics"]["loss"]) for run in found):
        return -math.inf, -math.inf
    loss = -statistics.fmean(run["metrics"]["loss"] for run in found)
    if workload.score == "loss":
        return loss, loss
    return round(statistics.fmean(run["metrics"][workload.score] for run in found), 4), loss


class Search:
    """The runs of one method on one workload."""

    def __init__(self, log: Log, options: argparse.Namespace, name: str, method: str) -> None:
        """Take up what was run before."""
        self.log, self.name, self.method = log, name, method
        self.workload, self.entry = WORKLOADS[name], ENTRIES[method]
        self.seeds = range(1, 1 + options.seeds)
        self.options = options

    def runs_at(self, rate: float) -> list[dict[str, Any]]:
        """Return the runs at a rate, one a seed; makes those that are missing."""
        return [self._run(rate, seed) for seed in self.seeds]

    def _run(self, rate: float, seed: int) -> dict[str, Any]:
        found = self.log.find(self.name, self.method, rate, seed)
        if found is None:
            found = {"workload": self.name, "method": self.method, "rate": rate, "seed": seed}
            data = prepare_data(self.workload, self.name, self.options.data, self.options.work)
            found |= measure(self.workload, self.entry, data, rate, seed)
            self.log.add(found)
            print(json.dumps(found), flush=True)
        return found

    def climb(self) -> int:
        """Run until the best place of the grid has a worse one on either side, and return it."""
        best = min(grid_step(self.entry.first) + self.workload.shift, 0)
        while True:
            around = [place for place in (best, best - 1, best + 1) if -12 <= place <= 0]
            scores = {place: score_of(self.workload, self.runs_at(grid_rate(place)))
                      for place in around}  # fmt: skip
            top = max(around, key=lambda place: scores[place])
            if top == best:
                return best
            best = top

    @property
    def default(self) -> float:
        """The rate where the user gives none."""
        spec = SPECS[self.entry.spec["kind"]].model_validate(self.entry.spec)
        return METHODS[spec.kind].rates(spec).rate(self.workload.facts)

    def known(self) -> dict[float, list[dict[str, Any]]]:
        """Return the runs that there are, by their rates."""
        found: dict[float, list[dict[str, Any]]] = {}
        for run in self.log.runs.values():
            if (run["workload"], run["method"]) == (self.name, self.method):
                found.setdefault(run["rate"], []).append(run)
        return dict(sorted(found.items()))


def methods_for(name: str, wanted: list[str]) -> Iterator[str]:
    """Return the methods that are run on a workload, those that cannot be left out."""
    for method in wanted or ENTRIES:
        probes = ENTRIES[method].spec.get("freeze_base", False)
        if not (probes and name.startswith(NO_NEW_HEAD)):
            yield method


def run(options: argparse.Namespace) -> None:
    """Make the runs that are missing."""
    log = Log(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.workloads or WORKLOADS:
        for method in methods_for(name, options.methods):
            search = Search(log, options, name, method)
            search.climb()
            search.runs_at(search.default)


def table(options: argparse.Namespace) -> None:
    """Print a table a workload: every rate that was run, and what the default loses to the best."""
    log = Log(options.out)
    for name, workload in WORKLOADS.items():
        rows = [row for method in ENTRIES if (row := row_of(Search(log, options, name, method)))]
        if rows:
            unit = "loss" if workload.score == "loss" else workload.score
            print(f"### {name}\n\n{workload.facts}; {unit}, head {workload.head_rate or '–'}\n")
            print(f"| method | rate: {unit} | default | {unit} | lost |\n|---|---|---:|---:|---:|")
            print("\n".join(rows) + "\n")


def row_of(search: Search) -> str | None:
    """Return a method's line; None where nothing was run. A rate that was not run gets no score."""
    found = {rate: score_of(search.workload, runs)[0] for rate, runs in search.known().items()}
    if not found:
        return None
    best = max(found.values())
    is_loss = search.workload.score == "loss"
    cells = [
        f"**{rate:g}: {abs(score):.3f}**" if score == best else f"{rate:g}: {abs(score):.3f}"
        for rate, score in found.items()
    ]
    if search.workload.one_rate:
        return f"| {search.method} | {', '.join(cells)} | – | – | – |"
    default = search.default
    score = found.get(default)
    lost = "" if score is None else best - score
    if lost != "":
        lost = f"{lost / abs(best):.1%}" if is_loss else f"{100 * lost:.1f}"
    shown = "–" if score is None else f"{abs(score):.3f}"
    return f"| {search.method} | {', '.join(cells)} | {default:g} | {shown} | {lost} |"


def main() -> None:
    """Run the searches, or print the tables of what was run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    names = {"type": lambda text: text.split("/"), "default": []}
    running = commands.add_parser("run", help="make the runs that are missing")
    running.add_argument("--out", type=Path, default=Path("runs/defaults.jsonl"))
    running.add_argument("--workloads", help="names with slashes between", **names)
    running.add_argument("--methods", help="names with slashes between", **names)
    running.add_argument("--seeds", type=int, default=1)
    running.add_argument("--data", type=Path, default=Path("data"))
    running.add_argument("--work", type=Path, default=Path("runs/defaults"))
    running.set_defaults(act=run)
    showing = commands.add_parser("table", help="print what was run")
    showing.add_argument("out", type=Path)
    showing.set_defaults(act=table, seeds=1, data=Path("data"), work=Path("runs/defaults"))
    options = parser.parse_args()
    options.act(options)


if __name__ == "__main__":
    main()
