"""Reinforcement-learning settings: loss, rewards and sampling of `--task rl`."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ftlevel.config.constraints import Excludes, Needs, NoEffect, list_violations
from ftlevel.config.evaluation import EvaluateConfig
from ftlevel.config.section import (
    TEXT_FIELDS,
    Address,
    Positive,
    TaskSection,
    list_unread,
    parse_range,
)
from ftlevel.config.sections import list_unused_fields
from ftlevel.config.trainer import PLATEAU
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.extras.rl.trust import check_reward_files

RL_TASK = "rl"
RL_RATE = 0.1
"""Factor of `--task rl` on the method's default learning rate."""
RlLossName = Literal["dapo", "grpo", "dr_grpo", "bnpo", "rloo", "gspo", "cispo", "reinforce++"]
Scale = Literal["group", "batch", "none"]
_CLIPPED = ("epsilon", "epsilon_high")


@dataclass(frozen=True)
class RlLossProperties:
    """Properties of a policy loss, with the defaults of the loss's paper.

    Attributes:
        scale: standard deviation that advantages are divided by: group, batch or none.
        epsilon: default lower clipping range; None if the ratio has no lower bound (cispo).
        epsilon_high: default upper clipping range; for cispo, the maximum of the ratio itself.
        parameters: fields of `RlConfig` that this loss uses and not every loss uses.
    """

    scale: Scale = "group"
    epsilon: float | None = 0.2
    epsilon_high: float = 0.2
    parameters: tuple[str, ...] = (*_CLIPPED, "scale_rewards")


RL_LOSSES: dict[str, RlLossProperties] = {
    "dapo": RlLossProperties(epsilon_high=0.28),
    "grpo": RlLossProperties(),
    "dr_grpo": RlLossProperties("none"),
    "bnpo": RlLossProperties(),
    "rloo": RlLossProperties("none", parameters=_CLIPPED),
    "gspo": RlLossProperties(epsilon=3e-4, epsilon_high=4e-4),
    "cispo": RlLossProperties(
        epsilon=None, epsilon_high=5.0, parameters=("epsilon_high", "scale_rewards")
    ),
    "reinforce++": RlLossProperties("batch", parameters=_CLIPPED),
}
"""Loss → properties; papers: see `extras/rl/losses.py`."""

REWARDS: dict[str, str] = {
    "exact": "",
    "contains": "",
    "number": "[TOLERANCE]",
    "math": "",
    "choice": "[LABELS]",
    "regex": "PATTERN",
    "json": "[SCHEMA.json|COLUMN]",
    "rouge": "[rouge1|rouge2|rougeL]",
    "length": "MIN-MAX",
    "format": "think",
    "repetition": "[N]",
}
"""Built-in reward → its argument after a colon; in brackets if optional."""


@dataclass(frozen=True)
class RewardSpec:
    """Parsed value of `--reward`: NAME[:ARGUMENT], FILE.py:FUNCTION or RUN, and the weight.

    `kind` is builtin, function (`name` is the file, `argument` the function) or model (`name` is a
    run, an adapter or a model).
    """

    text: str
    kind: Literal["builtin", "function", "model"]
    name: str
    argument: str = ""
    weight: float = 1.0

    @property
    def short_name(self) -> str:
        """Name in metrics, without directories; of a function, only the function's name."""
        if self.kind == "model":
            return Path(self.name).name
        if self.kind == "function":
            return self.argument
        argument = Path(self.argument).name if self.name == "json" else self.argument
        return f"{self.name}:{argument}" if argument else self.name

    def map_path(self, function: Callable[[str], str]) -> str:
        """Returns a value of `--reward`, with `function` applied to the file or model, if any."""
        is_file = self.name == "json" and self.argument.endswith(".json")
        path = self.name if self.kind != "builtin" else self.argument if is_file else ""
        if not path or (new := function(path)) == path:
            return self.text
        body = {"function": f"{new}:{self.argument}", "model": new}.get(self.kind, f"json:{new}")
        return f"{body}={repr(self.weight).removesuffix('.0')}"


_FILE = re.compile(r"(.+\.py):([^:]*)", re.DOTALL)


def parse_reward(text: str) -> RewardSpec:
    """Parse a value of `--reward`, which may end in `=WEIGHT`; raise ValueError if invalid."""
    before, equals, after = text.rpartition("=")
    weight = _number(after) if equals else None
    body = text if weight is None else before
    if weight is not None and not math.isfinite(weight):
        raise ValueError(f"{text!r}: the weight is {after}; a finite number is expected")
    if not body.strip():
        raise ValueError(f"{text!r} names no reward. Built in: {join_names(REWARDS, 20)}")
    weight = 1.0 if weight is None else weight
    if result := _FILE.fullmatch(body):
        if not result[2].isidentifier():
            raise ValueError(f"{body!r}: expected FILE.py:FUNCTION, as in rewards.py:score")
        return RewardSpec(text, "function", result[1], result[2], weight)
    if body.endswith(".py"):
        raise ValueError(f"{body!r} names no function. Write {body}:FUNCTION")
    name, colon, argument = body.partition(":")
    if name not in REWARDS:
        return RewardSpec(text, "model", body, "", weight)
    _validate_argument(name, argument, values=bool(colon))
    return RewardSpec(text, "builtin", name, argument, weight)


def _validate_argument(name: str, argument: str, *, values: bool) -> None:
    pattern = REWARDS[name]
    if (values and not argument) or (not values and pattern and not pattern.startswith("[")):
        raise ValueError(f"{name} has no argument. Write {name}:{pattern.strip('[]')}")
    if values and not pattern:
        raise ValueError(f"{name} takes no argument, got {argument!r}. Write {name}")
    expected = ""
    if name == "number" and argument and (_number(argument) is None or float(argument) < 0):
        expected = "a tolerance of 0 or more, as in number:0.01"
    elif name == "length" and parse_range(argument) is None:
        expected = "a range of tokens, as in length:20-80"
    elif name == "format" and argument != "think":
        expected = "format:think. For other forms: regex:PATTERN"
    elif name == "rouge" and argument not in ("", "rouge1", "rouge2", "rougeL"):
        expected = "rouge1, rouge2 or rougeL"
    elif name == "repetition" and argument and not (argument.isdecimal() and int(argument)):
        expected = "a number of words, as in repetition:3"
    elif name == "regex":
        try:
            re.compile(argument)
        except (re.error, RecursionError, OverflowError) as error:
            expected = f"a regular expression; {error}"
    if expected:
        raise ValueError(f"{name}:{argument}: expected {expected}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parse_texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _locate_functions(value: Any) -> Any:
    """Returns the rewards, with Python functions replaced by FILE.py:FUNCTION."""
    rewards = []
    for reward in value if isinstance(value, list | tuple) else [value]:
        name = getattr(reward, "__qualname__", type(reward).__name__)
        module = sys.modules.get(getattr(reward, "__module__", None) or "__main__")
        file = None if module is sys.modules["__main__"] else getattr(module, "__file__", None)
        if callable(reward) and (file is None or getattr(module, name, None) is not reward):
            raise ValueError(
                f"{name} is not a function at the top level of an imported module, and rewards run "
                "in a process of their own. Write it into a file, such as rewards.py, and give "
                '"rewards.py:FUNCTION"'
            )
        rewards.append(f"{file}:{name}" if callable(reward) else reward)
    return rewards


def _validate_rewards(value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        parse_reward(text)
    return value


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_parse_texts)]
Rewards = Annotated[Texts, BeforeValidator(_locate_functions), AfterValidator(_validate_rewards)]
Epsilon = Annotated[float, Field(gt=0, le=100)]


class RlConfig(TaskSection):
    """Settings of reinforcement learning."""

    tasks: ClassVar[tuple[str, ...]] = (RL_TASK,)
    summary: ClassVar[str] = "Rewards and the RL loss."
    shorthand: ClassVar[str] = "reward"
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {RL_TASK: TEXT_FIELDS}
    has_teacher: ClassVar[bool] = True
    paths: ClassVar[Mapping[str, str]] = {"reward": "--reward"}
    command_line_only: ClassVar[Mapping[str, tuple[str, str]]] = {
        "rollouts": ("--rollouts {}", "sends the prompts to this server")
    }
    code_field: ClassVar[str] = "reward"
    may_change: ClassVar[tuple[str, ...]] = ("check_groups", "reward_timeout", "on_reward_error")
    contents: ClassVar[Mapping[str, tuple[str, str]]] = {
        "reward": ("fingerprint", "reward functions or reward models")
    }
    pipeline_tags: ClassVar[Mapping[str, str]] = {RL_TASK: "text-generation"}

    reward: Rewards = Field(
        (),
        description="Reward of a completion; repeatable, with a weight as NAME=WEIGHT. Built in: "
        + ", ".join(
            name + (f":{pattern}" if pattern and pattern[0] != "[" else "")
            for name, pattern in REWARDS.items()
        )
        + "; or FILE.py:FUNCTION as in TRL, or the RUN of a reward model.",
    )
    loss: RlLossName = Field(
        "dapo", description="Policy loss, with the clipping and advantage scaling of its paper."
    )
    num_generations: Annotated[int, Field(ge=1, le=1024)] = Field(
        8, description="Number of completions sampled per prompt (group size)."
    )
    max_completion_length: Positive = Field(512, description="Maximum completion length in tokens.")
    temperature: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0, description="Sampling temperature; the loss divides logits by it, too."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Nucleus sampling; must be 1, so that the trained distribution is sampled."
    )
    beta: Annotated[float, Field(ge=0, le=100)] = Field(
        0.0, description="Weight of the KL divergence from the initial model."
    )
    epsilon: Epsilon | None = Field(
        None,
        description="Clipping of the probability ratio from below, at 1 - epsilon; default: 0.2 "
        "(gspo: 3e-4).",
    )
    epsilon_high: Epsilon | None = Field(
        None,
        description="Clipping of the probability ratio from above, at 1 + epsilon_high. Default: "
        "epsilon if given, else 0.2 (dapo: 0.28; gspo: 4e-4). For cispo, the maximum "
        "ratio itself; default: 5.",
    )
    num_iterations: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="Number of optimizer steps per batch of completions."
    )
    scale_rewards: Scale | None = Field(
        None,
        description="Standard deviation that advantages are divided by; default: group (dr_grpo: "
        "none).",
    )
    importance_sampling_level: None = Field(
        None,
        description="Level of the probability ratio, as in TRL; sequence turns grpo into gspo.",
    )
    use_bias_correction_kl: bool = Field(
        False,
        description="Whether to multiply the KL term by the importance ratio, as TRL 1.16 does.",
    )
    mask_truncated_completions: bool = Field(
        False, description="Whether to exclude truncated completions from the loss."
    )
    stop: Texts = Field((), description="Text that ends a completion; repeatable.")
    dynamic_sampling: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0,
        description="Maximum number of additional prompts per step that replace groups whose "
        "rewards are all equal (DAPO).",
    )
    rollouts: Address | None = Field(
        None,
        description="Address of a vLLM server that samples, http://HOST:PORT; default: this "
        "process samples.",
    )
    check_groups: Annotated[int, Field(ge=0, le=10_000)] = Field(
        8, description="Number of groups sampled before training to check the reward; 0: none."
    )
    reward_timeout: Annotated[float, Field(gt=0, le=86_400)] = Field(
        60.0, description="Maximum seconds for a reward to score one batch of completions."
    )
    on_reward_error: Literal["stop", "zero"] = Field(
        "stop", description="Action if a reward fails: stop, or zero (score 0, counted)."
    )

    @model_validator(mode="before")
    @classmethod
    def _sequence_ratio_is_gspo(cls, raw: Any) -> Any:
        """Convert TRL's grpo with sequence-level ratios to gspo, keeping the clipping of grpo."""
        level = raw.get("importance_sampling_level") if isinstance(raw, dict) else None
        if level is None:
            return raw
        rest = {name: v for name, v in raw.items() if name != "importance_sampling_level"}
        loss = rest.get("loss", "dapo")
        if level == "token" and loss != "gspo":
            return rest
        if level == "sequence" and loss in ("grpo", "gspo"):
            clip = {} if loss == "gspo" else {"epsilon": 0.2}
            return {**clip, **rest, "loss": "gspo"}
        raise ValueError(
            f"--importance-sampling-level {level} with --loss {loss}: one ratio per completion is "
            "--loss gspo, and one per token any other. Drop it"
        )

    @property
    def loss_properties(self) -> RlLossProperties:
        """Properties of the configured loss."""
        return RL_LOSSES[self.loss]

    @property
    def rewards(self) -> list[RewardSpec]:
        """Parsed values of `reward`."""
        return [parse_reward(text) for text in self.reward]

    @property
    def reward_names(self) -> list[str]:
        """Names of the rewards in metrics; functions of equal name are prefixed by their file."""
        specs = self.rewards
        names = [spec.short_name for spec in specs]
        return [
            f"{Path(spec.name).stem}.{name}"
            if spec.kind == "function" and names.count(name) > 1
            else name
            for spec, name in zip(specs, names, strict=True)
        ]

    @property
    def scale(self) -> Scale:
        """Standard deviation that divides advantages: the setting, or the default of the loss."""
        return self.scale_rewards or self.loss_properties.scale

    @property
    def clip(self) -> tuple[float | None, float]:
        """Effective (epsilon, epsilon_high); for cispo, (None, maximum ratio)."""
        high, properties = self.epsilon_high, self.loss_properties
        if self.epsilon is None:
            return properties.epsilon, properties.epsilon_high if high is None else high
        return self.epsilon, self.epsilon if high is None else high

    @property
    def steps_per_batch(self) -> int:
        """Number of optimizer steps per batch of completions: `num_iterations`."""
        return self.num_iterations

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of generated tokens: that of sampled completions."""
        return self.max_completion_length

    def get_rate_factor(self, method: str, kind: str, size: float) -> tuple[float, str]:
        """Returns the factor on the default learning rate."""
        return RL_RATE, "as in the GRPO papers"

    def validate_run(self, config: Any) -> Iterator[str]:
        """Yields an error message for each value that `--task rl` cannot use."""
        return validate_rl(config)

    def check_code(self, location: str) -> Iterator[str]:
        """Yields a message for each Python file of rewards that the user has not run before."""
        return check_reward_files(self.rewards, location)

    @classmethod
    def map_path(cls, field: str, value: str, function: Callable[[str], str]) -> str:
        """Returns the reward `value`, with `function` applied to its file or model."""
        return parse_reward(value).map_path(function)


class RewardOptions(EvaluateConfig):
    """Options of `ftlevel evaluate` for runs of `--task rl`."""

    reward: Rewards = Field(
        (),
        description="Reward in place of those of the run's --task rl; repeatable. Required if the "
        "run has a FILE.py:FUNCTION that you have not run on this machine.",
    )

    def check_task(self, task: str) -> None:
        """Raise ConfigError if rewards are given for a model of another task."""
        super().check_task(task)
        if self.reward and task != RL_TASK:
            raise ConfigError(
                f"--reward {self.reward[0]}: {self.name} was trained for {task}, and rewards score "
                "completions of --task rl. Drop it."
            )


TOKEN_LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo")
"""Losses with one ratio per token, which on-policy distillation can use."""
_DROPOUT = (
    "the model that samples and the model that is trained would differ, and log-probabilities and "
    "ratios would be noise"
)
SAMPLED = "would sample from another distribution than the one that is trained"
_TEACHER, _RL, _DROP = "distillation.teacher", f"task={RL_TASK}", "Drop it."
_PLAIN_LORA = (
    "a vLLM server loads plain LoRA adapters only",
    "Use plain --method lora, or drop --rollouts.",
)
CONSTRAINTS = (
    Excludes("rl.reward", _TEACHER,
         "completions are compared with the teacher and have no reward"),
    Excludes("rl.beta", _TEACHER,
         "the divergence from the teacher replaces that from the initial model"),
    Excludes("rl.scale_rewards", _TEACHER, "advantages are log-ratios and are not scaled"),
    Excludes("rl.dynamic_sampling", _TEACHER, "every prompt has a signal"),
    Excludes(f"rl.loss!={'|'.join(TOKEN_LOSSES)}", _TEACHER,
         "each token has an advantage of its own, and this loss has one per completion",
         f"Use {', '.join(TOKEN_LOSSES)}."),
    *list_unused_fields(RL_TASK, "--teacher minimizes the reverse KL divergence at --temperature"),
    Excludes("rl.num_generations=1", "rl.loss!=reinforce++",
         "a completion is compared with the others of its prompt", "Use 2 or more.",
         when=f"{_TEACHER}=None"),
    NoEffect("rl.dynamic_sampling", "rl.loss=reinforce++",
         "it compares completions over the whole batch, so every prompt has a signal"),
    Needs("rl.use_bias_correction_kl", "rl.beta!=0.0 N"),
    Excludes("rl.rollouts", "method.kind!=lora", *_PLAIN_LORA),
    Excludes("rl.rollouts", "method.use_dora", *_PLAIN_LORA),
    Excludes("rl.rollouts", "method.modules_to_save", *_PLAIN_LORA),
    Excludes("rl.rollouts", "method.trainable_token_indices", *_PLAIN_LORA),
    Excludes("rl.rollouts", "train.num_processes!=None|1",
         "each process would load an adapter of its own"),
    Excludes("rl.top_p", _RL, f"it {SAMPLED}", _DROP),
    Excludes("train.neftune_noise_alpha", _RL, _DROPOUT, _DROP),
    Excludes("train.spike_factor", _RL,
         "its loss is near 0 and may be negative, so multiples of it mean nothing", _DROP),
    Excludes("train.label_smoothing_factor", _RL, "it has no target tokens", _DROP),
    Excludes(f"train.lr_scheduler_type={PLATEAU}", _RL, "it has no validation loss",
         "Use another."),
    Excludes("data.train_on_inputs", _RL, "it trains on sampled completions only", _DROP),
)  # fmt: skip
"""Rules of `--task rl`, besides those of `validate_rl`."""


def validate_rl(config: Any) -> Iterator[str]:
    """Yields an error message for each value of a `TrainConfig` that `--task rl` cannot use."""
    rl = config.rl
    dropouts = [name for name in type(config.method).model_fields if name.endswith("dropout")]
    rules = [Excludes(f"method.{name}", _RL, _DROPOUT, _DROP) for name in dropouts]
    yield from list_violations(config, (*CONSTRAINTS, *rules))
    if config.distillation.teacher is not None:
        return
    parameters = {name: facts.parameters for name, facts in RL_LOSSES.items()}
    yield from list_unread("rl", rl.changed, rl.loss, parameters)
    if not rl.reward:
        yield (
            "--task rl has no reward. Add --reward exact, or another built-in one "
            f"({join_names([n for n in REWARDS if n != 'exact'], 20)}), FILE.py:FUNCTION, or the "
            "run of a reward model; or --teacher MODEL."
        )
    elif not any(spec.weight for spec in rl.rewards):
        yield "--reward: all weights are 0, so nothing can be learned. Use another weight."
    names = rl.reward_names
    if doubled := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        yield (
            f"--reward: {join_names(doubled)} is given twice. Give each reward once, with the sum "
            "of the weights; functions need different names or files."
        )


def unknown_reward(name: str) -> str:
    """Returns the message for a reward that is neither built in nor a file or run."""
    return (
        f"--reward {name}: no built-in reward, run or model has that name."
        f"{did_you_mean(name, REWARDS)} Built in: {join_names(REWARDS, 20)}; or FILE.py:FUNCTION."
    )
