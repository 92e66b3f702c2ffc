"""Compare beta, learning rate and epochs of a preference loss on three small sets, three seeds.

    python scripts/fetch_models.py smollm2
    python scripts/build_data.py docstring-pairs docstring-summary wordnet-define
    python benchmarks/preference_defaults.py run --out runs/preference-defaults.jsonl   # hours
    python benchmarks/preference_defaults.py table runs/preference-defaults.jsonl

Each set has 40 pairs and 40 held-out ones, the shortest that there are: a summary and a sentence
copied from its text (copied), a summary and that of another text (foreign), a definition and that
of another word (defined). Each run begins from a supervised one of two epochs on the preferred
answers, with the same seed, and has LoRA r 8 on every linear. All runs are in one process. A file
that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlevel import TrainConfig, train

PAIRS, HELD_OUT, SEEDS = 40, 40, (0, 1, 2)
DEFAULT = {"loss": "dpo", "beta": 0.1, "learning_rate": 2e-4, "epochs": 3}
VARIED: dict[str, tuple[Any, ...]] = {
    "learning_rate": (6e-5, 6e-4),
    "beta": (0.03, 0.5),
    "epochs": (1,),
}
"""Each is varied with the others at `DEFAULT`."""
LOSSES = ("cdpo", "robust", "hinge", "ipo", "dpo-norm", "ld-dpo", "rpo", "simpo", "cpo", "orpo",
          "kto")  # fmt: skip
"""With `--losses`, each at the beta and the rate that ftlevel has for it, with the first seed."""
MODEL = Path(".models/SmolLM2-135M-Instruct")
KEPT = ("loss", "reward_accuracy", "reward_margin", "logp_chosen", "ref_logp_chosen",
        "logp_rejected", "ref_logp_rejected", "logp_mean_accuracy")  # fmt: skip


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _copied(split: str, data: Path) -> list[dict[str, str]]:
    rows = _read(data / "docstring-pairs" / f"{split}.jsonl")
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def _of_others(prompts: list[str], answers: list[str]) -> list[dict[str, str]]:
    """Return pairs in which the rejected answer is that of the row before."""
    others = [answers[-1], *answers[:-1]]
    return [
        {"prompt": prompt, "chosen": answer, "rejected": other}
        for prompt, answer, other in zip(prompts, answers, others, strict=True)
        if answer != other
    ]


def _foreign(split: str, data: Path) -> list[dict[str, str]]:
    rows = _read(data / "docstring-summary" / f"{split}.jsonl")
    asked = [f"Summarize what this function does in one line.\n\n{row['document']}" for row in rows]
    return _of_others(asked, [row["summary"] for row in rows])


def _defined(split: str, data: Path) -> list[dict[str, str]]:
    rows = _read(data / "wordnet-define" / f"{split}.jsonl")
    asked = [f"{row['instruction']}\n\n{row['input']}" for row in rows]
    return _of_others(asked, [row["output"] for row in rows])


SETS = {"copied": _copied, "foreign": _foreign, "defined": _defined}


def _shortest(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Return the `count` rows with the shortest texts, as they come."""
    longest = sorted(sum(map(len, row.values())) for row in rows)[:count][-1]
    return [row for row in rows if sum(map(len, row.values())) <= longest][:count]


def write_set(name: str, data: Path, out: Path) -> Path:
    """Write the pairs of a set for training and validation, and return their folder."""
    out.mkdir(parents=True, exist_ok=True)
    held = SETS[name]("validation", data) + SETS[name]("test", data)
    for split, rows in (("train", _shortest(SETS[name]("train", data), PAIRS)),
                        ("validation", _shortest(held, HELD_OUT))):  # fmt: skip
        lines = "\n".join(json.dumps(row) for row in rows)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return out


def settings() -> Iterator[dict[str, Any]]:
    """Yield the settings to try, the default once."""
    yield DEFAULT
    for name, values in VARIED.items():
        yield from ({**DEFAULT, name: value} for value in values if value != DEFAULT[name])


def _train(rows: Path, out: Path, seed: int, **sections: Any) -> dict[str, float]:
    told = sections.pop("train")
    config = TrainConfig(
        data={"dataset": str(rows), **sections.pop("data", {})},
        train={"per_device_train_batch_size": 8, "seed": seed, "eval_strategy": "no",
               "predict_with_generate": False, **told},
        output={"dir": str(out), "overwrite": True},
        **sections,
    )  # fmt: skip
    return dict(train(config).summary["metrics"])


class Runs:
    """The runs that were made, a JSON line each, and the supervised ones that they begin from."""

    def __init__(self, model: Path, data: Path, out: Path, scratch: Path) -> None:
        """Read what is there."""
        out.parent.mkdir(parents=True, exist_ok=True)
        self.model, self.data, self.out, self.scratch = model, data, out, scratch
        lines = _read(out) if out.exists() else []
        self.done = {json.dumps([line["set"], line["seed"], line["settings"]]) for line in lines}

    def make(self, name: str, seed: int, settings: dict[str, Any]) -> None:
        """Train if it was not done, and write a line."""
        if json.dumps([name, seed, settings]) in self.done:
            return
        rows = write_set(name, self.data, self.scratch / name)
        began = self._supervised(name, rows, seed)
        time_before = time.perf_counter()
        metrics = _train(
            rows, self.scratch / "run", seed,
            task="preference",
            preference={"loss": settings["loss"], "beta": settings.get("beta")},
            model={"adapter": str(began)},
            train={"num_train_epochs": settings["epochs"],
                   "learning_rate": settings.get("learning_rate")},
        )  # fmt: skip
        line = {"set": name, "seed": seed, "settings": settings}
        line |= {key: metrics[key] for key in KEPT if key in metrics}
        line["seconds"] = round(time.perf_counter() - time_before, 1)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _supervised(self, name: str, rows: Path, seed: int) -> Path:
        began = self.scratch / f"sft-{name}-{seed}"
        if not began.exists():
            _train(
                rows, began, seed,
                model={"name_or_path": str(self.model)},
                train={"num_train_epochs": 2},
                data={"columns": {"prompt": "prompt", "completion": "chosen"}},
            )  # fmt: skip
        return began


def run(options: argparse.Namespace) -> None:
    """Train what is not there yet, seed by seed."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(options.model, options.data, options.out, Path(scratch))
        if options.losses:
            for name in SETS:
                for loss in LOSSES:
                    runs.make(name, SEEDS[0], {"loss": loss, "epochs": DEFAULT["epochs"]})
            return
        for seed in SEEDS:
            for name in SETS:
                for told in settings():
                    runs.make(name, seed, told)


def table(path: Path) -> None:
    """Print accuracy, and by how much the answers' log-probabilities moved: mean and spread."""
    found = defaultdict(list)
    for line in _read(path):
        found[json.dumps(line["settings"])].append(line)
    print("| settings | runs | loss | reward accuracy | worst | likelier a token "
          "| preferred, nats | rejected, nats |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for told, lines in found.items():
        differences = [
            f"{name} {value}" for name, value in json.loads(told).items() if value != DEFAULT[name]
        ]
        right = [line["reward_accuracy"] for line in lines if "reward_accuracy" in line]
        moved = [
            statistics.mean(line[f"logp_{kind}"] - line[f"ref_logp_{kind}"] for line in lines)
            if all(f"ref_logp_{kind}" in line for line in lines)
            else math.nan
            for kind in ("chosen", "rejected")
        ]
        print(
            f"| {', '.join(differences) or 'default'} | {len(lines)} | {_spread(lines, 'loss')} "
            f"| {_spread(lines, 'reward_accuracy')} | {min(right, default=math.nan):.3f} "
            f"| {_spread(lines, 'logp_mean_accuracy')} | {moved[0]:+.2f} | {moved[1]:+.2f} |"
        )


def _spread(lines: list[dict[str, Any]], key: str) -> str:
    values = [line[key] for line in lines if key in line]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--model", type=Path, default=MODEL)
    running.add_argument("--losses", action="store_true", help="compare the losses instead")
    running.add_argument("--data", type=Path, default=Path("data"))
    running.add_argument("--out", type=Path, default=Path("runs/preference-defaults.jsonl"))
    commands.add_parser("table").add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
    else:
        table(arguments.path)


if __name__ == "__main__":
    main()
