"""TRL's GRPO and RLOO tests (July 2026) that do not depend on its internals, as runs of ftlevel.

| TRL | here |
|---|---|
| test_train_loss_types, test_train_sequence_importance_sampling, test_train (RLOO) | each loss |
| test_train_beta_non_zero, test_train_with_bias_correction_kl | each setting |
| test_train_multiple_iterations, test_train_scale_rewards | each setting |
| test_train_num_generations_larger_than_batch_size | each setting: one prompt a step |
| test_train_with_mask_truncated_completions and …_all_masked | the same |
| test_train_multiple_reward_funcs, …_with_weights, …_with_None_output | one run, with the metrics |
| test_reward_metric_reflects_reward_weights | the same run |
| test_warning_raised_all_rewards_none | all None stops the check before training |
| test_train_different_reward_model, test_train_multiple_mixed_reward_funcs | the same |
| test_train_reward_func_conversational | the same |
| functions: sync and async, column, trainer state, logs | tests/unit/tasks/rl/test_rewards.py |
| losses and masks in numbers | test_loss_figures.py there, scripts/against_trl_rl.py |
| PEFT config, PEFT model, evaluation, resume, processes | tests/integration/test_rl.py |
| test_rewards.py: accuracy, think format, repetition | test_builtin_rewards.py there |

Left out: vision, Liger, environments, tools, rollout_func, chat_template_kwargs, workers,
pad_to_multiple_of and iterable datasets (there are none here); delta, entropy bonus and filter,
off-policy masks, sync_ref_model, normalize_then_sum, reward clipping, cosine and overlong rewards
(not offered); generation kwargs and top-k (refused, tests/cli/test_rl.py); vLLM in the process and
continuous batching (another sampler; a server is in test_rl_server.py); callbacks on logs and init
arguments (TRL's own names).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.config.rl import RL_LOSSES
from ftlevel.errors import RunError
from sampling import every
from tiny_models import save_tiny

FUNCTIONS = """
def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]

def unique(completions, **kwargs):
    return [len(set(text)) / 100 for text in completions]

def where_even(completions, level, **kwargs):
    return [None if one % 2 else 0.5 for one in level]

def one(completions, **kwargs):
    return [1.0] * len(completions)

def nothing(completions, **kwargs):
    return [None] * len(completions)

def of_messages(completions, prompts, **kwargs):
    assert prompts[0][0]["role"] == "user"
    return [len(completion[0]["content"]) / 100 for completion in completions]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prompts as texts and as messages, and reward functions."""
    path = tmp_path_factory.mktemp("rl")
    prompts = [f'def f{i}(a, b):\n    """' for i in range(4)]
    rows = [{"prompt": prompt, "level": i} for i, prompt in enumerate(prompts)]
    talks = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    for name, made in (("rows", rows), ("talks", talks)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (path / "rewards.py").write_text(FUNCTIONS)
    save_tiny(path / "model", "llama", chat=True)
    return path


def run(
    data: Path, out: Path, reward: tuple[str, ...] = ("vowels",), rows: str = "rows", **rl: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the adapter and the log of a run of two steps; names of `reward` are functions."""
    named = [one if "/" in one else f"{data}/rewards.py:{one}" for one in reward]
    size = rl.pop("prompts", 4)
    settings = {"num_generations": 3, "max_completion_length": 8, "check_groups": 0, **rl}
    train(
        TrainConfig(
            task="rl",
            model={"name_or_path": str(data / "model"), "dtype": "float32"},
            data={"dataset": str(data / f"{rows}.jsonl")},
            rl={"reward": named, **settings},
            train={
                "max_steps": 2,
                "learning_rate": 0.01,
                "per_device_train_batch_size": size,
                "logging_steps": 1,
                "save_strategy": "no",
            },
            speed={"verify": False},
            output={"dir": out},
        )
    )
    return load_file(out / "adapter" / "adapter_model.safetensors"), load_log(out)


def load_log(out: Path) -> list[dict[str, Any]]:
    """Return the record of each step of a run."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if "loss" in record]


def has_changed(adapter: dict[str, torch.Tensor]) -> bool:
    """Return whether every B of the LoRA, zero before, has changed."""
    return all(bool(value.any()) for name, value in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize("loss", every(2, list(RL_LOSSES)))
def test_each_loss_trains(data: Path, tmp_path: Path, loss: str) -> None:
    adapter, log = run(data, tmp_path / "run", loss=loss)
    assert has_changed(adapter)
    assert len(log) == 2


def test_single_completions_are_compared_over_the_batch(data: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {"loss": "reinforce++", "num_generations": 1, "check_groups": 4}
    adapter, log = run(data, tmp_path / "run", stop=["e"], **own)
    assert has_changed(adapter)
    assert "groups_with_signal" not in log[0]
    with pytest.raises(RunError, match="all 4 sampled completions have the same reward"):
        run(data, tmp_path / "same", ("one",), stop=["e"], **own)


SETTINGS: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.1},
    "beta-corrected": {"beta": 0.1, "use_bias_correction_kl": True},
    "batch-scale": {"scale_rewards": "batch"},
    "no-scale": {"scale_rewards": "none"},
    "two-iterations": {"num_iterations": 2},
    "one-prompt": {"prompts": 1},
}


@pytest.mark.parametrize("name", every(2, list(SETTINGS)))
def test_each_setting_trains(data: Path, tmp_path: Path, name: str) -> None:
    adapter, log = run(data, tmp_path / "run", **SETTINGS[name])
    assert has_changed(adapter)
    assert ("kl" in log[0]) == ("beta" in SETTINGS[name])


def test_masked_truncated_completions(data: Path, tmp_path: Path) -> None:
    masked: dict[str, Any] = {"mask_truncated_completions": True}
    with pytest.raises(RunError, match="training had no effect"):
        run(data, tmp_path / "all", max_completion_length=2, **masked)
    log = load_log(tmp_path / "all")
    assert log[0]["truncated"] == 1
    assert log[0]["loss"] == pytest.approx(0)
    adapter, log = run(data, tmp_path / "some", stop=["e"], **masked)
    assert 0 < log[0]["truncated"] < 1
    assert has_changed(adapter)


def test_several_rewards_with_weights_and_without_a_part(data: Path, tmp_path: Path) -> None:
    names = ("vowels=0.5", "where_even=2", "one=0.25")
    _, log = run(data, tmp_path / "run", names)
    rollouts = map(json.loads, (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines())
    for group in rollouts:
        for completion in group["completions"]:
            vowels, even, one = completion["scores"]
            assert one == 1
            assert even == (None if group["row"] % 2 else 0.5)
            total = 0.5 * vowels + 2 * (even or 0) + 0.25
            assert completion["reward"] == pytest.approx(total)
    keys = [key for key in log[0] if key.startswith("reward")]
    assert len(keys) >= 4


def test_rewards_that_have_no_part_anywhere(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="reward"):
        run(data, tmp_path / "run", ("nothing",), check_groups=2)


def test_a_reward_model_beside_a_function(data: Path, tmp_path: Path) -> None:
    scores = save_tiny(tmp_path / "scores", "llama", "seqcls", num_labels=1)
    adapter, log = run(data, tmp_path / "run", (str(scores), "one"))
    assert has_changed(adapter)
    assert len(log) == 2


def test_messages(data: Path, tmp_path: Path) -> None:
    adapter, _ = run(data, tmp_path / "run", ("of_messages",), rows="talks")
    assert has_changed(adapter)
