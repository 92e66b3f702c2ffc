"""TRL's GRPO and RLOO tests that do not depend on its internals, as runs of ftlevel.

Compared entry by entry with TRL's files of 24 July 2026 (1.10.0.dev0), because the packages of
1.16.0 have no tests. RLOO's tests have the same names as GRPO's, except for those marked.

Mirrored, without `test_train_` in front:

- test_train: each family; loss_types, sequence_importance_sampling, test_train (RLOO): each loss
- dataset_format, reward_func_standard, reward_func_conversational: texts in all runs; messages
- with_eval, eval_on_start, test_init_with_eval_dataset, test_evaluate_with_eval_dataset: evaluation
- multiple_iterations, test_prepare_input_called_with_correct_data: prompts of two iterations
- beta_non_zero, beta_zero (RLOO), with_bias_correction_kl, scale_rewards,
  num_generations_larger_than_batch_size: each setting
- peft_with_gradient_checkpointing: checkpointing; moe_peft_model: LoRA on experts
- with_mask_truncated_completions, …_all_masked: masked truncated completions
- multiple_reward_funcs, …_with_None_output, …_with_weights, test_reward_metric_reflects_weights:
  several rewards; test_warning_raised_all_rewards_none: it stops the check before training
- different_reward_model, multiple_mixed_reward_funcs, test_single_reward_model_…: a reward model
- sync_and_async_reward_funcs, reward_func_additional_column, …_accessing_trainer_state,
  …_with_log_extra, …_with_log_metric: tests/unit/extras/rl/test_rewards.py
- peft_config, peft_model, test_init_minimal: tests/integration/test_rl.py
- with_generation_kwargs, with_iterable_dataset, test_no_reward_source_raises,
  test_warning_raised_sequence_level_…: refused, tests/cli/test_rl.py
- vllm_and_peft, vllm_importance_sampling_correction: test_rl_server.py
- test_rewards.py (accuracy, think format, repetition): tests/unit/extras/rl/test_builtin_rewards.py
- losses in numbers: tests/unit/extras/rl/test_loss_figures.py

Left out:

- not offered: entropy filter, bonus and adaptive entropy; off-policy masks; delta clipping; losses
  sapo, luspo and vespo; sync_ref_model; normalize_then_sum; clipped rewards and normalized
  advantages (RLOO); num_generations_eval; rollout_func, environments and tool calls;
  chat_template_kwargs; cosine, reasoning-accuracy and overlong rewards; images
- parts of TRL: Liger kernels, cast_lm_head_to_fp32, vLLM in the process or with structured outputs,
  transformers' continuous batching, pad_to_multiple_of, data loader workers, lists of processing
  classes
- the same for all tasks and tested there: trust_remote_code, missing data
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlevel.commands.generate import Chat, generate
from ftlevel.commands.predict import predict
from ftlevel.commands.train import train
from ftlevel.config import GenerateConfig, PredictConfig, TrainConfig
from ftlevel.data.encoding.prompts import encode_prompt
from ftlevel.errors import RunError
from ftlevel.extras.rl.config import RL_LOSSES
from ftlevel.trained.resolve import resolve_model
from sampling import every
from tiny_models import save_tiny

FUNCTIONS = """
def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]

def unique(completions, **kwargs):
    return [len(set(text)) / 100 for text in completions]

def logs(completions, level, log_metric, log_extra, **kwargs):
    log_metric("level", sum(level) / len(level)), log_metric("reward", -1.0)
    log_extra("kind", [f"{one} of {len(level)}" for one in level])
    return unique(completions)

def where_even(completions, level, **kwargs):
    return [None if one % 2 else 0.5 for one in level]

def one(completions, **kwargs):
    return [1.0] * len(completions)

def nothing(completions, **kwargs):
    return [None] * len(completions)

def at_step(completions, trainer_state, **kwargs):
    assert trainer_state.epoch == trainer_state.global_step < trainer_state.max_steps
    assert len(trainer_state.log_history) >= trainer_state.global_step
    return [float(trainer_state.global_step)] * len(completions)

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
    message_rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    for name, lines in (("rows", rows), ("talks", message_rows)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (path / "rewards.py").write_text(FUNCTIONS)
    save_tiny(path / "model", "llama", chat=True)
    return path


def run(
    data: Path, out: Path, reward: tuple[str, ...] = ("vowels",), rows: str = "rows", **rl: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Return the adapter and the log of a run of two steps; names of `reward` are functions."""
    reward_names = [name if "/" in name else f"{data}/rewards.py:{name}" for name in reward]
    size, model = rl.pop("prompts", 4), rl.pop("model", data / "model")
    method, train_overrides = rl.pop("method", {}), rl.pop("train", {})
    split = rl.pop("validation_split", 0.0)
    rl_settings = {"num_generations": 3, "max_completion_length": 8, "check_groups": 0, **rl}
    train(
        TrainConfig(
            task="rl",
            model={"name_or_path": str(model), "dtype": "float32"},
            method=method,
            data={"dataset": str(data / f"{rows}.jsonl"), "validation_split": split},
            rl={"reward": reward_names, **rl_settings},
            train={
                "max_steps": 2,
                "learning_rate": 0.01,
                "per_device_train_batch_size": size,
                "logging_steps": 1,
                "save_strategy": "no",
                **train_overrides,
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


def read_prompts(out: Path) -> dict[int, list[int]]:
    """Return step → rows whose completions were sampled, of a run."""
    groups = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert all(len(group["completions"]) == 3 for group in groups)
    steps = sorted({group["step"] for group in groups})
    return {step: [group["row"] for group in groups if group["step"] == step] for step in steps}


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_each_family_trains(data: Path, tmp_path: Path, family: str) -> None:
    model = save_tiny(tmp_path / "model", family)
    adapter, log = run(data, tmp_path / "run", model=model)
    assert has_changed(adapter)
    assert len(log) == 2


def test_experts_train_against_the_initial_model(data: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    experts = {"kind": "lora", "target_parameters": "experts"}
    adapter, log = run(data, tmp_path / "run", model=model, method=experts, beta=0.1)
    assert has_changed(adapter)
    assert any("experts" in name for name in adapter)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[1]["kl"] > 0


@pytest.mark.parametrize("loss", every(2, list(RL_LOSSES)))
def test_each_loss_trains(data: Path, tmp_path: Path, loss: str) -> None:
    adapter, log = run(data, tmp_path / "run", loss=loss)
    assert has_changed(adapter)
    assert len(log) == 2


def test_reinforce_pp_normalizes_over_the_batch(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"loss": "reinforce++", "num_generations": 1, "check_groups": 4}
    adapter, log = run(data, tmp_path / "run", stop=["e"], **settings)
    assert has_changed(adapter)
    assert "groups_with_signal" not in log[0]
    with pytest.raises(RunError, match="all 4 sampled completions have the same reward"):
        run(data, tmp_path / "same", ("one",), stop=["e"], **settings)


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


def test_gradient_checkpointing_gives_same_adapter(data: Path, tmp_path: Path) -> None:
    expected, _ = run(data, tmp_path / "plain")
    adapter, _ = run(data, tmp_path / "run", train={"gradient_checkpointing": True})
    torch.testing.assert_close(adapter, expected, rtol=1e-4, atol=1e-6)


def test_evaluation_during_training(data: Path, tmp_path: Path) -> None:
    evaluate_each_step = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    evaluate_each_step |= {"save_strategy": "steps", "save_steps": 2}
    settings: dict[str, Any] = {"train": evaluate_each_step, "prompts": 2, "validation_split": 0.5}
    _, log = run(data, tmp_path / "run", ("vowels", "at_step=0"), **settings)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [record for record in map(json.loads, lines) if "eval_reward" in record]
    rewards = {record["step"]: record["eval_reward"] for record in evaluations}
    assert [record["reward_at_step"] for record in log] == [0, 1]
    assert {record["eval_reward_at_step"] for record in evaluations} == {0}
    assert rewards.keys() == {0, 1, 2}
    assert all(0 <= value <= 1 for value in rewards.values())
    state = tmp_path / "run" / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    assert json.loads(state.read_text())["best_metric"] == max(rewards[1], rewards[2])


def test_predictions_have_maximum_completion_length(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run")
    prompts = [{"prompt": "def f0(a, b):"}]
    default, eight, longer = (
        predict(PredictConfig(name=str(tmp_path / "run"), max_new_tokens=most), prompts).rows
        for most in (None, 8, 12)
    )
    assert default == eight != longer


def test_answers_end_at_stop_text_of_training(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", stop=["e"])
    rollouts = map(json.loads, (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines())
    completions = [completion for group in rollouts for completion in group["completions"]]
    assert any(completion["ended"] for completion in completions)
    assert not any("e" in completion["text"] for completion in completions)
    trained = resolve_model(str(tmp_path / "run"), device="cpu").load("cpu")
    tokenizer, prompts = trained.tokenizer, [f"def f{i}(a, b):" for i in range(4)]
    assert trained.ref.prompt_format is not None
    ids = [encode_prompt(tokenizer, trained.ref.prompt_format, prompt) for prompt in prompts]

    outputs = [
        trained.model.generate(torch.tensor([one]), max_new_tokens=12, do_sample=False)
        for one in ids
    ]
    tokens = [output[0, len(one) :].tolist() for output, one in zip(outputs, ids, strict=True)]
    texts, boundary = tokenizer.batch_decode(tokens), len(tokenizer.decode(tokens[0][:3]))
    spanning = texts[0][boundary - 1 : boundary + 1]  # no token has it
    assert not any(spanning in tokenizer.decode(token) for token in tokens[0])
    across = tokenizer.decode(ids[0])[-1] + texts[0][0]  # prompt and answer
    card = tmp_path / "run" / "adapter" / "ftlevel.json"
    options = {"options": {"rl": {"stop": [spanning, across]}}}
    card.write_text(json.dumps(json.loads(card.read_text()) | options))
    expected = [text.split(spanning)[0].strip() for text in texts]
    settings: dict[str, Any] = {"name": str(tmp_path / "run"), "max_new_tokens": 12}
    for size in (2, 8):  # with the decoder, and with `generate`
        rows = predict(
            PredictConfig(**settings, batch_size=size), [{"prompt": prompt} for prompt in prompts]
        ).rows
        assert [row["prediction"] for row in rows] == expected
    assert [answer.text for answer in generate(prompts=prompts, **settings)[0]] == expected
    chat, shown = Chat(GenerateConfig(**settings)), list[str]()
    assert chat.reply(prompts[0], shown.append) == "".join(shown).strip() == expected[0]


def test_prompts_are_reused_for_two_iterations(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", num_iterations=2, prompts=2, train={"max_steps": 4})
    rows = read_prompts(tmp_path / "run")
    assert rows.keys() == {1, 3}
    assert sorted(rows[1] + rows[3]) == [0, 1, 2, 3]
    shares = [record["sampling_share"] for record in load_log(tmp_path / "run")]
    assert [bool(share) for share in shares] == [True, False, True, False]


def test_truncated_completions_are_masked(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"mask_truncated_completions": True}
    with pytest.raises(RunError, match="--mask-truncated-completions excludes them"):
        run(data, tmp_path / "all", max_completion_length=2, **settings)
    log = load_log(tmp_path / "all")
    assert log[0]["truncated"] == 1
    assert log[0]["loss"] == pytest.approx(0)
    adapter, log = run(data, tmp_path / "some", stop=["e"], **settings)
    assert 0 < log[0]["truncated"] < 1
    assert has_changed(adapter)


def test_weighted_rewards_are_summed_without_none(data: Path, tmp_path: Path) -> None:
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


def test_rewards_that_are_all_none_raise(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no reward applies to any of the sampled completions"):
        run(data, tmp_path / "run", ("nothing",), check_groups=2, stop=["e"])


def test_values_that_functions_log_are_written(data: Path, tmp_path: Path) -> None:
    _, log = run(data, tmp_path / "run", ("logs",), dynamic_sampling=1, prompts=2)
    rollouts = list(map(json.loads, (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()))
    for record in log:
        rows = [group["row"] for group in rollouts if group["step"] == record["step"]]
        assert record["level"] == pytest.approx(sum(rows) / len(rows))
        assert record["reward"] > 0
    kinds = [(group["row"], c["kind"]) for group in rollouts for c in group["completions"]]
    assert all(kind == f"{row} of 6" for row, kind in kinds)


def test_reward_model_and_function_train_together(data: Path, tmp_path: Path) -> None:
    reward_model = save_tiny(tmp_path / "scores", "llama", "seqcls", num_labels=1)
    adapter, log = run(data, tmp_path / "run", (str(reward_model), "one"))
    assert has_changed(adapter)
    assert len(log) == 2


def test_conversational_prompts_train(data: Path, tmp_path: Path) -> None:
    adapter, _ = run(data, tmp_path / "run", ("of_messages",), rows="talks")
    assert has_changed(adapter)
