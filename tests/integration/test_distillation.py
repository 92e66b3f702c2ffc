"""Distillation, compared with plain scripts of torch and transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import forked
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.merge import merge
from ftlevel.config import EvaluateConfig, MergeConfig
from ftlevel.errors import InputError
from ftlevel.training import teacher as teacher_module
from preference_runs import create_pair, losses, run, write_rows
from run_files import ModelDir

ROWS = 8
COLUMNS = {"columns": {"prompt": "prompt", "completion": "chosen"}}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache in each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ftlevel" / "rows"


def train_with_teacher(
    base: Path, data: Path, out: Path, distillation: dict[str, Any], **overrides: Any
) -> Any:
    """Train on the chosen answers and a teacher."""
    train = {"per_device_train_batch_size": ROWS, "max_grad_norm": 0, **overrides.pop("train", {})}
    task = overrides.pop("task", "text-generation")
    return run(base, data, out, task=task, preference={"loss": None}, distillation=distillation,
               train=train, data=COLUMNS, **overrides)  # fmt: skip


def reference_step(base: Path, teacher: Path, distillation: dict[str, Any]) -> tuple[float, float]:
    """Return loss and gradient norm of all weights, computed without ftlevel.

    Each row is a batch of its own; the formulas are those of the papers, in a loop over tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(base, **dtype).eval()
    expert = AutoModelForCausalLM.from_pretrained(teacher, **dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    temperature, ratio = distillation.get("kd_temperature", 1.0), distillation.get("kd_ratio", 0.5)
    top_k, beta, name = (
        distillation.get("kd_top_k", 64),
        distillation.get("jsd_beta", 0.5),
        distillation.get("divergence"),
    )
    total, count = torch.zeros(()), 0
    for i in range(ROWS):
        turns = [{"role": "user", "content": create_pair(i)["prompt"]}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": create_pair(i)["chosen"]}], tokenize=False
        ).rstrip()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        logits = model(torch.tensor([ids])).logits[0]
        with torch.no_grad():
            teacher_logits = expert(torch.tensor([ids])).logits[0]
        for position in range(prompt - 1, len(ids) - 1):
            p, q = (
                (teacher_logits[position] / temperature).softmax(-1),
                (logits[position] / temperature).softmax(-1),
            )
            if top_k != "all":
                top_tokens = p.topk(top_k).indices
                p, q = (torch.cat([x[top_tokens], 1 - x[top_tokens].sum()[None]]) for x in (p, q))
            if name == "reverse-kl":
                distance = (q * (q / p).log()).sum()
            elif name == "jsd":
                mixed = beta * p + (1 - beta) * q
                distance = beta * (p * (p / mixed).log()).sum()
                distance = distance + (1 - beta) * (q * (q / mixed).log()).sum()
            else:
                distance = (p * (p / q).log()).sum()
            entropy = functional.cross_entropy(logits[position], torch.tensor(ids[position + 1]))
            total = total + (1 - ratio) * entropy + ratio * temperature**2 * distance
            count += 1
    loss = total / count
    loss.backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    return loss.item(), squares**0.5


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "forward": ({"kd_top_k": "all", "kd_ratio": 0.7, "kd_temperature": 2.0}, {}),
    "reverse, plain step": (
        {"kd_top_k": "all", "divergence": "reverse-kl"}, {"speed": {"fast": False}}),
    "jsd, small micro-batches": (
        {"kd_top_k": "all", "divergence": "jsd", "jsd_beta": 0.3, "kd_ratio": 1},
        {"speed": {"tokens_per_micro_batch": 120}}),
    "forward, top 5": ({"kd_top_k": 5}, {}),
    "reverse, top 20, padded": (
        {"kd_top_k": 20, "divergence": "reverse-kl", "kd_temperature": 3.0},
        {"speed": {"pack": False}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_first_step_matches_reference(name: str, tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    distillation, overrides = CASES[name]
    data, base = write_rows(tmp_path / "data", rows=ROWS), tiny_model_dir("llama", chat=True)
    teacher = tiny_model_dir("llama", chat=True, seed=5, num_hidden_layers=3)
    out = tmp_path / "run"
    train_with_teacher(base, data, out, {"teacher": str(teacher), **distillation},
                       method={"kind": "full"}, train={"max_steps": 1}, **overrides)  # fmt: skip
    expected = reference_step(base, teacher, distillation)
    assert losses(out)[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_teacher_predictions_are_cached_and_completed(
    tiny_model_dir: ModelDir, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, base = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    distillation = {"teacher": str(tiny_model_dir("llama", seed=5)), "kd_top_k": 10}
    first = train_with_teacher(base, data, tmp_path / "1", distillation).summary["distillation"]
    assert not first["cached"]
    assert 0 < first["probability_kept"] < 1
    [file] = cache_dir.glob("teacher-*.npy")
    predictions = np.lib.format.open_memmap(file, mode="r+")
    assert (len(predictions), predictions.nbytes) == (first["places"], first["bytes"])
    assert np.allclose(np.exp(predictions["known"]).sum(-1), 1, atol=1e-5)
    predictions["known"][7, 0] = np.nan  # as of a run that was killed
    predictions.flush()
    second = train_with_teacher(base, data, tmp_path / "2", distillation).summary["distillation"]
    assert not second["cached"]
    assert losses(tmp_path / "2") == losses(tmp_path / "1")
    monkeypatch.setattr(teacher_module, "_fill", lambda *_: pytest.fail("asked again"))
    assert train_with_teacher(base, data, tmp_path / "3", distillation).summary["distillation"][
        "cached"
    ]
    assert losses(tmp_path / "3") == losses(tmp_path / "1")


def test_distilled_run_is_resumed_evaluated_and_merged(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, base = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    distillation = {"teacher": str(tiny_model_dir("llama", seed=5))}
    steps = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant",
             "per_device_train_batch_size": 4}  # fmt: skip
    quant = {"method": {"kind": "qlora"}, "speed": {"verify": True}}
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    summary = train_with_teacher(
        base, data, uninterrupted, distillation, train=steps, **quant
    ).summary
    assert summary["speed"]["verified"]["loss"] < 1e-4
    assert losses(uninterrupted)[-1][0] < losses(uninterrupted)[0][0]
    train_with_teacher(
        base, data, interrupted, distillation, train={**steps, "max_steps": 2}, **quant
    )
    train_with_teacher(
        base, data, interrupted, distillation, train=steps, output={"resume": True}, **quant
    )
    assert losses(interrupted)[2:] == losses(uninterrupted)[2:]
    evaluation = evaluate(EvaluateConfig(name=str(uninterrupted), resamples=0, device="cpu"))
    assert evaluation.metrics == pytest.approx(summary["metrics"], abs=1e-4)
    merged = merge(MergeConfig(adapters=[str(uninterrupted)], output_dir=tmp_path / "merged"))
    assert merged.summary["verified"]


@pytest.mark.slow
def test_two_processes_match_losses_of_one(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    command = ["train", "--model", str(model), "--dataset",
               str(data), "--map", "prompt=prompt", "--map", "completion=chosen", "--teacher",
               str(tiny_model_dir("llama", seed=5)), "--divergence", "jsd", "--max-steps", "3",
               "--dtype", "float32", "--learning-rate", "0.01", "--logging-steps", "1",
               "--quiet"]  # fmt: skip
    for count, size in ((1, 6), (2, 3)):
        forked.run(*command, "--num-processes", str(count), "--per-device-train-batch-size",
                   str(size), "--output-dir", str(tmp_path / str(count)))  # fmt: skip
    one_process, two_processes = (np.array(losses(tmp_path / name)) for name in ("1", "2"))
    assert two_processes == pytest.approx(one_process, rel=1e-4)


@pytest.mark.slow
def test_encoder_decoder_distillation_loss_matches_reference(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    data, base = write_rows(tmp_path / "data", rows=ROWS), tiny_model_dir("t5", dropout_rate=0.0)
    teacher = tiny_model_dir("t5", seed=5)
    distillation = {"teacher": str(teacher), "kd_top_k": "all", "kd_ratio": 1}
    train_with_teacher(
        base, data, tmp_path / "run", distillation, method={"kind": "full"}, train={"max_steps": 1}
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    student, teacher_model = (
        AutoModelForSeq2SeqLM.from_pretrained(path).eval() for path in (base, teacher)
    )
    total, count = 0.0, 0
    for i in range(ROWS):
        batch = tokenizer(
            [create_pair(i)["prompt"]], text_target=[create_pair(i)["chosen"]], return_tensors="pt"
        )
        if batch["labels"][0, -1] != tokenizer.eos_token_id:
            labels = [[*batch["labels"][0].tolist(), tokenizer.eos_token_id]]
            batch["labels"] = torch.tensor(labels)
        with torch.no_grad():
            p, q = (model(**batch).logits[0].log_softmax(-1) for model in (teacher_model, student))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert losses(tmp_path / "run")[0][0] == pytest.approx(total / count, rel=1e-5)


def test_unusable_teacher_raises(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, base = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    with pytest.raises(InputError, match="its tokenizer differs"):
        train_with_teacher(base, data, tmp_path / "run", {"teacher": str(tiny_model_dir("qwen2"))})
    assert not (tmp_path / "run").exists()
    full = {"teacher": str(tiny_model_dir("llama", seed=5)), "kd_top_k": "all"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(InputError, match="--teacher: its predictions take"):
            train_with_teacher(base, data, tmp_path / "run", full)
