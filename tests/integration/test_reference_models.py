"""Reference models of preference training, compared with plain PEFT."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.extras.preference import likelihoods
from preference_runs import create_pair, losses, run, write_rows
from run_files import ModelDir

COLUMNS = {"columns": {"prompt": "prompt", "completion": "chosen"}}


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache in each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ftlevel" / "rows"


def train_sft(base: Path, data: Path, out: Path) -> Path:
    """Train a supervised run on the chosen answers."""
    run(base, data, out, task="text-generation", preference={"loss": None}, data=COLUMNS)
    return out


def reference_log_likelihoods(base: Path, adapter: Path | None, rows: range) -> list[float]:
    """Return log-likelihoods of both answers of each pair, by transformers and PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer, log_likelihoods = AutoTokenizer.from_pretrained(base), []
    for i in rows:
        turns = [{"role": "user", "content": create_pair(i)["prompt"]}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for answer in (create_pair(i)["chosen"], create_pair(i)["rejected"]):
            text = tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer}], tokenize=False
            ).rstrip()
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                log_probabilities = log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
            answer_log_probabilities = log_probabilities.gather(-1, torch.tensor(ids[1:])[:, None])[
                prompt - 1 :
            ]
            log_likelihoods.append(float(answer_log_probabilities.sum()))
    return log_likelihoods


def test_reference_run_is_used_in_training_and_evaluation(
    tiny_model_dir: ModelDir, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama", chat=True)
    reference = train_sft(model, data, tmp_path / "sft")
    out = tmp_path / "dpo"
    one_batch = {"per_device_train_batch_size": 16}
    summary = run(
        model, data, out, preference={"reference": str(reference)}, train=one_batch
    ).summary
    expected = reference_log_likelihoods(model, reference / "adapter", range(22))
    cached = {len(np.load(file)): np.load(file) for file in cache_dir.glob("reference-*.npy")}
    assert cached[16].flatten() == pytest.approx(expected[:32], abs=1e-3)
    assert cached[6].flatten() == pytest.approx(expected[32:], abs=1e-3)
    metrics = summary["metrics"]
    assert metrics["ref_logp_chosen"] == pytest.approx(np.mean(expected[32::2]), abs=1e-3)
    base = np.array(reference_log_likelihoods(model, None, range(16)))  # the initial policy
    ratios = (base - expected[:32])[::2] - (base - expected[:32])[1::2]
    assert losses(out)[0][0] == pytest.approx(np.mean(np.log1p(np.exp(-0.1 * ratios))), abs=1e-5)
    assert abs(losses(out)[0][0] - math.log(2)) > 1e-3
    assert summary["reference"]["is"] == str(reference)
    assert "first_loss" not in summary["reference"]
    evaluation = evaluate(EvaluateConfig(name=str(out), resamples=0, device="cpu"))
    assert evaluation.metrics == pytest.approx(metrics, abs=1e-4)
    monkeypatch.setattr(likelihoods, "_fill", lambda *_: pytest.fail("computed again"))
    second_run = run(
        model, data, tmp_path / "2", preference={"reference": str(reference)}, train=one_batch
    )
    assert second_run.summary["reference"]["cached"]


@pytest.mark.slow
def test_named_start_adapter_equals_reference_start(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    sft_run = train_sft(model, data, tmp_path / "sft")
    for name, reference in (("start", "start"), ("named", str(sft_run))):
        run(model, data, tmp_path / name, model={"adapter": str(sft_run)},
            preference={"reference": reference})  # fmt: skip
    start_losses, named_losses = (np.array(losses(tmp_path / name)) for name in ("start", "named"))
    assert named_losses == pytest.approx(start_losses, rel=1e-4)
    assert named_losses[0][0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_reference_may_move_but_not_change(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    data, model = write_rows(folder / "data"), tiny_model_dir("llama")
    reference = train_sft(model, data, folder / "sft")
    overrides = {"preference": {"reference": str(reference)}, "method": {"kind": "full"}}
    metrics = run(model, data, folder / "dpo", **overrides).summary["metrics"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    config = EvaluateConfig(name=str(moved / "dpo"), resamples=0, device="cpu")
    assert evaluate(config).metrics == pytest.approx(metrics, abs=1e-4)
    train_sft(
        model, write_rows(tmp_path / "others", lambda i: create_pair(i + 40)), tmp_path / "other"
    )
    shutil.rmtree(moved / "sft")
    shutil.copytree(tmp_path / "other", moved / "sft")
    with pytest.raises(InputError, match="has other weights than in training"):
        evaluate(config)


def test_resume_requires_same_reference(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    reference = tiny_model_dir("llama", seed=3)
    steps = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    overrides = {"preference": {"reference": str(reference)}}
    run(model, data, tmp_path / "whole", train=steps, **overrides)
    run(model, data, tmp_path / "broken", train={**steps, "max_steps": 2}, **overrides)
    resume = {"output": {"resume": True}, "train": steps}
    with pytest.raises(ConfigError, match=r"preference\.reference"):
        run(model, data, tmp_path / "broken", preference={"reference": str(model)}, **resume)
    run(model, data, tmp_path / "broken", **overrides, **resume)
    assert losses(tmp_path / "broken")[2:] == losses(tmp_path / "whole")[2:]


def test_unusable_reference_raises(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    for name, message in (
        (tmp_path / "nowhere", "--reference .*nowhere"),
        (tiny_model_dir("qwen2"), "its tokenizer differs"),
        (tiny_model_dir("t5"), "is an encoder-decoder, and the model that is trained is a decoder"),
    ):
        with pytest.raises((ConfigError, InputError), match=message):
            run(model, data, tmp_path / "run", preference={"reference": str(name)})
    reward = tmp_path / "reward"
    run(model, data, reward, "reward", train={"max_steps": 1})
    with pytest.raises(InputError, match="it writes no text"):
        run(model, data, tmp_path / "run", preference={"reference": str(reward)})
    sft_run = train_sft(model, data, tmp_path / "sft")
    with pytest.raises(ConfigError, match="contains --reference"):
        run(
            model, data, sft_run, preference={"reference": str(sft_run)}, output={"overwrite": True}
        )
    assert json.loads((sft_run / "summary.json").read_text())["task"] == "text-generation"
