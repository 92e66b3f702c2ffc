"""Preference training: complete runs on tiny models of every architecture."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import GPT2Config

import forked
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.merge import merge
from ftlevel.commands.predict import predict
from ftlevel.config import EvaluateConfig, MergeConfig, PredictConfig, TrainConfig
from ftlevel.extras.preference import likelihoods
from preference_runs import create_labeled_answer, create_pair, losses, run, write_rows

ModelDir = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache in each test."""
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


@pytest.mark.parametrize(("family", "head", "loss", "overrides"), CELLS)
def test_evaluation_matches_metrics_of_training(
    family: str,
    head: str | None,
    loss: str,
    overrides: Any,
    tiny_model_dir: ModelDir,
    tmp_path: Path,
) -> None:
    data = write_rows(tmp_path / "data")
    result = run(tiny_model_dir(family, head, **overrides), data, tmp_path / "run", loss)
    summary = result.summary
    assert summary["task"] == ("reward" if loss == "reward" else "preference")
    assert summary["headline"] in summary["metrics"]
    assert summary["proof"]["reload_difference"] <= 1e-4
    assert all(map(math.isfinite, summary["metrics"].values()))
    evaluation = evaluate(EvaluateConfig(name=str(tmp_path / "run"), resamples=20, device="cpu"))
    assert evaluation.metrics == pytest.approx(summary["metrics"], abs=2e-5)
    assert set(evaluation.summary["intervals"]) >= {"loss", summary["headline"]}
    if loss == "dpo" and family == "llama":
        assert evaluation.base["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert evaluation.base["reward_margin"] == 0


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
def test_first_dpo_loss_is_ln_2_for_every_method(
    name: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data")
    out = tmp_path / "run"
    method = METHODS[name] or {"kind": name}
    summary = run(tiny_model_dir("llama"), data, out, method=method).summary
    assert losses(out)[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["reference"]["first_loss_expected"] == math.log(2)
    evaluation = evaluate(EvaluateConfig(name=str(out), resamples=0, device="cpu"))
    assert evaluation.metrics == pytest.approx(summary["metrics"], abs=1e-4)


def test_reference_log_probabilities_match_transformers(
    tiny_model_dir: ModelDir, tmp_path: Path, cache_dir: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, data = tiny_model_dir("llama", chat=True), write_rows(tmp_path / "data", rows=8)
    run(path, data, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    expected = []
    for i in range(8):
        row = create_pair(i)
        turns = [{"role": "user", "content": row["prompt"]}]
        start = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        for answer in (row["chosen"], row["rejected"]):
            text = tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer}], tokenize=False
            ).rstrip()
            assert text.startswith(start)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = len(tokenizer(start, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                log_probabilities = log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
            answer_log_probabilities = log_probabilities.gather(-1, torch.tensor(ids[1:])[:, None])[
                prompt - 1 :
            ]
            expected.append(float(answer_log_probabilities.sum()))
    cached = [np.load(file) for file in cache_dir.glob("reference-*.npy")]
    [train_rows] = [rows for rows in cached if len(rows) == 8]
    assert train_rows.flatten() == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "variants"),
    [
        ("kto", ("2x4", "tokens", "plain")),
        ("rpo", ("2x4",)),
        pytest.param("rpo", ("2x4", "tokens", "plain"), marks=pytest.mark.sweep),
    ],
)
def test_losses_do_not_depend_on_micro_batches(
    loss: str, variants: tuple[str, ...], tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    overrides: dict[str, Any] = {"preference": {"nll_mean": "token"}} if loss == "rpo" else {}
    loss_curves = []
    for name, train_, speed in (
        ("8", {"per_device_train_batch_size": 8}, {}),
        ("2x4", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
        ("tokens", {"per_device_train_batch_size": 8}, {"tokens_per_micro_batch": 100}),
        ("plain", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
         {"fast": False}),
    ):  # fmt: skip
        if name in ("8", *variants):
            run(model, data, tmp_path / name, loss, train=train_, speed=speed, **overrides)
            loss_curves.append(losses(tmp_path / name))
    assert loss_curves[1] == loss_curves[0]
    for curve in loss_curves[2:]:
        assert np.array(curve) == pytest.approx(np.array(loss_curves[0]), rel=2e-4)


@pytest.mark.slow
def test_two_processes_match_losses_of_one(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    command = ["train", "--task", "preference", "--loss", "kto",
               "--model", str(model), "--dataset", str(data), "--max-steps", "3", "--dtype",
               "float32", "--learning-rate", "0.01", "--logging-steps", "1", "--quiet"]  # fmt: skip
    for count, size in ((1, 8), (2, 4)):
        out = tmp_path / str(count)
        forked.run(*command, "--num-processes", str(count), "--per-device-train-batch-size",
                   str(size), "--output-dir", str(out))  # fmt: skip
    one_process, two_processes = (np.array(losses(tmp_path / name)) for name in ("1", "2"))
    assert two_processes == pytest.approx(one_process, rel=1e-4)


@pytest.mark.slow
def test_resumed_run_matches_uninterrupted_run(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    uninterrupted, interrupted = tmp_path / "whole", tmp_path / "broken"
    steps = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant"}
    run(model, data, uninterrupted, train=steps)
    run(model, data, interrupted, train={**steps, "max_steps": 2})
    run(
        model,
        data,
        interrupted,
        train=steps,
        output={"dir": str(interrupted), "resume": True, "allow_change": ["train.max_steps"]},
    )
    assert losses(interrupted)[2:] == losses(uninterrupted)[2:]


@pytest.mark.slow
def test_reference_is_cached_and_completed(
    tiny_model_dir: ModelDir, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    first_summary = run(model, data, tmp_path / "1").summary
    assert not first_summary["reference"]["cached"]
    monkeypatch.setattr(likelihoods, "_fill", lambda *_: pytest.fail("computed again"))
    second_summary = run(model, data, tmp_path / "2", method={"kind": "lora", "r": 8}).summary
    assert second_summary["reference"]["cached"]
    assert losses(tmp_path / "2") == losses(tmp_path / "1")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir.parents[1]))
    for file in cache_dir.glob("reference-*.npy"):
        cached_values = np.lib.format.open_memmap(file, mode="r+")
        cached_values[3] = np.nan  # as left by a killed run
        cached_values.flush()
    third_summary = run(model, data, tmp_path / "3").summary
    assert not third_summary["reference"]["cached"]
    assert losses(tmp_path / "3") == losses(tmp_path / "1")


@pytest.mark.slow
def test_reference_is_computed_again_for_changed_config(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    """The policy then equals the reference at step 1, and the loss is ln 2."""
    data = write_rows(tmp_path / "data")
    model = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    run(model, data, tmp_path / "1")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    summary = run(model, data, tmp_path / "2").summary
    assert not summary["reference"]["cached"]
    assert losses(tmp_path / "2")[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_first_loss_note_names_dropout_of_the_model() -> None:
    planned: Any = SimpleNamespace(
        config=TrainConfig(),
        model=SimpleNamespace(config=GPT2Config(), dtype="float32"),
        objective=SimpleNamespace(first_loss=math.log(2)),
    )
    start = likelihoods.Reference({}, None)
    _, (note,) = likelihoods.check_first_loss(start, planned, [{"step": 1, "loss": 0.7}])
    assert "pdrop 0.1, which the reference does not use" in note


@pytest.mark.slow
def test_sft_dpo_and_merge_with_one_adapter(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    columns = {"prompt": "prompt", "completion": "chosen"}
    run(model, data, tmp_path / "sft", task="text-generation", preference={"loss": None},
        data={"columns": columns})  # fmt: skip
    result = run(model, data, tmp_path / "dpo", model={"adapter": str(tmp_path / "sft")})
    assert losses(tmp_path / "dpo")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    evaluation = evaluate(EvaluateConfig(name=str(tmp_path / "dpo"), resamples=0, device="cpu"))
    assert evaluation.metrics == pytest.approx(result.summary["metrics"], abs=1e-4)
    assert evaluation.base["ref_logp_chosen"] == evaluation.metrics["ref_logp_chosen"]
    assert evaluation.base["logp_chosen"] != pytest.approx(
        evaluation.base["ref_logp_chosen"], abs=1e-2
    )
    merged = tmp_path / "merged"
    merge_summary = merge(MergeConfig(adapters=[str(tmp_path / "dpo")], output_dir=merged)).summary
    assert merge_summary["agreement"]["loss"] < math.log(1000)  # a token's, of some 700
    merged_evaluation = evaluate(
        EvaluateConfig(
            name=str(merged), dataset=str(data / "validation.jsonl"), resamples=0, device="cpu"
        )
    )
    assert merged_evaluation.metrics["logp_chosen"] == pytest.approx(
        evaluation.metrics["logp_chosen"], abs=1e-3
    )
    assert "reward_accuracy" not in merged_evaluation.metrics
    assert math.isfinite(merged_evaluation.metrics["loss"])


@pytest.mark.slow
def test_dropout_affects_policy_but_not_reference(
    tiny_model_dir: ModelDir, tmp_path: Path, cache_dir: Path
) -> None:
    data, model = write_rows(tmp_path / "data"), tiny_model_dir("llama")
    columns = {"prompt": "prompt", "completion": "chosen"}
    run(model, data, tmp_path / "sft", task="text-generation", preference={"loss": None},
        data={"columns": columns})  # fmt: skip
    without_dropout = run(model, data, tmp_path / "plain", model={"adapter": str(tmp_path / "sft")})
    with_dropout = run(model, data, tmp_path / "dropped", model={"adapter": str(tmp_path / "sft")},
                       method={"kind": "lora", "lora_dropout": 0.5})  # fmt: skip
    references = [
        result.summary["metrics"]["ref_logp_chosen"] for result in (without_dropout, with_dropout)
    ]
    assert references[0] == references[1]
    cached = [np.load(file) for file in cache_dir.glob("reference-*.npy")]
    first_cache, second_cache = (rows for rows in cached if len(rows) == 16)
    assert first_cache == pytest.approx(second_cache, abs=1e-3)  # packed differently
    reference = with_dropout.summary["reference"]
    assert abs(reference["first_loss"] - reference["first_loss_expected"]) > 1e-4


def test_reward_model_predictions_match_evaluation(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "data", lambda i: {**create_pair(i), "margin": i % 3})
    run(tiny_model_dir("llama"), data, tmp_path / "run", "reward", preference={"center": 0.01})
    rows = [
        {"prompt": create_pair(i)["prompt"], "completion": create_pair(i)["chosen"]}
        for i in range(16, 22)
    ]
    predictions = predict(PredictConfig(name=str(tmp_path / "run"), device="cpu"), rows).rows or []
    evaluation = evaluate(EvaluateConfig(name=str(tmp_path / "run"), resamples=0, device="cpu"))
    scores = [row["prediction"] for row in predictions]
    assert np.mean(scores) == pytest.approx(evaluation.metrics["score_chosen"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["eos", "another"])
def test_reward_model_score_depends_on_eos_for_any_padding(
    pad: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    path = tiny_model_dir("llama", chat=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    for file in path.iterdir():
        (model_dir / file.name).write_bytes(file.read_bytes())
    tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else tokenizer.unk_token
    tokenizer.save_pretrained(model_dir)
    settings = json.loads((model_dir / "config.json").read_text())
    settings["pad_token_id"] = tokenizer.pad_token_id
    (model_dir / "config.json").write_text(json.dumps(settings))
    result = run(model_dir, write_rows(tmp_path / "data"), tmp_path / "run", "reward")
    model = result.model.eval()
    texts = [f"{create_pair(0)['prompt']}\n{create_pair(0)['chosen']}", create_pair(1)["prompt"]]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    with torch.no_grad():
        with_eos = [model(torch.tensor([row])).logits.item() for row in ids]
        without_eos = [model(torch.tensor([row[:-1]])).logits.item() for row in ids]
    assert all(abs(a - b) > 1e-6 for a, b in zip(with_eos, without_eos, strict=True))


@pytest.mark.slow
def test_quantized_base_is_its_own_reference(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data")
    run(tiny_model_dir("llama"), data, tmp_path / "run", method={"kind": "qlora"})
    assert losses(tmp_path / "run")[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_kto_trains_on_labeled_answers(tiny_model_dir: ModelDir, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", create_labeled_answer)
    summary = run(tiny_model_dir("llama"), data, tmp_path / "run", "kto").summary
    assert {"kl", "reward_margin", "logp_desirable"} <= set(summary["metrics"])
    assert summary["metrics"]["kl"] >= 0
    report = evaluate(EvaluateConfig(name=str(tmp_path / "run"), resamples=20))
    assert report.metrics["kl"] == pytest.approx(summary["metrics"]["kl"])
    assert "loss" in report.summary["intervals"]
    assert "kl" not in report.summary["intervals"]  # no example has its own answers to others
