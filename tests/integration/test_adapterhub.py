"""Export of a run to AdapterHub's format, evaluated and used like the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftlevel.cli.app import run


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(list(arguments)) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.mark.slow
def test_exported_adapterhub_adapter_matches_run(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [("a joy to see", "good"), ("far too long", "bad"), ("so so", "fair")]
    rows = [{"text": f"Film {n} was {t}.", "label": c} for n in range(8) for t, c in texts]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_command(capsys, "train", "--quiet", "--model", str(tiny_model_dir("bert", "seqcls")),
                "--task", "text-classification", "--dataset", "rows.jsonl", "--method", "adapter",
                "--set", "method.placement=seq_bn", "--max-steps", "3", "--learning-rate", "1e-2",
                "--output-dir", "my.run")  # fmt: skip
    output = run_command(capsys, "export", "my.run", "--format", "adapterhub", "--out", "hub")
    assert "read back: the same weights" in output
    config = json.loads(Path("hub/adapter_config.json").read_text())
    assert (config["name"], config["model_class"]) == ("my_run", "BertForSequenceClassification")
    assert config["config"]["original_ln_before"] is True
    head = json.loads(Path("hub/head_config.json").read_text())
    assert head["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    assert sorted(path.name for path in Path("hub").iterdir()) == [
        "adapter_config.json", "head_config.json", "pytorch_adapter.bin", "pytorch_model_head.bin",
    ]  # fmt: skip

    scores = [
        json.loads(run_command(capsys, "evaluate", name, "--dataset", "rows.jsonl", "--json"))
        for name in ("my.run", "hub")
    ]
    assert_same_scores(*scores)
    answers = [
        json.loads(run_command(capsys, "generate", name, "--prompt", "Film 1 was so so.", "--json"))
        for name in ("my.run", "hub")
    ]
    run_answer, exported_answer = (answer["answers"][0] for answer in answers)
    assert (run_answer["text"], run_answer["scores"]) == (
        exported_answer["text"],
        exported_answer["scores"],
    )

    for command, message in (
        (("merge", "hub", "--out", "merged"), "a bottleneck adapter is not linear"),
        (("export", "hub", "--out", "hub.gguf"), "cannot be merged"),
        (("export", "hub", "--format", "adapterhub", "--out", "more"), "in AdapterHub's form"),
        (("export", "my.run", "--format", "adapterhub", "--out", "hub"), "is not empty"),
        (
            ("export", "my.run", "--format", "adapterhub", "--out", "more", "--max-rank", "2"),
            "--max-rank is for plain LoRA, not for adapterhub. Drop it.",
        ),
        (("evaluate", "hub", "--task", "token-classification"), "has a head for text-class"),
    ):
        assert message.lower() in run_command(capsys, *command, code=2).lower()


def assert_same_scores(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["metrics"] == second["metrics"]
    assert first["metrics"]
