"""`--fast` and `--no-fast` have equal losses, and `--verify-fast` reports it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from ftlevel.cli.app import run
from ftlevel.training.trainer import FtlevelTrainer

SHORT = ["--model", "tiny", "--overlong", "drop", "--max-samples", "24", "--batch-size", "4",
         "--set", "data.max_eval_samples=8", "--gradient-accumulation-steps", "2", "--max-steps",
         "5", "--logging-steps", "1", "--dtype", "float32", "--learning-rate", "1e-3"]  # fmt: skip


@pytest.fixture(autouse=True)
def working_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(tiny_model_dir("llama", chat=True))


def train(*arguments: str, out: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run `ftlevel train`; return its summary and its records."""
    assert run(["train", "--quiet", "--output-dir", out, *SHORT, *arguments]) == 0
    records = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    return json.loads(Path(out, "summary.json").read_text()), records


@pytest.mark.slow
def test_fast_and_plain_step_have_equal_losses() -> None:
    fast_summary, records = train("--verify-fast", out="fast")
    plain_summary, expected = train("--no-fast", out="plain")
    assert fast_summary["speed"]["verified"]["gradient"] < 3e-5
    assert fast_summary["speed"]["packed"]
    assert fast_summary["speed"]["chunked_cross_entropy"]
    assert (
        fast_summary["speed"]["tokens_computed"] == fast_summary["speed"]["tokens_in_rows"] > 1000
    )
    assert plain_summary["speed"] == {"fast": False}
    assert len(records) == len(expected) == 7, "five steps and two evaluations"
    for record, plain_record in zip(records, expected, strict=True):
        assert record["tokens"] == plain_record["tokens"]
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in plain_record:
                assert record[name] == pytest.approx(plain_record[name], rel=1e-4), name
    assert records[-2]["loss"] != records[0]["loss"], "it learns, so a wrong gradient would show"


def test_repeated_micro_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a sharded model repeats micro-batches if another process has more."""
    _, expected = train(out="alone")
    monkeypatch.setattr(FtlevelTrainer, "num_forward_passes", lambda _, count: count + 1)
    _, records = train(out="repeated")
    for name in ("tokens", "loss", "eval_loss"):
        assert [r.get(name) for r in records] == [r.get(name) for r in expected], name


def test_verify_fast_detects_wrong_fast_step(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    from ftlevel.fast.fused_lora import FusedLoraFunction

    original = FusedLoraFunction.backward

    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        of_x, of_dropped, of_a, *others = original(ctx, *gradients)
        return of_x, of_dropped, None if of_a is None else of_a * 1.04, *others

    monkeypatch.setattr(FusedLoraFunction, "backward", staticmethod(backward))
    error = cli.fails("train --quiet --output-dir wrong", *SHORT, "--verify-fast", code=1)
    assert "--verify-fast: the fast step is not the plain one" in error
    assert not Path("wrong").exists()
