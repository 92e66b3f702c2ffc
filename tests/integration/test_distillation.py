"""Distillation, compared with plain scripts of torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
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
from ftlevel.training import teacher as asking
from preference_runs import losses, pair, run, write

ModelDir = Callable[..., Path]
ROWS = 8
COLUMNS = {"columns": {"prompt": "prompt", "completion": "chosen"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let no test read what another one kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ftlevel" / "rows"


def distil(base: Path, data: Path, out: Path, told: dict[str, Any], **more: Any) -> Any:
    """Train on the chosen answers and a teacher."""
    train = {"per_device_train_batch_size": ROWS, "max_grad_norm": 0, **more.pop("train", {})}
    task = more.pop("task", "text-generation")
    return run(base, data, out, task=task, preference={"loss": None}, distillation=told,
               train=train, data=COLUMNS, **more)  # fmt: skip


def plain_step(base: Path, teacher: Path, told: dict[str, Any]) -> tuple[float, float]:
    """Return loss and norm of the gradient of all weights, by a script that shares no code.

    Each row alone, all scores, the formulas as in the papers, a loop over tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(base, **kind).eval()
    expert = AutoModelForCausalLM.from_pretrained(teacher, **kind).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    heat, ratio = told.get("kd_temperature", 1.0), told.get("kd_ratio", 0.5)
    top, beta, name = told.get("kd_top_k", 64), told.get("jsd_beta", 0.5), told.get("divergence")
    total, count = torch.zeros(()), 0
    for i in range(ROWS):
        turns = [{"role": "user", "content": pair(i)["prompt"]}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": pair(i)["chosen"]}], tokenize=False
        ).rstrip()
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        own = model(torch.tensor([ids])).logits[0]
        with torch.no_grad():
            other = expert(torch.tensor([ids])).logits[0]
        for at in range(prompt - 1, len(ids) - 1):
            p, q = (other[at] / heat).softmax(-1), (own[at] / heat).softmax(-1)
            if top != "all":
                likely = p.topk(top).indices
                p, q = (torch.cat([x[likely], 1 - x[likely].sum()[None]]) for x in (p, q))
            if name == "reverse-kl":
                distance = (q * (q / p).log()).sum()
            elif name == "jsd":
                mixed = beta * p + (1 - beta) * q
                distance = beta * (p * (p / mixed).log()).sum()
                distance = distance + (1 - beta) * (q * (q / mixed).log()).sum()
            else:
                distance = (p * (p / q).log()).sum()
            entropy = functional.cross_entropy(own[at], torch.tensor(ids[at + 1]))
            total = total + (1 - ratio) * entropy + ratio * heat**2 * distance
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
    "forward of a few": ({"kd_top_k": 5}, {}),
    "reverse of a few, padded": (
        {"kd_top_k": 20, "divergence": "reverse-kl", "kd_temperature": 3.0},
        {"speed": {"pack": False}}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_is_that_of_a_plain_script(
    name: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    told, more = CASES[name]
    data, base = write(tmp_path / "data", rows=ROWS), tiny_model_dir("llama", chat=True)
    teacher = tiny_model_dir("llama", chat=True, seed=5, num_hidden_layers=3)
    out = tmp_path / "run"
    distil(base, data, out, {"teacher": str(teacher), **told}, method={"kind": "full"},
           train={"max_steps": 1}, **more)  # fmt: skip
    expected = plain_step(base, teacher, told)
    assert losses(out)[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_what_the_teacher_said_is_kept_and_filled_where_it_is_not_whole(
    tiny_model_dir: ModelDir, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, base = write(tmp_path / "data"), tiny_model_dir("llama")
    told = {"teacher": str(tiny_model_dir("llama", seed=5)), "kd_top_k": 10}
    first = distil(base, data, tmp_path / "1", told).summary["distillation"]
    assert not first["cached"]
    assert 0 < first["probability_kept"] < 1
    [file] = own_cache.glob("teacher-*.npy")
    kept = np.lib.format.open_memmap(file, mode="r+")
    assert (len(kept), kept.nbytes) == (first["places"], first["bytes"])
    assert np.allclose(np.exp(kept["known"]).sum(-1), 1, atol=1e-5)
    kept["known"][7, 0] = np.nan  # as of a run that was killed
    kept.flush()
    second = distil(base, data, tmp_path / "2", told).summary["distillation"]
    assert not second["cached"]
    assert losses(tmp_path / "2") == losses(tmp_path / "1")
    monkeypatch.setattr(asking, "_fill", lambda *_: pytest.fail("asked again"))
    assert distil(base, data, tmp_path / "3", told).summary["distillation"]["cached"]
    assert losses(tmp_path / "3") == losses(tmp_path / "1")


def test_a_run_with_a_teacher_is_evaluated_merged_and_gone_on_with_as_any(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, base = write(tmp_path / "data"), tiny_model_dir("llama")
    told = {"teacher": str(tiny_model_dir("llama", seed=5))}
    steps = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant",
             "per_device_train_batch_size": 4}  # fmt: skip
    quant = {"method": {"kind": "qlora"}, "speed": {"verify": True}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = distil(base, data, whole, told, train=steps, **quant).summary
    assert summary["speed"]["verified"]["loss"] < 1e-4
    assert losses(whole)[-1][0] < losses(whole)[0][0]
    distil(base, data, broken, told, train={**steps, "max_steps": 2}, **quant)
    distil(base, data, broken, told, train=steps, output={"resume": True}, **quant)
    assert losses(broken)[2:] == losses(whole)[2:]
    again = evaluate(EvaluateConfig(name=str(whole), resamples=0, device="cpu"))
    assert again.metrics == pytest.approx(summary["metrics"], abs=1e-4)
    merged = merge(MergeConfig(adapters=[str(whole)], output_dir=tmp_path / "merged"))
    assert merged.summary["verified"]


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    command = ["train", "--model", str(model), "--dataset",
               str(data), "--map", "prompt=prompt", "--map", "completion=chosen", "--teacher",
               str(tiny_model_dir("llama", seed=5)), "--divergence", "jsd", "--max-steps", "3",
               "--dtype", "float32", "--learning-rate", "0.01", "--logging-steps", "1",
               "--quiet"]  # fmt: skip
    for count, size in ((1, 6), (2, 3)):
        forked.run(*command, "--num-processes", str(count), "--per-device-train-batch-size",
                   str(size), "--output-dir", str(tmp_path / str(count)))  # fmt: skip
    one, two = (np.array(losses(tmp_path / name)) for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_an_encoder_decoder_learns_from_its_elder(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    data, base = write(tmp_path / "data", rows=ROWS), tiny_model_dir("t5", dropout_rate=0.0)
    elder = tiny_model_dir("t5", seed=5)
    told = {"teacher": str(elder), "kd_top_k": "all", "kd_ratio": 1}
    distil(base, data, tmp_path / "run", told, method={"kind": "full"}, train={"max_steps": 1})
    tokenizer = AutoTokenizer.from_pretrained(base)
    own, other = (AutoModelForSeq2SeqLM.from_pretrained(path).eval() for path in (base, elder))
    total, count = 0.0, 0
    for i in range(ROWS):
        batch = tokenizer([pair(i)["prompt"]], text_target=[pair(i)["chosen"]], return_tensors="pt")
        if batch["labels"][0, -1] != tokenizer.eos_token_id:
            ended = [[*batch["labels"][0].tolist(), tokenizer.eos_token_id]]
            batch["labels"] = torch.tensor(ended)
        with torch.no_grad():
            p, q = (model(**batch).logits[0].log_softmax(-1) for model in (other, own))
        total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    assert losses(tmp_path / "run")[0][0] == pytest.approx(total / count, rel=1e-5)


def test_a_teacher_that_cannot_be_asked_is_refused(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, base = write(tmp_path / "data"), tiny_model_dir("llama")
    with pytest.raises(InputError, match="its tokenizer differs"):
        distil(base, data, tmp_path / "run", {"teacher": str(tiny_model_dir("qwen2"))})
    assert not (tmp_path / "run").exists()
    full = {"teacher": str(tiny_model_dir("llama", seed=5)), "kd_top_k": "all"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asking.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(InputError, match="--teacher: its predictions take"):
            distil(base, data, tmp_path / "run", full)
