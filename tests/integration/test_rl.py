"""Reinforcement learning: training, resume, split steps, and detection of sampler faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import ranks
from ftlevel.commands import evaluate as evaluate_command
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.merge import merge
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, MergeConfig, TrainConfig
from ftlevel.errors import ConfigError, InputError, Interrupted, RunError
from ftlevel.evaluation.two_models import build_comparison_inputs
from ftlevel.extras.rl import sampling
from ftlevel.extras.rl.checks import get_rollout_warnings
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.rollouts import Rollouts
from ftlevel.extras.rl.trainer import RepeatedSteps, RlTrainer
from ftlevel.extras.serving.check import check_served
from ftlevel.extras.serving.config import CheckServedConfig, ExportConfig
from ftlevel.extras.serving.exporting import export
from tiny_models import save_tiny

NAMES = [
    "add(a, b)",
    "parse_header(line)",
    "read_file(path)",
    "count_words(text)",
    "is_prime(n)",
    "join_paths(a, b)",
    "load(path)",
    "square(x)",
]
HELD_OUT = [
    "sub(a, b)",
    "parse_line(line)",
    "write_file(path)",
    "count_lines(text)",
    "find(x, xs)",
    "close(self)",
]
REWARDS = '''
def begins(completions, **_):
    """1 for a docstring that begins with Return, 0.2 for one that has it elsewhere."""
    return [
        1.0 if text.strip().startswith("Return") else 0.2 * ("eturn" in text)
        for text in completions
    ]


def vowels(completions, **_):
    """Share of vowels, which differs between almost all completions."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def same(completions, **_):
    return [0.5] * len(completions)
'''


def write_prompts(path: Path, names: list[str]) -> Path:
    rows = ({"prompt": f'def {name}:\n    """', "answer": "x"} for name in names)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts, held-out prompts and reward functions."""
    path = tmp_path_factory.mktemp("rl")
    write_prompts(path / "rows.jsonl", NAMES)
    write_prompts(path / "held-out.jsonl", HELD_OUT)
    (path / "rewards.py").write_text(REWARDS)
    return path


def create_config(
    data: Path,
    out: Path,
    rl: dict[str, Any] | None = None,
    train_overrides: dict[str, Any] | None = None,
    **overrides: Any,
) -> TrainConfig:
    """Return a short run in float32 on the built-in model."""
    rl = {
        "reward": [f"{data}/rewards.py:vowels"],
        "num_generations": 4,
        "max_completion_length": 10,
        "check_groups": 0,
        **(rl or {}),
    }
    train_overrides = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 2e-3,
        **(train_overrides or {}),
    }
    model = {"dtype": "float32", **overrides.pop("model", {})}
    data_section = {"dataset": str(data / "rows.jsonl"), **overrides.pop("rows", {})}
    output = {"dir": out, **overrides.pop("output", {})}
    return TrainConfig(
        task="rl",
        model=model,
        data=data_section,
        rl=rl,
        train=train_overrides,
        output=output,
        **overrides,
    )


def load_adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    """Return settings of a tiny model, for runs that have nothing to learn."""
    return {"name_or_path": str(tiny_model_dir("llama", chat=True))}


def load_log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def trained_run(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A run that learns to begin docstrings with Return, and its summary."""
    out = tmp_path_factory.mktemp("learned") / "run"
    config = create_config(
        data,
        out,
        {
            "reward": [f"{data}/rewards.py:begins"],
            "num_generations": 8,
            "max_completion_length": 16,
            "check_groups": 8,
        },
        {
            "per_device_train_batch_size": 8,
            "max_steps": 20,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "eval_strategy": "no",
        },
        rows={"validation_file": str(data / "held-out.jsonl")},
    )
    return out, dict(train(config).summary)


def test_reward_increases_in_training(trained_run: tuple[Path, dict[str, Any]]) -> None:
    run, _ = trained_run
    rewards = [record["reward"] for record in load_log(run)]
    assert len(rewards) == 20
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-3:]) > 0.8
    records_with_signal = [record for record in load_log(run) if record["groups_with_signal"]]
    assert max(record["sampler_difference"] for record in records_with_signal) < 1e-4
    assert {"completion_length", "truncated", "entropy", "clipped"} <= records_with_signal[
        -1
    ].keys()


def test_more_validation_than_training_prompts_are_supported(data: Path, tmp_path: Path) -> None:
    two_prompts = write_prompts(tmp_path / "few.jsonl", NAMES[:2])
    rows = {"dataset": str(two_prompts), "validation_file": str(data / "held-out.jsonl")}
    train_options = {"per_device_train_batch_size": 2, "max_steps": 1}
    summary = train(
        create_config(data, tmp_path / "run", train_overrides=train_options, rows=rows)
    ).summary
    assert 0 <= summary["metrics"]["reward"] <= 1


def test_rollouts_are_logged_with_rewards(trained_run: tuple[Path, dict[str, Any]]) -> None:
    run, _ = trained_run
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 20 * len(NAMES)
    for line in lines[:16]:
        for completion in line["completions"]:
            has_prefix = completion["text"].strip().startswith("Return")
            assert completion["reward"] == (
                1.0 if has_prefix else 0.2 * ("eturn" in completion["text"])
            )
    by_step = {record["step"]: record["reward"] for record in load_log(run)}
    first = [c["reward"] for line in lines if line["step"] == 1 for c in line["completions"]]
    assert np.mean(first) == pytest.approx(by_step[1], abs=1e-9)


def test_validation_rows_have_prompts_and_completions(
    trained_run: tuple[Path, dict[str, Any]],
) -> None:
    rows = list(map(json.loads, (trained_run[0] / "validation.jsonl").read_text().splitlines()))
    for row, name in zip(rows, HELD_OUT, strict=True):
        assert f"def {name}:" in row["input"]
        assert row.keys() >= {"predicted", "rewards", "base_predicted"}
        assert not row.keys() & {"chosen", "rejected"}


@pytest.fixture(scope="module")
def evaluation_of_trained_run(trained_run: tuple[Path, dict[str, Any]]) -> Any:
    return evaluate(EvaluateConfig(name=str(trained_run[0]))).summary


def test_evaluation_matches_reward_of_training(
    trained_run: tuple[Path, dict[str, Any]], evaluation_of_trained_run: Any
) -> None:
    _, summary = trained_run
    evaluation = evaluation_of_trained_run
    assert evaluation["metrics"]["reward"] == pytest.approx(summary["metrics"]["reward"], abs=1e-9)
    assert evaluation["data"]["examples"] == len(HELD_OUT)
    assert evaluation["intervals"]["reward"][0] > evaluation["base_intervals"]["reward"][1]
    assert summary["intervals"]["reward"] == pytest.approx(
        evaluation["intervals"]["reward"], abs=1e-6
    )
    before, base = summary["intervals_before"], evaluation["base_intervals"]  # other resamples
    assert before["reward"] == pytest.approx(base["reward"], abs=0.01)
    assert {"pass@1", "pass@4"} <= evaluation["metrics"].keys()


def test_seed_of_evaluation_seeds_completions(trained_run: tuple[Path, dict[str, Any]]) -> None:
    def evaluate_with(**fields: Any) -> Any:
        name = str(trained_run[0])
        return evaluate(EvaluateConfig(name=name, base=False, resamples=0, **fields)).metrics

    as_trained = evaluate_with()
    assert evaluate_with(seed=42) == as_trained  # the default of training
    assert evaluate_with(seed=0) != as_trained
    assert evaluate_with(seed=0) == evaluate_with(seed=0)


def test_against_compares_on_sampled_completions(
    trained_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlevel.models.sources import resolve_source

    run, _ = trained_run
    predictions = tmp_path / "predictions.jsonl"
    compared: list[Any] = []

    def recording_build(*arguments: Any) -> Any:
        compared.extend(arguments[-1])
        return build_comparison_inputs(*arguments)

    monkeypatch.setattr(evaluate_command, "build_comparison_inputs", recording_build)
    config = EvaluateConfig(
        name=str(run),
        against="builtin:tiny-llama",
        base=False,
        predictions=predictions,
        dtype="float32",
    )
    result = evaluate(config).summary["against"]["rows"]
    base = resolve_source("builtin:tiny-llama", None, False).path
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, run / "adapter").eval()
    divergences = []
    lines = list(map(json.loads, predictions.read_text().splitlines()))
    for row, line in zip(compared, lines, strict=True):
        start = sum(label == -100 for label in row.labels)
        text = tokenizer.decode(row.input_ids[start:], skip_special_tokens=True)
        assert text == line["predicted"]
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            tuned = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                initial = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        divergences += (initial.exp() * (initial - tuned)).sum(-1).tolist()
    assert result["targets"] == len(divergences)
    assert result["kl"] == pytest.approx(np.mean(divergences), rel=1e-4)


def test_full_run_against_adapter_run_matches_their_evaluations(
    data: Path,
    tmp_path: Path,
    trained_run: tuple[Path, dict[str, Any]],
    evaluation_of_trained_run: Any,
) -> None:
    run, summary = trained_run
    config = create_config(
        data,
        tmp_path / "full",
        {
            "reward": [f"{data}/rewards.py:begins"],
            "num_generations": 8,
            "max_completion_length": 16,
        },
        {"learning_rate": 1e-3, "eval_strategy": "no"},
        rows={"validation_file": str(data / "held-out.jsonl")},
        method={"kind": "full"},
    )
    train(config)
    evaluation = evaluate(EvaluateConfig(name=str(tmp_path / "full"), against=str(run))).summary
    assert evaluation["base"]["reward"] == pytest.approx(
        evaluation_of_trained_run["base"]["reward"], abs=1e-9
    )
    against = evaluation["against"]
    assert against["metrics"]["reward"] == pytest.approx(summary["metrics"]["reward"], abs=1e-9)
    assert against["intervals"]["reward"] == pytest.approx(
        evaluation_of_trained_run["intervals"]["reward"], abs=1e-9
    )
    assert evaluation["metrics"]["reward"] not in (
        evaluation["base"]["reward"],
        against["metrics"]["reward"],
    )


def test_reward_gain_is_reproduced_with_plain_peft(
    trained_run: tuple[Path, dict[str, Any]],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlevel.models.sources import resolve_source

    run, _ = trained_run
    base = resolve_source("builtin:tiny-llama", None, False).path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = PeftModel.from_pretrained(model, run / "adapter").eval()

    def success_rate() -> float:
        torch.manual_seed(0)
        hits = []
        for name in HELD_OUT:
            turns = [{"role": "user", "content": f'def {name}:\n    """'}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text.removesuffix(" "), add_special_tokens=False, return_tensors="pt")
            generated = model.generate(
                **ids, do_sample=True, top_k=0, max_new_tokens=6, num_return_sequences=8
            )
            texts = tokenizer.batch_decode(generated[:, ids["input_ids"].shape[1] :], True)
            hits += [text.strip().startswith("Return") for text in texts]
        return float(np.mean(hits))

    tuned_rate = success_rate()
    with model.disable_adapter():
        assert success_rate() < 0.4
    assert tuned_rate > 0.75


def test_rl_run_merges(trained_run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = trained_run
    merge(MergeConfig(adapters=[str(run)], output_dir=tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_rl_run_is_served_as_trained(
    trained_run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = trained_run
    out = tmp_path / "out"
    export(ExportConfig(model=str(run), out=out, server="llama.cpp"))
    evaluation = check_served(CheckServedConfig(out=out, inside="llama.cpp")).summary
    assert evaluation["verdict"] == "as trained"


class Stop(TrainerCallback):
    """Interrupts a run before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("rl", "step"), [({}, 2), ({"num_iterations": 2, "beta": 0.1}, 3)], ids=["mu1", "mu2-kl"]
)
def test_resumed_run_matches_uninterrupted_run(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any], rl: dict[str, Any], step: int
) -> None:
    steps = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
    train(create_config(data, tmp_path / "whole", rl, steps, model=tiny_model))
    interrupted = create_config(data, tmp_path / "broken", rl, steps, model=tiny_model)
    with pytest.raises(Interrupted):
        train(interrupted, callbacks=[Stop(step)])
    resumed = create_config(
        data, tmp_path / "broken", rl, steps, model=tiny_model, output={"resume": True}
    )
    functions = data / "rewards.py"
    functions.write_text(REWARDS + "# changed")
    with pytest.raises(
        ConfigError,
        match=r"not the same run: rl.fingerprint \(reward functions or reward models\) was",
    ):
        train(resumed)
    functions.write_text(REWARDS)
    train(resumed)
    expected, interrupted = load_adapter(tmp_path / "whole"), load_adapter(tmp_path / "broken")
    assert all(torch.equal(expected[name], interrupted[name]) for name in expected)
    texts = [(tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("whole", "broken")]
    assert texts[0] == texts[1]


def test_log_has_mean_metrics_of_steps(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any]
) -> None:
    (tmp_path / "logs.py").write_text(
        "def vowels(completions, log_metric, **_):\n    log_metric('loss', 7.0)\n"
        "    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    )
    names = ("reward", "group_std", "entropy", "loss")
    reward, logs = {"reward": [f"{tmp_path}/logs.py:vowels"]}, []
    for every in (1, 3):
        steps = {"max_steps": 7, "logging_steps": every}
        train(create_config(data, tmp_path / str(every), reward, steps, model=tiny_model))
        logs.append(load_log(tmp_path / str(every)))
    single, means = logs
    assert [record["step"] for record in means] == [1, 3, 6]
    for record, part in zip(means, (single[:1], single[1:3], single[3:6]), strict=True):
        for name in names:
            expected = sum(one[name] for one in part) / len(part)
            assert record[name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("rl", [{"loss": "gspo", "num_iterations": 2}, {"loss": "rloo"}])
def test_first_iteration_has_no_rounding_of_ratios(
    data: Path,
    tmp_path: Path,
    tiny_model: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    rl: dict[str, Any],
) -> None:
    """Old log-probabilities are computed in other micro-batches than the step's."""
    compute = RlTrainer.token_logps

    def compute_with_rounding(self: RlTrainer, rows: Any) -> Any:
        return [[logp + 0.01 for logp in own] for own in compute(self, rows)]

    monkeypatch.setattr(RlTrainer, "token_logps", compute_with_rounding)
    config = create_config(
        data, tmp_path / "run", {**rl, "beta": 0.1, "epsilon": 1e-3}, model=tiny_model
    )
    train(config)
    clipped = [record["clipped"] for record in load_log(tmp_path / "run")]
    assert clipped[0] == 0
    assert bool(clipped[1]) == ("num_iterations" in rl)


def test_run_resumes_after_failed_reward(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "fails.py"
    source = (
        "def score(completions, trainer_state, **_):\n    assert trainer_state.global_step {}\n"
    )
    source += "    return [float(len(text)) for text in completions]\n"
    file.write_text(source.format("!= 1"))
    steps = {"max_steps": 3, "save_steps": 1}

    def run(name: str, rl: dict[str, Any], **output: Any) -> Any:
        rl = {"reward": [f"{file}:score"], **rl}
        config = create_config(
            data, tmp_path / name, rl, steps, model=tiny_model, output={"resume": True, **output}
        )
        return train(config).summary

    for name in ("zero", "mended"):
        with pytest.raises(RunError, match=r"--resume --allow-change rl\.fingerprint, or with"):
            run(name, {})
    assert run("zero", {"on_reward_error": "zero", "reward_timeout": 30})["steps"] == 3
    assert "failed on 16 completions, which score 0. The first error: Assert" in caplog.text
    shares = [record.get("failed_rewards") for record in load_log(tmp_path / "zero")]
    assert shares == [None, 1, 0]
    file.write_text(source.format("!= 9"))
    assert run("mended", {}, allow_change=("rl.fingerprint",))["steps"] == 3


def test_short_epoch_fills_every_repeated_step() -> None:
    sampler = RepeatedSteps(range(3), 8, 2)  # type: ignore[arg-type]
    rows = list(sampler)
    assert len(rows) == len(sampler) == 16
    assert rows[:8] == rows[8:] == [0, 1, 2, 0, 1, 2, 0, 1]


PLAIN_SGD = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
}


def train_in_process(config: dict[str, Any]) -> None:
    train(TrainConfig(**config))


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_split_step_matches_one_batch(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any], loss: str
) -> None:
    rl = {"loss": loss, "beta": 0.05, "dynamic_sampling": 2}
    common = {**PLAIN_SGD, "max_steps": 2, "max_generate_samples": 5}
    validation = {"validation_file": str(data / "rows.jsonl"), "gate": {"leaked": "ignore"}}
    sections = {"model": tiny_model, "rows": validation}
    train(
        create_config(
            data, tmp_path / "one", rl, {**common, "per_device_train_batch_size": 8}, **sections
        )
    )
    split = {**common, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    tokens = {"tokens_per_micro_batch": 120}
    train(create_config(data, tmp_path / "split", rl, split, speed=tokens, **sections))
    if loss == "grpo":
        train(create_config(data, tmp_path / "other", rl, split, speed={"fast": False}, **sections))
    else:
        two_processes = {**common, "per_device_train_batch_size": 4, "num_processes": 2}
        config = create_config(data, tmp_path / "other", rl, two_processes, **sections).model_dump(
            exclude_unset=True
        )
        processes = ranks.start(train_in_process, [(config,), (config,)])
        assert ranks.end(processes) == [0, 0]
    expected = load_adapter(tmp_path / "one")
    for name in ("split", "other"):
        actual = load_adapter(tmp_path / name)
        for tensor, value in expected.items():
            assert torch.allclose(actual[tensor], value, rtol=0, atol=1e-6), (name, tensor)
        rollouts = [(tmp_path / n / "rollouts.jsonl").read_text() for n in ("one", name)]
        assert rollouts[0] == rollouts[1]
        evaluations = [evaluations_of(tmp_path / n) for n in ("one", name)]
        assert len(evaluations[0]) > 1
        assert evaluations[0] == evaluations[1], "prompts are divided among processes"


def evaluations_of(run: Path) -> list[dict[str, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [{k: v for k, v in record.items() if k.startswith("eval_")} for record in records]
    return [record for record in found if record]


def test_step_of_more_prompts_than_rows_trains_each_once(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any]
) -> None:
    for size in (8, 12):
        train_overrides = {**PLAIN_SGD, "per_device_train_batch_size": size}
        rl = {"num_iterations": 2}
        train(create_config(data, tmp_path / str(size), rl, train_overrides, model=tiny_model))
    expected, actual = load_adapter(tmp_path / "8"), load_adapter(tmp_path / "12")
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=0, atol=1e-6), name


@pytest.fixture(params=["temperature", "weights", "template"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sample completions at another temperature, from other weights or from other prompts."""
    original_draw, original_sample = sampling.draw, Rollouts._sample

    def draw_at_lower_temperature(
        scores: torch.Tensor, temperature: float, keys: torch.Tensor
    ) -> Any:
        return original_draw(scores, 0.7 * temperature, keys)

    def sample_with_changed_weights(self: Rollouts, step: int, rows: Any) -> Any:
        moved = [p for n, p in self._model.named_parameters() if "lora_B" in n]
        before = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p in moved:
                p.add_(0.01)
        completions = original_sample(self, step, rows)
        with torch.no_grad():
            for p, value in zip(moved, before, strict=True):
                p.copy_(value)
        return completions

    def sample_without_template(self: Rollouts, step: int, rows: Any) -> Any:
        from dataclasses import replace

        return original_sample(self, step, [replace(r, input_ids=r.input_ids[4:]) for r in rows])

    if request.param == "temperature":
        monkeypatch.setattr(sampling, "draw", draw_at_lower_temperature)
    else:
        faulty_sample = (
            sample_with_changed_weights if request.param == "weights" else sample_without_template
        )
        monkeypatch.setattr(Rollouts, "_sample", faulty_sample)
    return str(request.param)


@pytest.mark.parametrize("groups", [2, 0], ids=["before-training", "at-step-1"])
def test_sampler_fault_is_detected(data: Path, tmp_path: Path, fault: str, groups: int) -> None:
    config = create_config(data, tmp_path / "run", {"check_groups": groups}, {"max_steps": 1})
    with pytest.raises(RunError, match="nats a token between sampler and trainer") as error:
        train(config)
    prefix = "before training" if groups else "step 1"
    assert str(error.value).startswith(prefix), fault
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("rl", "message"),
    [
        ({"max_completion_length": 48}, "reward with steps between 0 and 1"),
        ({"max_completion_length": 2}, "Raise --max-completion-length"),
    ],
    ids=["no-signal", "all-cut"],
)
def test_useless_rewards_raise_before_first_step(
    data: Path, tmp_path: Path, rl: dict[str, Any], message: str
) -> None:
    rl = {"check_groups": 4, "reward": [f"{data}/rewards.py:same"], **rl}
    with pytest.raises(RunError, match=message):
        train(create_config(data, tmp_path / "run", rl))


def test_run_without_signal_names_cause(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any]
) -> None:
    rl = {"reward": [f"{data}/rewards.py:same"]}
    config = create_config(data, tmp_path / "run", rl, model=tiny_model)
    with pytest.raises(RunError, match="training had no effect") as error:
        train(config)
    assert "all completions of each prompt had the same reward" in str(error.value)
    assert "--learning-rate" not in str(error.value)


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"method": {"kind": "lora", "use_dora": True}},
    "qlora": {"method": {"kind": "qlora"}},
    "pissa": {"method": {"kind": "lora", "init_lora_weights": "pissa"}},
    "adalora": {"method": {"kind": "adalora"}},  # its first step is a thousandth of LoRA's
    "full": {"method": {"kind": "full"}},
    "prompt-tuning": {"method": {"kind": "prompt-tuning"}},  # sampled by `generate`
}


@pytest.mark.parametrize("name", METHODS)
def test_kl_is_zero_at_first_step_for_each_method(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any], name: str
) -> None:
    rate = {"learning_rate": 1e-4 if name == "full" else 2e-3}
    train(
        create_config(
            data, tmp_path / name, {"beta": 0.05}, rate, model=tiny_model, **METHODS[name]
        )
    )
    first, second = load_log(tmp_path / name)
    assert first["kl"] == pytest.approx(0.0, abs=1e-7)
    assert second["kl"] > 0
    assert max(first["sampler_difference"], second["sampler_difference"]) < 1e-4


def test_distillation_trains_on_cut_completions(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any], tiny_model_dir: Callable[..., Path]
) -> None:
    rl = {"reward": [], "max_completion_length": 2, "check_groups": 4}
    teacher = {"teacher": str(tiny_model_dir("llama", chat=True, seed=1))}
    train(create_config(data, tmp_path / "run", rl, model=tiny_model, distillation=teacher))
    assert load_log(tmp_path / "run")[0]["truncated"] > 0.9
    logs = [{"completion_length": 2, "entropy": at, "reward": -at, "truncated": 1} for at in (9, 0)]
    assert not get_rollout_warnings(RlConfig(), logs)
    assert len(get_rollout_warnings(RlConfig(reward=("exact",)), logs)) == 1


def test_on_policy_distillation_reduces_divergence(
    data: Path, tmp_path: Path, trained_run: tuple[Path, dict[str, Any]]
) -> None:
    teacher, _ = trained_run
    rl = {"reward": [], "max_completion_length": 16, "check_groups": 4, "num_generations": 4}
    train_options = {
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "lr_scheduler_type": "constant",
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    config = create_config(
        data,
        tmp_path / "run",
        rl,
        train_options,
        rows={"validation_file": str(data / "held-out.jsonl")},
        distillation={"teacher": str(teacher)},
    )
    summary = train(config).summary
    records = load_log(tmp_path / "run")
    divergences = [record["kl"] for record in records]
    assert np.mean(divergences[-3:]) < 0.5 * divergences[0]
    assert records[0]["reward"] < -0.1
    assert records[0]["sampler_difference"] < 1e-4
    assert "groups_with_signal" not in records[0]
    assert summary["distillation"]["teacher"] == str(teacher)
    evaluation = evaluate(EvaluateConfig(name=str(tmp_path / "run"))).summary
    assert evaluation["metrics"]["reward"] == pytest.approx(summary["metrics"]["reward"], abs=1e-5)
    assert evaluation["intervals"]["reward"][0] > evaluation["base_intervals"]["reward"][1]
    assert not {"pass@1", "groups_with_signal"} & evaluation["metrics"].keys()


def test_two_process_and_resumed_distillation_match_one_process(
    data: Path, tmp_path: Path, tiny_model: dict[str, Any], tiny_model_dir: Callable[..., Path]
) -> None:
    teacher, other_teacher = (str(tiny_model_dir("llama", chat=True, seed=seed)) for seed in (1, 2))
    sections = {"model": tiny_model, "distillation": {"teacher": teacher}}
    rl = {"reward": [], "num_generations": 2}
    common = {**PLAIN_SGD, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    train(create_config(data, tmp_path / "one", rl, common, **sections))
    two_processes = {**common, "per_device_train_batch_size": 2, "num_processes": 2}
    config = create_config(data, tmp_path / "two", rl, two_processes, **sections).model_dump(
        exclude_unset=True
    )
    processes = ranks.start(train_in_process, [(config,), (config,)])
    assert ranks.end(processes) == [0, 0]
    with pytest.raises(Interrupted):
        train(create_config(data, tmp_path / "broken", rl, common, **sections), callbacks=[Stop(1)])
    other_sections = {"model": tiny_model, "distillation": {"teacher": other_teacher}}
    with pytest.raises(
        ConfigError, match=r"not the same run: distillation\.teacher was '[0-9a-f]+'"
    ):
        train(
            create_config(
                data, tmp_path / "broken", rl, common, output={"resume": True}, **other_sections
            )
        )
    train(create_config(data, tmp_path / "broken", rl, common, output={"resume": True}, **sections))
    expected = load_adapter(tmp_path / "one")
    assert all(
        torch.equal(load_adapter(tmp_path / "broken")[name], expected[name]) for name in expected
    )
    actual = load_adapter(tmp_path / "two")
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=0, atol=1e-6), name
    texts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("one", "two", "broken")]
    first, *others = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line["row"] for line in first] == [line["row"] for line in others[0]]
    assert others[1] == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"rl": {"reward": ["exact"]}},
            "--reward exact cannot be used with --teacher .*: completions are compared",
        ),
        (
            {"rl": {"reward": [], "loss": "gspo"}},
            "--loss gspo cannot be used with --teacher .*: each token",
        ),
        ({"rl": {"reward": [], "beta": 0.1}}, "--beta 0.1 cannot be used with --teacher"),
        (
            {"divergence": "jsd"},
            "--divergence jsd has no effect with --task rl: --teacher minimizes",
        ),
        ({}, "its tokenizer differs from that of the model"),
    ],
)
def test_invalid_teacher_options_raise(
    data: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    teacher = save_tiny(tmp_path / "other", "llama", chat=True)
    options = {name: value for name, value in overrides.items() if name != "rl"}
    distillation = {"teacher": str(teacher), **options}
    rl = overrides.get("rl", {"reward": []})
    with pytest.raises((ConfigError, InputError, ValueError), match=message):
        train(create_config(data, tmp_path / "run", rl, distillation=distillation), dry_run=True)


def test_rl_continues_an_adapter(
    data: Path, tmp_path: Path, trained_run: tuple[Path, dict[str, Any]]
) -> None:
    run, _ = trained_run
    rl = {"reward": [f"{data}/rewards.py:begins"], "beta": 0.05}
    train(create_config(data, tmp_path / "more", rl, model={"adapter": str(run)}))
    records = load_log(tmp_path / "more")
    assert records[0]["reward"] > 0.7
    assert records[0]["kl"] == pytest.approx(0.0, abs=1e-7)


def test_rl_turns_off_dropout_of_an_adapter(
    data: Path,
    tmp_path: Path,
    trained_run: tuple[Path, dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(trained_run[0] / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_dropout": 0.05}))
    model = {"adapter": str(tmp_path / "adapter")}
    train(create_config(data, tmp_path / "run", model=model), dry_run=True)
    assert "its dropout is off; --task rl has none" in caplog.text
    method = {"lora_dropout": 0.1}
    with pytest.raises(
        ConfigError,
        match=r"--lora-dropout 0\.1 cannot be used with --task rl: the model that samples",
    ):
        train(create_config(data, tmp_path / "run", model=model, method=method), dry_run=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rl": {"reward": []}}, "no reward"),
        ({"rl": {"reward": ["missing.py:f"]}}, "missing.py"),
        ({"rl": {"num_generations": 1}}, "--num-generations 1"),
        ({"method": {"kind": "lora", "lora_dropout": 0.1}}, "--lora-dropout"),
    ],
)
def test_invalid_rl_options_raise_before_loading(
    data: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    rl, others = overrides.get("rl"), {name: v for name, v in overrides.items() if name != "rl"}
    with pytest.raises((ConfigError, ValueError), match=message):
        train(create_config(data, tmp_path / "run", rl, **others), dry_run=True)
