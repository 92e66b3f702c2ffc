"""Compare beta, learning rate and epochs of a preference loss on three small sets, three seeds.

    python scripts/build_data.py docstring-pairs docstring-summary wordnet-define
    python benchmarks/preference_defaults.py run --out runs/preference-defaults.jsonl
    python benchmarks/preference_defaults.py table runs/preference-defaults.jsonl

Each set has 80 pairs and 40 held-out ones: a summary and a sentence copied from its text (copied),
a summary and that of another text (foreign), a definition and that of another word (defined). The
model is the one built into the package, so a run takes seconds and says little of large models;
each begins from a supervised run of two epochs on the preferred answers, with the same seed. All
runs are in one process. A file that is there is gone on with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftlevel import TrainConfig, train

PAIRS, HELD_OUT, SEEDS = 80, 40, (0, 1, 2)
DEFAULT = {"loss": "dpo", "beta": 0.1, "learning_rate": 3e-4, "epochs": 3}
VARIED: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-4, 3e-4, 1e-3),
    "beta": (0.03, 0.1, 0.5),
    "epochs": (1, 3),
}
"""Each is varied with the others at `DEFAULT`."""
KEPT = ("reward_accuracy", "reward_margin", "logp_chosen", "ref_logp_chosen", "logp_rejected",
        "ref_logp_rejected", "logp_mean_accuracy")  # fmt: skip


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


def write_set(name: str, data: Path, out: Path) -> Path:
    """Write the pairs of a set for training and validation, and return their folder."""
    out.mkdir(parents=True, exist_ok=True)
    held = SETS[name]("validation", data) + SETS[name]("test", data)
    for split, rows in (("train", SETS[name]("train", data)[:PAIRS]),
                        ("validation", held[:HELD_OUT])):  # fmt: skip
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
        model={"dtype": "float32", **sections.pop("model", {})},
        data={"dataset": str(rows), **sections.pop("data", {})},
        train={"per_device_train_batch_size": 8, "seed": seed, "eval_strategy": "no", **told},
        output={"dir": str(out), "overwrite": True},
        **sections,
    )
    return dict(train(config).summary["metrics"])


def run(data: Path, out: Path) -> None:
    """Train what `out` does not have yet, seed by seed, and write a line for each run."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = _read(out) if out.exists() else []
    done = {json.dumps([line["set"], line["seed"], line["settings"]]) for line in lines}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for seed in SEEDS:
            for name in SETS:
                rows, began = write_set(name, data, place / name), place / f"sft-{name}-{seed}"
                for told in settings():
                    if json.dumps([name, seed, told]) in done:
                        continue
                    if not began.exists():
                        _train(
                            rows,
                            began,
                            seed,
                            train={"num_train_epochs": 2},
                            data={"columns": {"prompt": "prompt", "completion": "chosen"}},
                        )
                    metrics = _train(
                        rows, place / "run", seed,
                        task="preference",
                        preference={"loss": told["loss"], "beta": told["beta"]},
                        model={"adapter": str(began)},
                        train={"num_train_epochs": told["epochs"],
                               "learning_rate": told["learning_rate"]},
                    )  # fmt: skip
                    kept = {key: metrics[key] for key in KEPT}
                    line = {"set": name, "seed": seed, "settings": told, **kept}
                    with out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


def table(path: Path) -> None:
    """Print accuracy, and by how much the answers' log-probabilities moved: mean and spread."""
    found = defaultdict(list)
    for line in _read(path):
        found[json.dumps(line["settings"])].append(line)
    print("| settings | runs | reward accuracy | worst | preferred, nats | rejected, nats |")
    print("|---|---|---|---|---|---|")
    for told, lines in found.items():
        differences = [
            f"{name} {value:g}" for name, value in json.loads(told).items()
            if name != "loss" and value != DEFAULT[name]
        ]  # fmt: skip
        right = [line["reward_accuracy"] for line in lines]
        moved = [
            statistics.mean(line[f"logp_{kind}"] - line[f"ref_logp_{kind}"] for line in lines)
            for kind in ("chosen", "rejected")
        ]
        spread = statistics.stdev(right) if len(right) > 1 else 0.0
        print(
            f"| {', '.join(differences) or 'default'} | {len(lines)} "
            f"| {statistics.mean(right):.3f} ± {spread:.3f} | {min(right):.3f} "
            f"| {moved[0]:+.2f} | {moved[1]:+.2f} |"
        )


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, default=Path("data"))
    running.add_argument("--out", type=Path, default=Path("runs/preference-defaults.jsonl"))
    commands.add_parser("table").add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.data, arguments.out)
    else:
        table(arguments.path)


if __name__ == "__main__":
    main()
