"""Parts of `compare`: the winner's command, rates that a search tries, and trials that fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from ftlevel.config import Layer, OutputConfig, TrainConfig, build_config
from ftlevel.config.layers import parse_overrides
from ftlevel.errors import ConfigError, InputError
from ftlevel.events import NullListener
from ftlevel.extras.compare import compare, search
from ftlevel.extras.compare.cli import closing_lines
from ftlevel.extras.compare.comparison import Comparison, ComparisonOptions, _command

ROWS = "builtin:docstrings"
MINUTES = ComparisonOptions(("lora",), None, 1.0, 1, None, None, ("lr",), None, None)


def build(**train: Any) -> TrainConfig:
    data = {"dataset": ROWS, "max_samples": 8, "validation_split": 0.2}
    return build_config([Layer({"data": data, "train": train})])


def set_steps(config: TrainConfig, tmp_path: Path, steps: int) -> Comparison:
    """Returns a comparison of `lora` whose budget of minutes is `steps` steps."""
    found = Comparison(tmp_path, MINUTES, {"lora": config})
    found.dry_runs["lora"] = compare.get_run_info(config)
    state = {"asked": {"planned_steps": {"lora": steps}}}
    compare._set_budget(found, state, NullListener(), int)
    return found


def test_command_resets_what_was_chosen_for_budget_and_rows(tmp_path):
    found = set_steps(build(), tmp_path, 5)
    command = _command({"run": "a", "method": "lora"}, found)
    changes = command.partition(" --set ")[2].split(" --set ")
    assert changes == [
        "train.max_steps=null", "train.learning_rate=null",
        "data.max_samples=null", "data.max_length=auto",
    ]  # fmt: skip
    run = Layer(found.dry_runs["lora"]["config"])
    config = build_config([run, parse_overrides(changes)])
    assert (config.train.max_steps, config.data.max_length) == (None, "auto")
    found = set_steps(build(learning_rate=1e-3), tmp_path, 5)
    assert "learning_rate" not in _command({"run": "a", "method": "lora"}, found)


def test_tie_is_named():
    rows = [{"method": name, "metric": value, "search": None}
            for name, value in (("lora", 0.9), ("ia3", 0.9), ("full", 0.8))]  # fmt: skip
    result = {"rows": rows, "best": "lora", "command": "ftlevel train", "notes": [], "left_out": [],
              "versions": {}, "pictures": ["a.png"], "path": "out"}  # fmt: skip
    *_, line, command = closing_lines(result)
    assert line == "best: lora, as good as ia3. Command to train it:"
    assert command == "  ftlevel train"


def test_search_is_around_the_rate_for_the_steps_of_the_budget(tmp_path):
    state = {"search": ["lr"], "config": {}, "budget": {}, "study": None, "trials": 2}
    rates = []
    for steps in (5, 3000):
        found = set_steps(build(num_train_epochs=1), tmp_path, steps)
        study = search.plan_study(
            "lora", found.configs["lora"], state, found.dry_runs["lora"], tmp_path
        )
        rates.append(study.rate)
    assert rates[0] > rates[1]


def test_search_samples_rates_that_train_accepts(tmp_path):
    bounds: dict[str, Any] = {}

    class Trial:
        def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
            bounds.update(low=low, high=high, log=log)
            return high

    rate = search._sample(Trial(), "lr", 0.3)  # C³A's default
    assert build(learning_rate=rate).train.learning_rate == rate
    assert bounds["low"] == pytest.approx(0.03)


def test_limits_of_the_winner_are_kept_on_resume(tmp_path):
    config = build()
    first = ComparisonOptions(("lora",), 2, None, 1, 8.0, 30.0, (), None, None)
    _, state = compare._start_or_resume(config, first, tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / compare.RESULT).write_text(json.dumps(state))
    resumed = config.with_sections(output=OutputConfig(dir=tmp_path / "runs", resume=True))
    alone = ComparisonOptions((), None, None, 1, None, None, (), None, None)
    args, state = compare._start_or_resume(resumed, alone, tmp_path / "runs")
    assert (args.max_memory, args.max_minutes) == (8.0, 30.0)
    (tmp_path / "runs" / compare.RESULT).write_text(json.dumps(state))
    lower = ComparisonOptions((), None, None, 1, 4.0, None, (), None, None)
    args, _ = compare._start_or_resume(resumed, lower, tmp_path / "runs")
    assert (args.max_memory, args.max_minutes) == (4.0, 30.0)


def test_resume_with_changed_rows_is_rejected(tmp_path):
    config = build()
    data = dict(compare.get_run_info(config)["data"])
    run = tmp_path / "lora-seed42"
    run.mkdir()
    for name in ("fingerprint", "validation_fingerprint", ""):
        summary = {"data": {key: "other" if key == name else data[key] for key in data}}
        (run / "summary.json").write_text(json.dumps(summary))
        found = Comparison(tmp_path, MINUTES)
        if name:
            with pytest.raises(InputError, match="the rows are not those of lora-seed42"):
                compare._check_methods(config, found, NullListener())
        else:
            compare._check_methods(config, found, NullListener())
            assert list(found.configs) == ["lora"]


def test_trial_whose_values_do_not_fit_is_pruned(tmp_path, monkeypatch):
    def train(*_: Any, **__: Any) -> None:
        raise ConfigError("method.gralora_k 4 does not divide method.r 2")

    monkeypatch.setattr(search, "train", train)
    settings = search.Study("s", "", {"r": "method.r"}, 1e-3, "loss", "minimize", 1)
    study = optuna.create_study()
    study.optimize(lambda trial: search._objective(trial, settings, build(), tmp_path), n_trials=1)
    assert [trial.state.name for trial in study.trials] == ["PRUNED"]
    assert "does not divide" in study.trials[0].user_attrs["reason"]
