"""Convert RL settings of TRL, Unsloth, ms-swift and verl without changing their meaning.

Their defaults for a loss differ from its paper, and their batch sizes count completions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlevel.config.flag import Alias, FlagAliases
from ftlevel.config.reading import flatten
from ftlevel.errors import ConfigError, join_names
from ftlevel.extras.rl.config import REWARDS, RL_LOSSES, RL_TASK, RlConfig

_MARKS = {
    "--loss-type": "TRL",
    "--reward-funcs": "TRL",
    "--reward-model-name-or-path": "TRL",
    "--rlhf-type": "ms-swift",
}
"""Flag that only one tool has → that tool."""
_MS_SWIFT_DEFAULTS = {"loss": "grpo", "beta": 0.04, "temperature": 0.9}
_TRL_RLOO_DEFAULTS = {"num_generations": 2, "beta": 0.05}
REWARD_FUNCS = {
    **dict.fromkeys(("accuracy_reward", "trl.rewards.accuracy_reward", "accuracy"), "math"),
    **dict.fromkeys(("think_format_reward", "trl.rewards.think_format_reward"), "format:think"),
    "format": r"regex:(?s)\A<think>.*?</think>\s*<answer>.*?</answer>\Z",
}
"""Reward function of TRL or ms-swift → built-in reward."""


def parse_reward_funcs(text: str) -> str:
    """Convert comma-separated reward functions to repeated `--reward` settings."""
    result = []
    for name in filter(None, map(str.strip, text.split(","))):
        module, _, function = name.rpartition(".")
        file = f"{module.replace('.', '/')}.py"
        reward = REWARD_FUNCS.get(name, name if name.count(".py:") == 1 or "/" in name else "")
        if not reward and Path(file).is_file():
            reward = f"{file}:{function}"
        if not reward:
            raise ValueError(
                f"{name!r} has no counterpart. Built in: {join_names(REWARDS, 20)}; a function is "
                "named by its file: --reward FILE.py:FUNCTION"
            )
        result.append(reward)
    return " --reward ".join(result)


_ACTOR, _ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
_VERL = {
    "actor_rollout_ref.model.path": "model",
    "actor_rollout_ref.model.lora_rank": "lora-r",
    "actor_rollout_ref.model.lora_alpha": "lora-alpha",
    "data.train_files": "dataset",
    "data.val_files": "validation-file",
    "data.max_response_length": "max-completion-length",
    "data.train_batch_size": "batch-size",
    f"{_ROLLOUT}n": "num-generations",
    f"{_ROLLOUT}temperature": "temperature",
    f"{_ROLLOUT}top_p": "top-p",
    f"{_ACTOR}optim.lr": "learning-rate",
    f"{_ACTOR}clip_ratio_low": "epsilon",
    f"{_ACTOR}clip_ratio_high": "epsilon-high",
    f"{_ACTOR}ppo_epochs": "num-iterations",
    "trainer.total_epochs": "num-train-epochs",
    "trainer.total_training_steps": "max-steps",
}
"""Key of verl → flag of the same meaning; verl's batch counts prompts too."""
_VERL_DEFAULTS: dict[str, Any] = {
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    "data.train_batch_size": 1024,
    "algorithm.adv_estimator": "gae",
    f"{_ACTOR}policy_loss.loss_mode": "vanilla",
    f"{_ACTOR}ppo_mini_batch_size": 256,
    f"{_ACTOR}optim.lr": 1e-6,
    "trainer.total_epochs": 30,
}
_VERL_LOSSES = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "rloo": "rloo",
    "reinforce_plus_plus": "reinforce++",
    "gspo": "gspo",
}
"""verl's advantage estimator, loss mode or loss aggregation → loss."""


def convert_verl(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yields (key, command-line arguments) of a verl configuration; no arguments if unsupported."""
    keys = {**_VERL_DEFAULTS, **dict(flatten(values))}
    yield "task", ["--task", "rl"]
    yield "reward_model", ["--reward", "number"]
    names = [f"{_ACTOR}policy_loss.loss_mode", "algorithm.adv_estimator"]
    kinds = {name: str(keys.pop(name)) for name in names}
    loss = next((_VERL_LOSSES[kind] for kind in kinds.values() if kind in _VERL_LOSSES), None)
    yield from ((n, []) for n in names if kinds[n] not in ("vanilla", "grpo", *_VERL_LOSSES))
    mode = keys.pop(f"{_ACTOR}loss_agg_mode", "token-mean")
    name = loss or _VERL_LOSSES.get(str(mode))
    yield f"{_ACTOR}loss_agg_mode", ["--loss", name] if name else []
    is_scaled = keys.pop("algorithm.norm_adv_by_std_in_grpo", True)
    if loss is None:
        scale = ["--scale-rewards", "group" if is_scaled else "none"]
        yield "algorithm.norm_adv_by_std_in_grpo", scale
    beta = str(keys.pop(f"{_ACTOR}kl_loss_coef", 0.001))
    if keys.pop(f"{_ACTOR}use_kl_loss", False):
        yield f"{_ACTOR}kl_loss_coef", ["--beta", beta]
    if not keys.get("actor_rollout_ref.model.lora_rank"):
        yield "actor_rollout_ref.model.lora_rank", ["--method", "full"]
    length = int(keys.pop("data.max_prompt_length")) + int(keys["data.max_response_length"])
    yield "data.max_prompt_length", ["--max-length", str(length)]
    batch = f"{_ACTOR}ppo_mini_batch_size"
    if keys[batch] == keys["data.train_batch_size"]:  # one optimizer step per rollout
        del keys[batch]
    low = keys.pop(f"{_ACTOR}clip_ratio", 0.2)
    keys.setdefault(f"{_ACTOR}clip_ratio_low", low)
    keys.setdefault(f"{_ACTOR}clip_ratio_high", low)
    for key, flag in _VERL.items():
        value = keys.get(key)
        if value not in (None, 0, []):
            texts = map(str, value) if isinstance(value, list) else [str(value)]
            yield key, [f"--{flag}", ",".join(texts)]
    yield from ((key, []) for key in keys if key not in _VERL)


def convert_keys(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]] | None:
    """Returns `convert_verl` of a configuration file's `values`; None for another tool's."""
    return convert_verl(values) if "actor_rollout_ref" in values else None


ALIASES = {
    "rl.reward": FlagAliases(
        (
            "--reward-model",
            "--reward-model-name-or-path",
            Alias("--reward-funcs", convert=parse_reward_funcs, multiple=True),
        )
    ),
    "rl.max_completion_length": FlagAliases(("--response-length",)),
    "rl.epsilon": FlagAliases(("--epsilon-low",)),
    "rl.rollouts": FlagAliases(("--vllm-server-base-url",)),
    "rl.scale_rewards": FlagAliases(values={"true": "group", "false": "none"}),
    "rl.mask_truncated_completions": FlagAliases(("--overlong-filter",)),
}


def complete_flags(task: str, values: dict[str, Any], typed: Mapping[str, str]) -> list[str]:
    """Set the other tool's defaults where its flags leave a value unset; return a message each.

    Args:
        task: task of the run; only `rl` is changed.
        values: section → fields set by flags; `rl` and `train` are modified.
        typed: flag → name that the user typed.

    Raises:
        ConfigError: the batch does not consist of whole groups.
    """
    tools = {_MARKS[name] for name in typed.values() if name in _MARKS}
    if not tools or task != RL_TASK:
        return []
    tool = "ms-swift" if "ms-swift" in tools else "TRL"
    rl, lines = values.setdefault("rl", {}), list[str]()

    def keep(name: str, value: Any, reason: str) -> None:
        if name not in rl and value != getattr(RlConfig(), name):
            rl[name] = value
            lines.append(f"--{name.replace('_', '-')} {value} is kept, as in {tool}: {reason}")

    task_loss = str(values.get("task")).lower()  # grpo and rloo are aliases of the task
    default = task_loss if task_loss in RL_LOSSES else "dapo"
    is_rloo = "rloo" in (rl.get("loss"), default)
    defaults = _TRL_RLOO_DEFAULTS if is_rloo else {}
    for name, value in (_MS_SWIFT_DEFAULTS if tool == "ms-swift" else defaults).items():
        keep(name, value, "its default")
    loss = RL_LOSSES.get(str(rl.get("loss", default)).lower())
    if loss is None:
        return lines
    epsilon = rl.get("epsilon", 0.2)
    if loss.epsilon_high != epsilon and "epsilon_high" in loss.parameters:
        paper = f"the paper has {loss.epsilon_high:g}"
        if loss.epsilon is None:  # the cap multiplies the gradient
            paper = f"a gradient of at most {epsilon:g} times its size; {paper}"
        keep("epsilon_high", epsilon, paper)
        if loss.epsilon not in (None, epsilon):
            keep("epsilon", epsilon, f"the paper has {loss.epsilon:g}")
    if loss.scale == "none" and "scale_rewards" in loss.parameters:
        keep("scale_rewards", "group", "Dr. GRPO divides by no standard deviation")
    if rl.get("beta") and not is_rloo and tool == "TRL":
        keep("use_bias_correction_kl", True, "the KL term is multiplied by the ratio")
    data, completion = values.get("data", {}), rl.get("max_completion_length", 512)
    if tool == "ms-swift" and (prompt := str(data.get("max_length", ""))).isdecimal():
        data["max_length"] = int(prompt) + completion
        lines.append(
            f"--max-length {data['max_length']}: ms-swift counts {prompt} tokens of the prompt "
            f"only, and ftlevel also the {completion} of the completion"
        )
    return lines + _batch(values, rl, tool)


def _batch(values: dict[str, Any], rl: Mapping[str, Any], tool: str) -> list[str]:
    """Convert the batch size in `values` from completions of `tool` to prompts; return messages."""
    train = values.setdefault("train", {})
    is_swift = tool == "ms-swift"
    size = train.get("per_device_train_batch_size", 1 if is_swift else 8)
    steps = train.get("gradient_accumulation_steps")
    if steps is None:  # ms-swift accumulates to at least 16 completions
        steps = math.ceil(16 / size / (train.get("num_processes") or 1)) if is_swift else 1
    group = int(rl.get("num_generations", 8))
    if (size * steps) % group:
        raise ConfigError(
            f"--num-generations {group}: {tool} counts completions, and a batch of {size} × "
            f"{steps} is not a multiple of it. Change --per-device-train-batch-size."
        )
    if size % group:
        size, steps = size * steps, 1
    train["per_device_train_batch_size"] = size // group
    train["gradient_accumulation_steps"] = steps
    return [
        f"batch of {size // group} prompts with {group} completions each: {tool} counts "
        f"{size} completions, and ftlevel prompts"
    ]
