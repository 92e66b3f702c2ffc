"""`evaluate --against`: metrics of two models on the same rows, and rejected comparisons."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import task_data
from command_line import Cli
from ftlevel.commands.evaluate import Evaluation, evaluate
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig
from run_files import ModelDir, short_config


def train_run(model: Path, rows: Path, out: Path, task: str, **sections: Any) -> Path:
    generation = {"max_new_tokens": 4, "max_generate_samples": 2}
    train(short_config(model, rows, out, task, train=generation, **sections))
    return out


def run_evaluation(name: Path, **overrides: Any) -> Evaluation:
    fields = {"name": str(name), "resamples": 0, "device": "cpu", "eval_tokens": 300, **overrides}
    return evaluate(EvaluateConfig.model_validate(fields))


@pytest.fixture(scope="module")
def summarization_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: ModelDir) -> Path:
    folder = tmp_path_factory.mktemp("summarizer")
    data = task_data.write(folder / "data", "pair")
    columns = {"columns": {"document": "en", "summary": "de"}}
    return train_run(tiny_model_dir("llama"), data, folder / "run", "summarization", data=columns)


def test_plain_model_is_evaluated_with_rows_and_prompts_of_run(
    summarization_run: Path, tiny_model_dir: ModelDir
) -> None:
    """The base's metrics equal those that the evaluation of the run reports for its base."""
    run_result = run_evaluation(summarization_run)
    result = run_evaluation(tiny_model_dir("llama"), against=str(summarization_run))
    comparison = result.summary["against"]
    assert result.summary["task"] == "summarization"
    assert result.metrics["loss"] == pytest.approx(
        run_result.base["loss"], rel=1e-2
    )  # bfloat16 here
    assert comparison["metrics"]["loss"] == pytest.approx(run_result.metrics["loss"], rel=1e-6)
    assert comparison["rows"]["loss"] - comparison["rows"]["loss_reference"] == pytest.approx(
        result.metrics["loss"] - run_result.metrics["loss"], rel=0.05
    )
    assert comparison["rows"]["kl"] > 0.01
    assert comparison["text"]["windows"] >= 2
    reverse_summary = run_evaluation(
        summarization_run, against=str(tiny_model_dir("llama")), base=False
    ).summary
    assert reverse_summary["against"]["metrics"]["loss"] == pytest.approx(result.metrics["loss"])
    assert reverse_summary["against"]["rows"]["mean_difference"] == pytest.approx(
        comparison["rows"]["mean_difference"]
    )


def test_text_divergence_matches_models_in_memory(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = task_data.write(tmp_path / "data", "mask") / "validation.jsonl"
    text = tmp_path / "text.txt"
    text.write_text("The parser reads a name and returns its value. " * 9)
    source = tiny_model_dir("llama")
    reference_model, perturbed_model = (
        transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        for _ in range(2)
    )
    with torch.no_grad():
        for number, weight in enumerate(perturbed_model.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.02)
    perturbed_model.save_pretrained(tmp_path / "other")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(tmp_path / "other")
    comparison = run_evaluation(
        tmp_path / "other", against=str(source), dataset=str(data), task="text-generation",
        eval_text=text, eval_tokens=100,
    ).summary["against"]["text"]  # fmt: skip
    content = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:100]
    ids = torch.tensor([[tokenizer.bos_token_id, *content]])
    with torch.no_grad():
        first, second = (
            m(ids).logits[0, :-1].log_softmax(-1) for m in (reference_model, perturbed_model)
        )
    expected = float((first.exp() * (first - second)).sum(-1).mean())
    loss = float(-first.gather(1, ids[0, 1:, None]).mean())
    assert (comparison["positions"], comparison["windows"]) == (100, 1)
    assert comparison["kl"] == pytest.approx(
        expected, rel=0.05
    )  # in bfloat16, where the CPU has it
    assert comparison["perplexity_source"] == pytest.approx(math.exp(loss), rel=0.02)


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
def test_against_supports_other_families_and_tasks(
    family: str, head: str | None, name: str, task: str, options: dict[str, Any], has_text: bool,
    tiny_model_dir: ModelDir, tmp_path: Path,
) -> None:  # fmt: skip
    data = task_data.write(tmp_path / "data", name)
    model = tiny_model_dir(family, head)
    runs = [
        train_run(model, data, tmp_path / str(seed), task, data=options,
                  method={"kind": "lora", "r": seed})
        for seed in (2, 4)
    ]  # fmt: skip
    comparison = run_evaluation(runs[0], against=str(runs[1])).summary["against"]
    assert ("text" in comparison) == has_text
    assert comparison["rows"]["mean_difference"] > 0
    assert (comparison["rows"]["kl"] is None) == (name == "regression")


def test_soft_prompt_adapter_is_compared_on_text(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = task_data.write(tmp_path / "data", "mask")
    run_dir = train_run(tiny_model_dir("llama"), data, tmp_path / "run", "text-generation",
                        method={"kind": "prompt", "num_virtual_tokens": 8})  # fmt: skip
    comparison = run_evaluation(run_dir, against=str(tiny_model_dir("llama"))).summary["against"]
    assert comparison["text"]["positions"] > 200
    assert comparison["text"]["kl"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--against", "{classifier}"], "is for text-classification, and"),
        (["--against", "{gpt2}"], "its tokenizer differs"),
        (["--against", "nothing"], "nothing"),
        (
            ["--eval-text", "x.txt"],
            "--eval-text x.txt needs --against MODEL: it is for comparing two models. Add "
            "--against MODEL, or drop --eval-text.",
        ),
        (["--against", "{run}", "--task", "masked-lm"], "was trained for summarization"),
        (["--against", "{run}", "--eval-text", "nothing.txt"], "--eval-text nothing.txt cannot"),
    ],
)
def test_incompatible_comparison_is_rejected(
    arguments: list[str], expected: str, summarization_run: Path, tiny_model_dir: ModelDir,
    tmp_path: Path, cli: Cli,
) -> None:  # fmt: skip
    paths = {"run": str(summarization_run), "gpt2": str(tiny_model_dir("gpt2"))}
    if "{classifier}" in arguments:
        data = task_data.write(tmp_path / "data", "class")
        paths["classifier"] = str(train_run(
            tiny_model_dir("llama"), data, tmp_path / "run", "text-classification"
        ))  # fmt: skip
    formatted = [argument.format(**paths) for argument in arguments]
    message = cli.fails(f"evaluate {summarization_run} --resamples 0", *formatted)
    assert expected in message
    assert "Traceback" not in message


def test_run_against_itself_has_no_difference(summarization_run: Path, cli: Cli) -> None:
    command = f"evaluate {summarization_run} --against {summarization_run} --no-base"
    command += " --resamples 20 --eval-tokens 100"
    output = cli(command)
    assert "targets of these rows: KL 0.0000 nats, top-1 agreement 100.0%" in output
    assert "positions of documentation of Python's standard library: KL 0.0000 ± 0.0000" in output
    result = cli.json(command, "--json")
    comparison = result["against"]
    assert comparison["difference_intervals"]["loss"] == [0, 0]
    assert comparison["intervals"]["loss"] == result["intervals"]["loss"]
    assert comparison["rows"]["max_difference"] == 0
    assert comparison["rows"]["top1"] == comparison["text"]["top1_agreement"] == 1
    assert comparison["metrics"].items() <= result["metrics"].items()
