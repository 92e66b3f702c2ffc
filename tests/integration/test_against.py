"""`evaluate --against`: metrics of two models on the same rows, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import task_data
from ftlevel.cli.app import run
from ftlevel.commands.evaluate import Evaluation, evaluate
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, TrainConfig

ModelDir = Callable[..., Path]


def make_run(model: Path, data: Path, out: Path, task: str, **more: Any) -> Path:
    fields = {
        "task": task,
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"dataset": str(data), **more.pop("options", {})},
        "train": {"max_steps": 3, "learning_rate": 0.01, "max_new_tokens": 4,
                  "max_generate_samples": 2},
        "output": {"dir": str(out)},
        **more,
    }  # fmt: skip
    train(TrainConfig.model_validate(fields))
    return out


def score(name: Path, **more: Any) -> Evaluation:
    fields = {"name": str(name), "resamples": 0, "device": "cpu", "eval_tokens": 300, **more}
    return evaluate(EvaluateConfig.model_validate(fields))


@pytest.fixture(scope="module")
def summarizer(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: ModelDir) -> Path:
    folder = tmp_path_factory.mktemp("summarizer")
    data = task_data.write(folder / "data", "pair")
    columns = {"columns": {"document": "en", "summary": "de"}}
    return make_run(tiny_model_dir("llama"), data, folder / "run", "summarization", options=columns)


def test_a_run_is_itself(summarizer: Path) -> None:
    result = score(summarizer, against=str(summarizer), base=False, resamples=20)
    found = result.summary["against"]
    assert found["difference_intervals"]["loss"] == [0, 0]
    assert found["intervals"]["loss"] == result.summary["intervals"]["loss"]
    assert found["rows"]["kl"] == found["rows"]["max_difference"] == found["text"]["kl"] == 0
    assert found["rows"]["top1"] == found["text"]["top1_agreement"] == 1
    for name in ("loss", "perplexity", "token_accuracy"):
        assert found["metrics"][name] == result.metrics[name]


def test_a_plain_model_is_asked_as_the_run_was_trained(
    summarizer: Path, tiny_model_dir: ModelDir
) -> None:
    """Rows, prompt and task are the run's; the base's own numbers are those beside the run."""
    tuned = score(summarizer)
    result = score(tiny_model_dir("llama"), against=str(summarizer))
    found = result.summary["against"]
    assert result.summary["task"] == "summarization"
    assert result.metrics["loss"] == pytest.approx(tuned.base["loss"], rel=1e-2)  # bfloat16 here
    assert found["metrics"]["loss"] == pytest.approx(tuned.metrics["loss"], rel=1e-6)
    assert found["rows"]["loss"] - found["rows"]["loss_reference"] == pytest.approx(
        result.metrics["loss"] - tuned.metrics["loss"], rel=0.05
    )
    assert found["rows"]["kl"] > 0.01
    assert found["text"]["windows"] >= 2
    other_way = score(summarizer, against=str(tiny_model_dir("llama")), base=False).summary
    assert other_way["against"]["metrics"]["loss"] == pytest.approx(result.metrics["loss"])
    assert other_way["against"]["rows"]["mean_difference"] == pytest.approx(
        found["rows"]["mean_difference"]
    )


def test_the_figures_are_those_of_both_models_in_memory(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = task_data.write(tmp_path / "data", "mask") / "validation.jsonl"
    text = tmp_path / "text.txt"
    text.write_text("The parser reads a name and returns its value. " * 9)
    source = tiny_model_dir("llama")
    plain, other = (
        transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        for _ in range(2)
    )
    with torch.no_grad():
        for number, weight in enumerate(other.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    other.save_pretrained(tmp_path / "other")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path / "other")
    found = score(
        tmp_path / "other", against=str(source), dataset=str(data), task="text-generation",
        eval_text=text, eval_tokens=100,
    ).summary["against"]["text"]  # fmt: skip
    content = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:100]
    ids = torch.tensor([[tokenizer.bos_token_id, *content]])
    with torch.no_grad():
        first, second = (m(ids).logits[0, :-1].log_softmax(-1) for m in (plain, other))
    expected = float((first.exp() * (first - second)).sum(-1).mean())
    loss = float(-first.gather(1, ids[0, 1:, None]).mean())
    assert (found["positions"], found["windows"]) == (100, 1)
    assert found["kl"] == pytest.approx(expected, rel=0.05)  # in bfloat16, where the CPU has it
    assert found["perplexity_source"] == pytest.approx(math.exp(loss), rel=0.02)


@pytest.mark.parametrize(
    ("family", "head", "name", "task", "options", "has_text"),
    [
        pytest.param(
            "bert", "mlm", "class", "text-classification", {}, False, marks=pytest.mark.sweep
        ),
        ("bert", "mlm", "regression", "text-classification", {}, False),
        ("bert", "mlm", "mask", "masked-lm", {}, True),
        ("t5", None, "pair", "translation", {"columns": {"source": "en", "target": "de"}}, True),
    ],
)
def test_other_families_and_tasks(
    family: str, head: str | None, name: str, task: str, options: dict[str, Any], has_text: bool,
    tiny_model_dir: ModelDir, tmp_path: Path,
) -> None:  # fmt: skip
    data = task_data.write(tmp_path / "data", name)
    model = tiny_model_dir(family, head)
    runs = [
        make_run(model, data, tmp_path / str(seed), task, options=options,
                 method={"kind": "lora", "r": seed})
        for seed in (2, 4)
    ]  # fmt: skip
    found = score(runs[0], against=str(runs[1])).summary["against"]
    assert ("text" in found) == has_text
    assert found["rows"]["mean_difference"] > 0
    assert (found["rows"]["kl"] is None) == (name == "regression")


def test_soft_prompts_see_the_text_too(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = task_data.write(tmp_path / "data", "mask")
    name = make_run(tiny_model_dir("llama"), data, tmp_path / "run", "text-generation",
                    method={"kind": "prompt", "num_virtual_tokens": 8})  # fmt: skip
    found = score(name, against=str(tiny_model_dir("llama"))).summary["against"]
    assert found["text"]["positions"] > 200
    assert found["text"]["kl"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--against", "{classifier}"], "is for text-classification, and"),
        (["--against", "{gpt2}"], "its tokenizer differs"),
        (["--against", "nothing"], "nothing"),
        (
            ["--eval-text", "x.txt"],
            "--eval-text x.txt is for comparing two models. Add --against MODEL, or use --dataset "
            "for rows to evaluate.",
        ),
        (["--against", "{run}", "--task", "masked-lm"], "was trained for summarization"),
        (["--against", "{run}", "--eval-text", "nothing.txt"], "--eval-text nothing.txt cannot"),
    ],
)
def test_refusals(
    arguments: list[str], complaint: str, summarizer: Path, tiny_model_dir: ModelDir,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"run": str(summarizer), "gpt2": str(tiny_model_dir("gpt2"))}
    if "{classifier}" in arguments:
        data = task_data.write(tmp_path / "data", "class")
        places["classifier"] = str(make_run(
            tiny_model_dir("llama"), data, tmp_path / "run", "text-classification"
        ))  # fmt: skip
    filled = [argument.format(**places) for argument in arguments]
    assert run(["evaluate", str(summarizer), "--resamples", "0", *filled]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said


def test_the_command(summarizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(summarizer), "--against", str(summarizer), "--no-base",
               "--resamples", "0", "--eval-tokens", "100"]  # fmt: skip
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "targets of these rows: KL 0.0000 nats, same first choice 100.0%" in shown
    assert "positions of documentation of Python's standard library: KL 0.0000 ± 0.0000" in shown
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"]["rows"]["top1"] == 1
