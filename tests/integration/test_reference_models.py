"""Reference models of preference training, compared with plain PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from ftlevel.commands.evaluate import evaluate
from ftlevel.config import EvaluateConfig
from ftlevel.errors import ConfigError, InputError
from ftlevel.training import reference as fill
from preference_runs import losses, pair, run, write

ModelDir = Callable[..., Path]
COLUMNS = {"columns": {"prompt": "prompt", "completion": "chosen"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let no test read what another one kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ftlevel" / "rows"


def sft(base: Path, data: Path, out: Path) -> Path:
    """Train a supervised run on the chosen answers."""
    run(base, data, out, task="text-generation", preference={"loss": None}, data=COLUMNS)
    return out


def plain_likelihoods(base: Path, adapter: Path | None, rows: range) -> list[float]:
    """Return how likely plain transformers and PEFT find both answers of each pair."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for i in rows:
        turns = [{"role": "user", "content": pair(i)["prompt"]}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for answer in (pair(i)["chosen"], pair(i)["rejected"]):
            whole = tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer}], tokenize=False
            ).rstrip()
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                each = log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
            own = each.gather(-1, torch.tensor(ids[1:])[:, None])[prompt - 1 :]
            found.append(float(own.sum()))
    return found


def test_another_run_is_the_reference_in_training_and_afterwards(
    tiny_model_dir: ModelDir, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama", chat=True)
    reference = sft(model, data, tmp_path / "sft")
    out = tmp_path / "dpo"
    whole = {"per_device_train_batch_size": 16}
    summary = run(model, data, out, preference={"reference": str(reference)}, train=whole).summary
    expected = plain_likelihoods(model, reference / "adapter", range(22))
    kept = {len(np.load(file)): np.load(file) for file in own_cache.glob("reference-*.npy")}
    assert kept[16].flatten() == pytest.approx(expected[:32], abs=1e-3)
    assert kept[6].flatten() == pytest.approx(expected[32:], abs=1e-3)
    metrics = summary["metrics"]
    assert metrics["ref_logp_chosen"] == pytest.approx(np.mean(expected[32::2]), abs=1e-3)
    base = np.array(plain_likelihoods(model, None, range(16)))  # as which the policy begins
    ratios = (base - expected[:32])[::2] - (base - expected[:32])[1::2]
    assert losses(out)[0][0] == pytest.approx(np.mean(np.log1p(np.exp(-0.1 * ratios))), abs=1e-5)
    assert abs(losses(out)[0][0] - math.log(2)) > 1e-3
    assert summary["reference"]["is"] == str(reference)
    assert "first_loss" not in summary["reference"]
    asked = evaluate(EvaluateConfig(name=str(out), resamples=0, device="cpu"))
    assert asked.metrics == pytest.approx(metrics, abs=1e-4)
    monkeypatch.setattr(fill, "_fill", lambda *_: pytest.fail("computed again"))
    again = run(model, data, tmp_path / "2", preference={"reference": str(reference)}, train=whole)
    assert again.summary["reference"]["cached"]


@pytest.mark.slow
def test_a_run_that_is_its_own_start_has_the_loss_of_a_run_without_a_name(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    began = sft(model, data, tmp_path / "sft")
    for name, reference in (("start", "start"), ("named", str(began))):
        run(model, data, tmp_path / name, model={"adapter": str(began)},
            preference={"reference": reference})  # fmt: skip
    own, named = (np.array(losses(tmp_path / name)) for name in ("start", "named"))
    assert named == pytest.approx(own, rel=1e-4)
    assert named[0][0] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.slow
def test_the_reference_moves_with_its_run_and_may_not_change(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    data, model = write(folder / "data"), tiny_model_dir("llama")
    reference = sft(model, data, folder / "sft")
    told = {"preference": {"reference": str(reference)}, "method": {"kind": "full"}}
    first = run(model, data, folder / "dpo", **told).summary["metrics"]
    moved = tmp_path / "moved"
    folder.rename(moved)
    question = EvaluateConfig(name=str(moved / "dpo"), resamples=0, device="cpu")
    assert evaluate(question).metrics == pytest.approx(first, abs=1e-4)
    sft(model, write(tmp_path / "others", lambda i: pair(i + 40)), tmp_path / "other")
    shutil.rmtree(moved / "sft")
    shutil.copytree(tmp_path / "other", moved / "sft")
    with pytest.raises(InputError, match="has other weights than in training"):
        evaluate(question)


def test_a_run_goes_on_only_with_the_same_reference(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    other = tiny_model_dir("llama", seed=3)
    steps = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    told = {"preference": {"reference": str(other)}}
    run(model, data, tmp_path / "whole", train=steps, **told)
    run(model, data, tmp_path / "broken", train={**steps, "max_steps": 2}, **told)
    going_on = {"output": {"resume": True}, "train": steps}
    with pytest.raises(ConfigError, match=r"preference\.reference"):
        run(model, data, tmp_path / "broken", preference={"reference": str(model)}, **going_on)
    run(model, data, tmp_path / "broken", **told, **going_on)
    assert losses(tmp_path / "broken")[2:] == losses(tmp_path / "whole")[2:]


def test_what_cannot_be_asked_is_refused(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    for name, words in (
        (tmp_path / "nowhere", "--reference .*nowhere"),
        (tiny_model_dir("qwen2"), "its tokenizer differs"),
        (tiny_model_dir("t5"), "is an encoder-decoder, and the model that is trained is a decoder"),
    ):
        with pytest.raises((ConfigError, InputError), match=words):
            run(model, data, tmp_path / "run", preference={"reference": str(name)})
    reward = tmp_path / "reward"
    run(model, data, reward, "reward", train={"max_steps": 1})
    with pytest.raises(InputError, match="it writes no text"):
        run(model, data, tmp_path / "run", preference={"reference": str(reward)})
    began = sft(model, data, tmp_path / "sft")
    with pytest.raises(ConfigError, match="holds --reference"):
        run(model, data, began, preference={"reference": str(began)}, output={"overwrite": True})
    assert json.loads((began / "summary.json").read_text())["task"] == "text-generation"
