"""Reinforcement learning: runs that learn, resume, split, and detect planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import ranks
from ftlevel.commands.evaluate import evaluate
from ftlevel.commands.export import export
from ftlevel.commands.merge import merge
from ftlevel.commands.train import train
from ftlevel.config import EvaluateConfig, ExportConfig, MergeConfig, TrainConfig
from ftlevel.errors import ConfigError, InputError, Interrupted, RunError
from ftlevel.evaluation import sampling
from ftlevel.evaluation.rollouts import Rollouts
from ftlevel.extras.serving.check import check_served
from ftlevel.extras.serving.config import CheckServedConfig
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


def settings(
    data: Path,
    out: Path,
    rl: dict[str, Any] | None = None,
    tr: dict[str, Any] | None = None,
    **more: Any,
) -> TrainConfig:
    """Return a short run in float32 on the built-in model."""
    rl = {
        "reward": [f"{data}/rewards.py:vowels"],
        "num_generations": 4,
        "max_completion_length": 10,
        "check_groups": 0,
        **(rl or {}),
    }
    tr = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 2e-3, **(tr or {})}
    model = {"dtype": "float32", **more.pop("model", {})}
    own = {"dataset": str(data / "rows.jsonl"), **more.pop("rows", {})}
    told = {"dir": out, **more.pop("output", {})}
    return TrainConfig(task="rl", model=model, data=own, rl=rl, train=tr, output=told, **more)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    """Return settings of a tiny model, for runs that have nothing to learn."""
    return {"name_or_path": str(tiny_model_dir("llama", chat=True))}


def log(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.fixture(scope="module")
def learned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that learns to begin docstrings with Return, and its summary."""
    out = tmp_path_factory.mktemp("learned") / "run"
    config = settings(
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


def test_a_run_learns_from_its_reward(learned: tuple[Path, dict[str, Any]]) -> None:
    run, _ = learned
    rewards = [record["reward"] for record in log(run)]
    assert len(rewards) == 20
    assert np.mean(rewards[:3]) < 0.3
    assert np.mean(rewards[-3:]) > 0.8
    trained = [record for record in log(run) if record["groups_with_signal"]]
    assert max(record["sampler_difference"] for record in trained) < 1e-4
    assert {"completion_length", "truncated", "entropy", "clipped"} <= trained[-1].keys()


def test_there_may_be_more_held_out_prompts_than_prompts(data: Path, tmp_path: Path) -> None:
    few = write_prompts(tmp_path / "few.jsonl", NAMES[:2])
    rows = {"dataset": str(few), "validation_file": str(data / "held-out.jsonl")}
    tr = {"per_device_train_batch_size": 2, "max_steps": 1}
    summary = train(settings(data, tmp_path / "run", tr=tr, rows=rows)).summary
    assert 0 <= summary["metrics"]["reward"] <= 1


def test_rollouts_are_kept_with_their_rewards(learned: tuple[Path, dict[str, Any]]) -> None:
    run, _ = learned
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 20 * len(NAMES)
    for line in lines[:16]:
        for completion in line["completions"]:
            begins = completion["text"].strip().startswith("Return")
            assert completion["reward"] == (
                1.0 if begins else 0.2 * ("eturn" in completion["text"])
            )
    by_step = {record["step"]: record["reward"] for record in log(run)}
    first = [c["reward"] for line in lines if line["step"] == 1 for c in line["completions"]]
    assert np.mean(first) == pytest.approx(by_step[1], abs=1e-9)


def test_evaluate_repeats_the_gain_on_held_out_prompts(
    learned: tuple[Path, dict[str, Any]],
) -> None:
    run, summary = learned
    found = evaluate(EvaluateConfig(name=str(run))).summary
    assert found["metrics"]["reward"] == pytest.approx(summary["metrics"]["reward"], abs=1e-9)
    assert found["data"]["examples"] == len(HELD_OUT)
    assert found["intervals"]["reward"][0] > found["base_intervals"]["reward"][1]
    assert summary["intervals"]["reward"] == pytest.approx(found["intervals"]["reward"], abs=1e-6)
    before, base = summary["intervals_before"], found["base_intervals"]  # of other resamples
    assert before["reward"] == pytest.approx(base["reward"], abs=0.01)
    assert {"pass@1", "pass@4"} <= found["metrics"].keys()


def test_other_models_and_full_bases_sample_their_own_completions(
    data: Path, tmp_path: Path, learned: tuple[Path, dict[str, Any]]
) -> None:
    run, summary = learned
    config = settings(
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
    found = evaluate(EvaluateConfig(name=str(tmp_path / "full"), against=str(run))).summary
    of_adapter = evaluate(EvaluateConfig(name=str(run))).summary
    assert found["base"]["reward"] == pytest.approx(of_adapter["base"]["reward"], abs=1e-9)
    against = found["against"]
    assert against["metrics"]["reward"] == pytest.approx(summary["metrics"]["reward"], abs=1e-9)
    assert against["intervals"]["reward"] == pytest.approx(
        of_adapter["intervals"]["reward"], abs=1e-9
    )
    assert found["metrics"]["reward"] not in (found["base"]["reward"], against["metrics"]["reward"])


def test_plain_peft_and_generate_reproduce_the_gain(
    learned: tuple[Path, dict[str, Any]],
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftlevel.models.sources import resolve_source

    run, _ = learned
    base = resolve_source("builtin:tiny-llama", None, False).path
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    model = PeftModel.from_pretrained(model, run / "adapter").eval()

    def share() -> float:
        torch.manual_seed(0)
        hits = []
        for name in HELD_OUT:
            turns = [{"role": "user", "content": f'def {name}:\n    """'}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text.removesuffix(" "), add_special_tokens=False, return_tensors="pt")
            written = model.generate(
                **ids, do_sample=True, top_k=0, max_new_tokens=6, num_return_sequences=8
            )
            said = tokenizer.batch_decode(written[:, ids["input_ids"].shape[1] :], True)
            hits += [text.strip().startswith("Return") for text in said]
        return float(np.mean(hits))

    tuned = share()
    with model.disable_adapter():
        assert share() < 0.4
    assert tuned > 0.75


def test_the_result_merges(learned: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, _ = learned
    merge(MergeConfig(adapters=[str(run)], output_dir=tmp_path / "merged"))
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_result_is_served_as_trained(
    learned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = learned
    out = tmp_path / "out"
    export(ExportConfig(model=str(run), out=out, server="llama.cpp"))
    found = check_served(CheckServedConfig(out=out, inside="llama.cpp")).summary
    assert found["verdict"] == "as trained"


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
def test_a_resumed_run_is_the_same_bit_for_bit(
    data: Path, tmp_path: Path, tiny: dict[str, Any], rl: dict[str, Any], step: int
) -> None:
    steps = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
    train(settings(data, tmp_path / "whole", rl, steps, model=tiny))
    broken = settings(data, tmp_path / "broken", rl, steps, model=tiny)
    with pytest.raises(Interrupted):
        train(broken, callbacks=[Stop(step)])
    resumed = settings(data, tmp_path / "broken", rl, steps, model=tiny, output={"resume": True})
    functions = data / "rewards.py"
    functions.write_text(REWARDS + "# changed")
    with pytest.raises(ConfigError, match="not the same run: a reward function or reward model"):
        train(resumed)
    functions.write_text(REWARDS)
    train(resumed)
    whole, broken = adapter(tmp_path / "whole"), adapter(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    texts = [(tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("whole", "broken")]
    assert texts[0] == texts[1]


PLAIN = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0}


def train_in_a_process(config: dict[str, Any]) -> None:
    train(TrainConfig(**config))


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_a_split_step_is_the_same_step(
    data: Path, tmp_path: Path, tiny: dict[str, Any], loss: str
) -> None:
    rl = {"loss": loss, "beta": 0.05, "dynamic_sampling": 2}
    both = {**PLAIN, "max_steps": 2}
    own = {"model": tiny}
    train(settings(data, tmp_path / "one", rl, {**both, "per_device_train_batch_size": 8}, **own))
    split = {**both, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    tokens = {"tokens_per_micro_batch": 120}
    train(settings(data, tmp_path / "split", rl, split, speed=tokens, **own))
    if loss == "grpo":
        train(settings(data, tmp_path / "other", rl, split, speed={"fast": False}, **own))
    else:
        two = {**both, "per_device_train_batch_size": 4, "num_processes": 2}
        config = settings(data, tmp_path / "other", rl, two, **own).model_dump(exclude_unset=True)
        started = ranks.start(train_in_a_process, [(config,), (config,)])
        assert ranks.end(started) == [0, 0]
    one = adapter(tmp_path / "one")
    for name in ("split", "other"):
        other = adapter(tmp_path / name)
        for tensor, value in one.items():
            assert torch.allclose(other[tensor], value, rtol=0, atol=1e-6), (name, tensor)
        rollouts = [(tmp_path / n / "rollouts.jsonl").read_text() for n in ("one", name)]
        assert rollouts[0] == rollouts[1]


@pytest.fixture(params=["temperature", "weights", "template"])
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let completions be sampled at another temperature, from other weights or other prompts."""
    plain_draw, plain_sample = sampling.draw, Rollouts._sample

    def colder(scores: torch.Tensor, temperature: float, keys: torch.Tensor) -> Any:
        return plain_draw(scores, 0.7 * temperature, keys)

    def stale(self: Rollouts, step: int, rows: Any) -> Any:
        moved = [p for n, p in self._model.named_parameters() if "lora_B" in n]
        before = [p.detach().clone() for p in moved]
        with torch.no_grad():
            for p in moved:
                p.add_(0.01)
        found = plain_sample(self, step, rows)
        with torch.no_grad():
            for p, value in zip(moved, before, strict=True):
                p.copy_(value)
        return found

    def without_template(self: Rollouts, step: int, rows: Any) -> Any:
        from dataclasses import replace

        return plain_sample(self, step, [replace(r, input_ids=r.input_ids[4:]) for r in rows])

    if request.param == "temperature":
        monkeypatch.setattr(sampling, "draw", colder)
    else:
        wrong = stale if request.param == "weights" else without_template
        monkeypatch.setattr(Rollouts, "_sample", wrong)
    return str(request.param)


@pytest.mark.parametrize("groups", [2, 0], ids=["before", "at-a-step"])
def test_a_planted_fault_stops_the_run(data: Path, tmp_path: Path, fault: str, groups: int) -> None:
    config = settings(data, tmp_path / "run", {"check_groups": groups}, {"max_steps": 1})
    with pytest.raises(RunError, match="nats a token between sampler and trainer") as error:
        train(config)
    where = "before training" if groups else "step 1"
    assert str(error.value).startswith(where), fault
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("rl", "advice"),
    [
        ({"max_completion_length": 48}, "reward with steps between 0 and 1"),
        ({"max_completion_length": 2}, "Raise --max-completion-length"),
    ],
    ids=["no-signal", "all-cut"],
)
def test_a_run_that_cannot_learn_stops_before_its_first_step(
    data: Path, tmp_path: Path, rl: dict[str, Any], advice: str
) -> None:
    rl = {"check_groups": 4, "reward": [f"{data}/rewards.py:same"], **rl}
    with pytest.raises(RunError, match=advice):
        train(settings(data, tmp_path / "run", rl))


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"method": {"kind": "lora", "use_dora": True}},
    "qlora": {"method": {"kind": "qlora"}},
    "pissa": {"method": {"kind": "lora", "init_lora_weights": "pissa"}},
    "adalora": {"method": {"kind": "adalora"}},  # its first step is a thousandth of LoRA's
    "full": {"method": {"kind": "full"}},
    "prompt-tuning": {"method": {"kind": "prompt-tuning"}},  # sampled by `generate`
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_against_the_model_as_it_began(
    data: Path, tmp_path: Path, tiny: dict[str, Any], name: str
) -> None:
    rate = {"learning_rate": 1e-4 if name == "full" else 2e-3}
    train(settings(data, tmp_path / name, {"beta": 0.05}, rate, model=tiny, **METHODS[name]))
    first, second = log(tmp_path / name)
    assert first["kl"] == pytest.approx(0.0, abs=1e-7)
    assert second["kl"] > 0
    assert max(first["sampler_difference"], second["sampler_difference"]) < 1e-4


def test_a_teacher_is_distilled_on_the_students_completions(
    data: Path, tmp_path: Path, learned: tuple[Path, dict[str, Any]]
) -> None:
    teacher, _ = learned
    rl = {"reward": [], "max_completion_length": 16, "check_groups": 4, "num_generations": 4}
    tr = {
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "lr_scheduler_type": "constant",
        "eval_strategy": "no",
        "eval_on_start": False,
    }
    config = settings(
        data,
        tmp_path / "run",
        rl,
        tr,
        rows={"validation_file": str(data / "held-out.jsonl")},
        distillation={"teacher": str(teacher)},
    )
    summary = train(config).summary
    records = log(tmp_path / "run")
    divergences = [record["kl"] for record in records]
    assert np.mean(divergences[-3:]) < 0.5 * divergences[0]
    assert records[0]["reward"] < -0.1
    assert records[0]["sampler_difference"] < 1e-4
    assert "groups_with_signal" not in records[0]
    assert summary["distillation"]["teacher"] == str(teacher)
    repeated = evaluate(EvaluateConfig(name=str(tmp_path / "run"))).summary
    assert repeated["metrics"]["reward"] == pytest.approx(summary["metrics"]["reward"], abs=1e-5)
    assert repeated["intervals"]["reward"][0] > repeated["base_intervals"]["reward"][1]
    assert not {"pass@1", "groups_with_signal"} & repeated["metrics"].keys()


def test_a_teacher_with_two_processes_and_on_resume(
    data: Path, tmp_path: Path, tiny: dict[str, Any], tiny_model_dir: Callable[..., Path]
) -> None:
    teacher, another = (str(tiny_model_dir("llama", chat=True, seed=seed)) for seed in (1, 2))
    own = {"model": tiny, "distillation": {"teacher": teacher}}
    rl = {"reward": [], "num_generations": 2}
    both = {**PLAIN, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4}
    train(settings(data, tmp_path / "one", rl, both, **own))
    two = {**both, "per_device_train_batch_size": 2, "num_processes": 2}
    config = settings(data, tmp_path / "two", rl, two, **own).model_dump(exclude_unset=True)
    started = ranks.start(train_in_a_process, [(config,), (config,)])
    assert ranks.end(started) == [0, 0]
    with pytest.raises(Interrupted):
        train(settings(data, tmp_path / "broken", rl, both, **own), callbacks=[Stop(1)])
    other = {"model": tiny, "distillation": {"teacher": another}}
    with pytest.raises(
        ConfigError, match=r"not the same run: distillation\.teacher was '[0-9a-f]+'"
    ):
        train(settings(data, tmp_path / "broken", rl, both, output={"resume": True}, **other))
    train(settings(data, tmp_path / "broken", rl, both, output={"resume": True}, **own))
    one = adapter(tmp_path / "one")
    assert all(torch.equal(adapter(tmp_path / "broken")[name], one[name]) for name in one)
    two_adapter = adapter(tmp_path / "two")
    for name, value in one.items():
        assert torch.allclose(two_adapter[name], value, rtol=0, atol=1e-6), name
    texts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("one", "two", "broken")]
    first, *others = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert [line["row"] for line in first] == [line["row"] for line in others[0]]
    assert others[1] == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": {"reward": ["exact"]}}, "--reward: with --teacher, completions are compared"),
        ({"rl": {"reward": [], "loss": "gspo"}}, "--loss gspo: with --teacher each token"),
        ({"rl": {"reward": [], "beta": 0.1}}, "--beta: with --teacher"),
        ({"divergence": "jsd"}, "--divergence: --task rl with --teacher minimizes"),
        ({}, "its tokenizer differs from that of the model"),
    ],
)
def test_a_teacher_that_cannot_be_used_is_refused(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = save_tiny(tmp_path / "other", "llama", chat=True)
    named = {name: value for name, value in change.items() if name != "rl"}
    distillation = {"teacher": str(other), **named}
    rl = change.get("rl", {"reward": []})
    with pytest.raises((ConfigError, InputError, ValueError), match=message):
        train(settings(data, tmp_path / "run", rl, distillation=distillation), dry_run=True)


def test_a_run_continues_an_adapter(
    data: Path, tmp_path: Path, learned: tuple[Path, dict[str, Any]]
) -> None:
    run, _ = learned
    rl = {"reward": [f"{data}/rewards.py:begins"], "beta": 0.05}
    train(settings(data, tmp_path / "more", rl, model={"adapter": str(run)}))
    records = log(tmp_path / "more")
    assert records[0]["reward"] > 0.7
    assert records[0]["kl"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": {"reward": []}}, "no reward"),
        ({"rl": {"reward": ["missing.py:f"]}}, "missing.py"),
        ({"rl": {"num_generations": 1}}, "--num-generations 1"),
        ({"method": {"kind": "lora", "lora_dropout": 0.1}}, "--lora-dropout"),
    ],
)
def test_bad_input_is_refused_before_weights_load(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rl, others = change.get("rl"), {name: v for name, v in change.items() if name != "rl"}
    with pytest.raises((ConfigError, ValueError), match=message):
        train(settings(data, tmp_path / "run", rl, **others), dry_run=True)
