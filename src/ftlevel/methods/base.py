"""What a method is to the engine: how it finds its modules and how it becomes a `peft` config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Base:
    """The facts of the model that a method is put onto.

    Attributes:
        config: the model's config.
        kind: encoder, decoder or encoder-decoder.
        task_type: PEFT's TaskType, or None for masked language models.
        targets: modules that the method adapts, in the shortest names that PEFT reads as them.
        heads: modules that are trained and saved in full.
        fan_in_fan_out: whether the targets are Conv1D, whose weight is (in, out).
        total_steps: optimizer steps of the run.
        tokenizer: the model's, for methods that begin with a text.
        parameters: tensors outside of linears that the method adapts, as those of experts.
    """

    config: Any
    kind: str
    task_type: str | None
    targets: list[str]
    heads: list[str]
    fan_in_fan_out: bool
    total_steps: int
    tokenizer: Any = None
    parameters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    Attributes:
        build: spec and base → `peft.PeftConfig`.
        find_targets: spec and meta model → full names of the modules it adapts, sorted; None where
            the spec's `target_modules` are linears that the user names.
        targets_linears: whether `--target-modules` applies.
        describe: spec → its settings in a line, for the screen.
        refuse: spec, model config, kind of model, task and quantization → why the method cannot be
            used there and the nearest thing that works, in sentences that follow `--method NAME: `;
            None where it can. Asked before weights load.
        positions: spec → positions of the model that the method takes from the text.
        prepare: the model that the method was put onto, mutated before it is trained.
        finish: the trained `PeftModel`, mutated before it is saved: what only training needs goes.
        adapts: `norms` where it trains every norm outside the heads.
        check: spec and the input width of each linear that it adapts → nothing; raises ConfigError
            where they do not fit.
        count: spec and (in, out) of each linear that it adapts → how many parameters it trains;
            None where only PEFT can say.
        penalty: trained model → what is added to the loss of an optimizer step.
    """

    build: Callable[[Any, Base], Any]
    find_targets: Callable[[Any, Any], list[str]] | None = None
    targets_linears: bool = True
    describe: Callable[[Any], str] | None = None
    refuse: Callable[[Any, Any, str, str, str], str | None] | None = None
    positions: Callable[[Any], int] | None = None
    prepare: Callable[[Any], None] | None = None
    finish: Callable[[Any], None] | None = None
    adapts: Literal["linears", "norms"] = "linears"
    check: Callable[[Any, Mapping[str, int]], None] | None = None
    count: Callable[[Any, Mapping[str, tuple[int, int]]], int | None] | None = None
    penalty: Callable[[Any], Any] | None = None


def whole(number: float) -> int | float:
    """Return a whole number as an int: PEFT divides by ranks, and saved configs compare equal."""
    return int(number) if float(number).is_integer() else number
