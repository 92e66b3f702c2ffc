"""Preference training: whole runs on tiny models of every kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

import forked
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.merge import merge
from ftlevel.commands.predict import predict
from ftlevel.config import EvaluateConfig, MergeConfig, PredictConfig
from ftlevel.training import reference
from preference_runs import judged, losses, pair, run, write

ModelDir = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let no test read what another one kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ftlevel" / "rows"


CELLS = [
    ("llama", None, "dpo", {}),
    pytest.param("llama", None, "ld-dpo", {}, marks=pytest.mark.sweep),
    pytest.param("qwen2", None, "kto", {}, marks=pytest.mark.sweep),
    ("gpt2", None, "orpo", {}),
    ("t5", None, "dpo", {}),
    ("bart", None, "kto", {}),
    pytest.param("llama", None, "reward", {}, marks=pytest.mark.sweep),
    ("bert", "mlm", "reward", {}),
]


@pytest.mark.parametrize(("family", "head", "loss", "more"), CELLS)
def test_trains_evaluates_and_says_the_same_afterwards(
    family: str, head: str | None, loss: str, more: Any, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = write(tmp_path / "data")
    result = run(tiny_model_dir(family, head, **more), data, tmp_path / "run", loss)
    summary = result.summary
    assert summary["task"] == ("reward" if loss == "reward" else "preference")
    assert summary["headline"] in summary["metrics"]
    assert summary["proof"]["reload_difference"] <= 1e-4
    assert all(map(math.isfinite, summary["metrics"].values()))
    again = evaluate(EvaluateConfig(name=str(tmp_path / "run"), resamples=20, device="cpu"))
    assert again.metrics == pytest.approx(summary["metrics"], abs=2e-5)
    assert set(again.summary["intervals"]) >= {"loss", summary["headline"]}
    if loss == "dpo" and family == "llama":
        assert again.base["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert again.base["reward_margin"] == 0


METHODS = {
    "pissa": {"kind": "lora", "init_lora_weights": "pissa"},
    "adapter": {"kind": "adapter"},
    "prefix": {"kind": "prefix"},
    "full": {"kind": "full"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["pissa", pytest.param("adapter", marks=pytest.mark.sweep), "prefix", "full"]
)
def test_the_first_loss_is_ln_2_with_every_method(
    name: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = write(tmp_path / "data")
    out = tmp_path / "run"
    method = METHODS[name] or {"kind": name}
    summary = run(tiny_model_dir("llama"), data, out, method=method).summary
    assert losses(out)[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["reference"]["first_loss_expected"] == math.log(2)
    again = evaluate(EvaluateConfig(name=str(out), resamples=0, device="cpu"))
    assert again.metrics == pytest.approx(summary["metrics"], abs=1e-4)


def test_the_reference_is_what_plain_transformers_says(
    tiny_model_dir: ModelDir, tmp_path: Path, own_cache: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, data = tiny_model_dir("llama", chat=True), write(tmp_path / "data", rows=8)
    run(path, data, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = []
    for i in range(8):
        row = pair(i)
        turns = [{"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for answer in (row["chosen"], row["rejected"]):
            whole = tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer}], tokenize=False
            ).rstrip()
            assert whole.startswith(start)
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                each = log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
            own = each.gather(-1, torch.tensor(ids[1:])[:, None])[prompt - 1 :]
            expected.append(float(own.sum()))
    kept = [np.load(file) for file in own_cache.glob("reference-*.npy")]
    [train_rows] = [rows for rows in kept if len(rows) == 8]
    assert train_rows.flatten() == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "ways"),
    [
        ("kto", ("2x4", "tokens", "plain")),
        ("rpo", ("2x4",)),
        pytest.param("rpo", ("2x4", "tokens", "plain"), marks=pytest.mark.sweep),
    ],
)
def test_a_step_is_the_same_in_any_number_of_micro_batches_and_processes(
    loss: str, ways: tuple[str, ...], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    more: dict[str, Any] = {"preference": {"nll_mean": "token"}} if loss == "rpo" else {}
    curves = []
    for name, train_, speed in (
        ("8", {"per_device_train_batch_size": 8}, {}),
        ("2x4", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
        ("tokens", {"per_device_train_batch_size": 8}, {"tokens_per_micro_batch": 100}),
        ("plain", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
         {"fast": False}),
    ):  # fmt: skip
        if name in ("8", *ways):
            run(model, data, tmp_path / name, loss, train=train_, speed=speed, **more)
            curves.append(losses(tmp_path / name))
    assert curves[1] == curves[0]
    for curve in curves[2:]:
        assert np.array(curve) == pytest.approx(np.array(curves[0]), rel=2e-4)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    command = ["train", "--task", "preference", "--loss", "kto",
               "--model", str(model), "--dataset", str(data), "--max-steps", "3", "--dtype",
               "float32", "--learning-rate", "0.01", "--logging-steps", "1", "--quiet"]  # fmt: skip
    for count, size in ((1, 8), (2, 4)):
        out = tmp_path / str(count)
        forked.run(*command, "--num-processes", str(count), "--per-device-train-batch-size",
                   str(size), "--output-dir", str(out))  # fmt: skip
    one, two = (np.array(losses(tmp_path / name)) for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_with_the_reference_that_it_had(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    run(model, data, whole, train=steps)
    run(model, data, broken, train={**steps, "max_steps": 2})
    run(model, data, broken, train=steps, output={"dir": str(broken), "resume": True,
                                                  "allow_change": ["train.max_steps"]})  # fmt: skip
    assert losses(broken)[2:] == losses(whole)[2:]


@pytest.mark.slow
def test_the_reference_is_kept_and_read_and_filled_where_it_is_not_whole(
    tiny_model_dir: ModelDir, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    first = run(model, data, tmp_path / "1").summary
    assert not first["reference"]["cached"]
    monkeypatch.setattr(reference, "_fill", lambda *_: pytest.fail("computed again"))
    second = run(model, data, tmp_path / "2", method={"kind": "lora", "r": 8}).summary
    assert second["reference"]["cached"]
    assert losses(tmp_path / "2") == losses(tmp_path / "1")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parents[1]))
    for file in own_cache.glob("reference-*.npy"):
        known = np.lib.format.open_memmap(file, mode="r+")
        known[3] = np.nan  # as of a run that was killed
        known.flush()
    third = run(model, data, tmp_path / "3").summary
    assert not third["reference"]["cached"]
    assert losses(tmp_path / "3") == losses(tmp_path / "1")


@pytest.mark.slow
def test_sft_then_dpo_then_merge_with_one_adapter(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    columns = {"prompt": "prompt", "completion": "chosen"}
    run(model, data, tmp_path / "sft", task="text-generation", preference={"loss": None},
        data={"columns": columns})  # fmt: skip
    result = run(model, data, tmp_path / "dpo", model={"adapter": str(tmp_path / "sft")})
    assert losses(tmp_path / "dpo")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    again = evaluate(EvaluateConfig(name=str(tmp_path / "dpo"), resamples=0, device="cpu"))
    assert again.metrics == pytest.approx(result.summary["metrics"], abs=1e-4)
    assert again.base["ref_logp_chosen"] == again.metrics["ref_logp_chosen"]
    assert again.base["logp_chosen"] != pytest.approx(again.base["ref_logp_chosen"], abs=1e-2)
    merged = tmp_path / "merged"
    told = merge(MergeConfig(adapters=[str(tmp_path / "dpo")], output_dir=merged)).summary
    assert told["agreement"]["loss"] < math.log(1000)  # a token's, of some 700
    alone = evaluate(EvaluateConfig(name=str(merged), dataset=str(data / "validation.jsonl"),
                                    resamples=0, device="cpu"))  # fmt: skip
    assert alone.metrics["logp_chosen"] == pytest.approx(again.metrics["logp_chosen"], abs=1e-3)
    assert "reward_accuracy" not in alone.metrics
    assert math.isfinite(alone.metrics["loss"])


@pytest.mark.slow
def test_dropout_is_on_in_the_policy_and_off_in_the_reference(
    tiny_model_dir: ModelDir, tmp_path: Path, own_cache: Path
) -> None:
    data, model = write(tmp_path / "data"), tiny_model_dir("llama")
    columns = {"prompt": "prompt", "completion": "chosen"}
    run(model, data, tmp_path / "sft", task="text-generation", preference={"loss": None},
        data={"columns": columns})  # fmt: skip
    plain = run(model, data, tmp_path / "plain", model={"adapter": str(tmp_path / "sft")})
    dropped = run(model, data, tmp_path / "dropped", model={"adapter": str(tmp_path / "sft")},
                  method={"kind": "lora", "lora_dropout": 0.5})  # fmt: skip
    references = [result.summary["metrics"]["ref_logp_chosen"] for result in (plain, dropped)]
    assert references[0] == references[1]
    kept = [np.load(file) for file in own_cache.glob("reference-*.npy")]
    one, other = (rows for rows in kept if len(rows) == 16)
    assert one == pytest.approx(other, abs=1e-3)  # packed otherwise
    first = dropped.summary["reference"]
    assert abs(first["first_loss"] - first["first_loss_expected"]) > 1e-4


def test_a_reward_model_scores_answers(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = write(tmp_path / "data", lambda i: {**pair(i), "margin": i % 3})
    run(tiny_model_dir("llama"), data, tmp_path / "run", "reward", preference={"center": 0.01})
    rows = [{"prompt": pair(i)["prompt"], "completion": pair(i)["chosen"]} for i in range(16, 22)]
    told = predict(PredictConfig(name=str(tmp_path / "run"), device="cpu"), rows).rows or []
    found = evaluate(EvaluateConfig(name=str(tmp_path / "run"), resamples=0, device="cpu"))
    scores = [row["prediction"] for row in told]
    assert np.mean(scores) == pytest.approx(found.metrics["score_chosen"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["eos", "another"])
def test_a_reward_model_reads_the_end_of_the_answer_whatever_its_padding_is(
    pad: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = tiny_model_dir("llama", chat=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    own = tmp_path / "model"
    own.mkdir()
    for file in path.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else tokenizer.unk_token
    tokenizer.save_pretrained(own)
    settings = json.loads((own / "config.json").read_text())
    settings["pad_token_id"] = tokenizer.pad_token_id
    (own / "config.json").write_text(json.dumps(settings))
    result = run(own, write(tmp_path / "data"), tmp_path / "run", "reward")
    model = result.model.eval()
    texts = [f"{pair(0)['prompt']}\n{pair(0)['chosen']}", pair(1)["prompt"]]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    with torch.no_grad():
        alone = [model(torch.tensor([row])).logits.item() for row in ids]
        without = [model(torch.tensor([row[:-1]])).logits.item() for row in ids]
    assert all(abs(a - b) > 1e-6 for a, b in zip(alone, without, strict=True))


@pytest.mark.slow
def test_four_bit_bases_are_their_own_reference(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    run(tiny_model_dir("llama"), data, tmp_path / "run", method={"kind": "qlora"})
    assert losses(tmp_path / "run")[0][0] == pytest.approx(math.log(2), abs=1e-6)


def testjudged_answers_need_no_pairs(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = write(tmp_path / "data", judged)
    summary = run(tiny_model_dir("llama"), data, tmp_path / "run", "kto").summary
    assert {"kl", "reward_margin", "logp_desirable"} <= set(summary["metrics"])
    assert summary["metrics"]["kl"] >= 0
