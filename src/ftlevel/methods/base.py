"""Interface of PEFT methods: how a method is built, initialized, trained, saved and merged.

Each method module fills in a `Method`. Callers never check which method they have; everything that
differs between methods is a field here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

from ftlevel.config.section import Choice
from ftlevel.methods.facts import MethodFacts, Rule
from ftlevel.methods.plain_form import ASKED, PlainForm
from ftlevel.methods.rates import Rates


@dataclass(frozen=True)
class Base:
    """Base model to which a method is applied.

    `targets` are the shortest suffixes that PEFT matches; `heads` are fully trained; `parameters`
    are adapted tensors outside linear layers, such as fused experts. `unused` modules do not affect
    the loss. `task_type` is None for masked LMs.
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
    unused: list[str] = field(default_factory=list)

    @property
    def shared(self) -> dict[str, Any]:
        """Arguments common to the PEFT configs of all methods that adapt modules."""
        return {
            "task_type": self.task_type,
            "target_modules": self.targets,
            "modules_to_save": self.heads or None,
        }


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """Base model whose checkpoint is quantized; `kind` is `none` for other libraries' formats."""

    name: str
    form: str
    kind: str


@dataclass(frozen=True)
class InitializationInputs:
    """Inputs of data- or weight-dependent initializations, computed on demand.

    `batches` returns a re-iterable of batches with a mask `supervised` `(batch, seq)`.
    `float_weights` returns a function from the name of a linear layer to its unquantized weight
    `(out, in)` on the CPU.
    """

    batches: Callable[[], Any]
    float_weights: Callable[[], Callable[[str], Any]]
    device: str
    dtype: str


@dataclass(frozen=True)
class Initialization:
    """Initialization of a method that differs from PEFT's default.

    Attributes:
        precision: (spec, `--dtype`) -> required dtype, or None; may raise `ConfigError`.
        begin: initializes the adapter of the model (mutated).
        rewrites_base: spec -> whether initialization changes the base weights.
        copy: untrained model -> tensors by name that `convert_for_saving` needs.
        as_saved: (trained model, copied tensors) -> context manager of the state dict to save for
            the unchanged base; None saves the model as it is.
        default: spec -> spec with the same shapes and PEFT's default initialization.
    """

    precision: Callable[[Any, str], Choice | None]
    begin: Callable[[Any, Any, InitializationInputs], None]
    rewrites_base: Callable[[Any], bool]
    copy: Callable[[Any], dict[str, Any]]
    as_saved: Callable[[Any, dict[str, Any]], AbstractContextManager[dict[str, Any] | None]]
    default: Callable[[Any], Any]


@dataclass(frozen=True)
class Merging:
    """How adapters of a method are merged into the base weights.

    Attributes:
        peft_types: `peft_type` values in adapter_config.json, including PEFT's own tuners.
        into_weights: whether merging is possible at all.
        why_not: adapter_config.json -> reason and fix if this adapter cannot be merged, or None.
        prepare: removes training-only settings from a `PeftConfig` (mutated) before injection.
        restore: sets values that the file lacks on the injected adapter (mutated).
        plain_form: conversion to a plain LoRA of the unchanged base, for inference servers.
    """

    peft_types: tuple[str, ...] = ()
    into_weights: bool = True
    why_not: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    prepare: Callable[[Any], None] = lambda _: None
    restore: Callable[[Any, Any], None] = lambda *_: None
    plain_form: PlainForm = ASKED


@dataclass(frozen=True)
class StepSupport:
    """Support for the fast training step; each function returns a reason against it, or "".

    `fusing` is None for methods other than LoRA; `workers` names state that concurrent passes
    share.
    """

    fusing: Callable[[Any], str] | None = None
    packing: Callable[[Any], str] = lambda _: ""
    workers: Callable[[Any], str] = lambda _: ""
    pruning: Callable[[Any], str] = lambda _: ""


def refuse_other_forms(_spec: Any, base: QuantizedCheckpoint) -> str | None:
    """Return why only plain LoRA works on weights quantized by another library, or None."""
    if base.kind != "none":
        return None
    return (
        f"--model {base.name} is quantized by {base.form}, for which PEFT supports --method lora "
        f"only. Use --method lora, or the original model with --quant 4bit."
    )


@runtime_checkable
class HasState(Protocol):
    """Method callback with state outside the model's tensors."""

    def keep(self, directory: Path) -> None:
        """Save the state in `directory`."""

    def take_up(self, directory: Path, model: Any) -> None:
        """Load the state from `directory` into the trained `model` (mutated)."""


@dataclass(frozen=True)
class Method:
    """A PEFT method; all fields but `facts`, `rate` and `build` are optional.

    Attributes:
        facts: rows of the support table, in display order.
        rate: default peak learning rates, or a function of the spec.
        build: (spec, base) -> `peft.PeftConfig`; None if the model itself is trained.
        rules: unsupported cells of the support table.
        unfreeze: sets `requires_grad` of a frozen model (mutated), instead of `build`.
        trains_base: spec -> whether base weights are trained.
        register: registers a tuner of ftlevel in PEFT; idempotent, imports peft.
        find_targets: (spec, meta model) -> sorted full names of adapted modules; None if the user
            selects linear layers with `target_modules`.
        check: raises `ConfigError` if layer sizes, name -> (in, out), do not fit the spec.
        count: (spec, layer sizes) -> trainable parameters; None if only PEFT can tell.
        describe: spec -> its settings in one line.
        refuse: (spec, model config, kind, task, quant) -> reason and fix if unsupported, to follow
            `--method NAME: `; None otherwise. Called before weights load.
        refuse_quantized: the same for a quantized checkpoint, as a complete message.
        positions: spec -> model positions used by virtual tokens.
        prepare: changes the model with the method applied (mutated) before training.
        start: initialization other than PEFT's default.
        optimizer: (spec, model, `TrainingArguments`) -> optimizer, or None for Trainer's default.
        callbacks: (spec, checkpoint directory, whether this process writes) -> callbacks; one may
            be a `HasState`.
        penalty: model -> regularization term of an optimizer step.
        continued_as: method that continues training of its adapters, if another.
        why_not_continued: reason if neither adapters nor runs can be trained further.
        finish: removes training-only modules of the trained `PeftModel` (mutated) before saving.
        step: support for the fast training step.
        merging: how adapters are merged.
        page: Markdown text for docs/methods.md.
        on_embeddings: spec -> why it cannot adapt embeddings and output layers, or "".
        plain: PEFT type -> loader (base, directory, adapter name) that uses ftlevel's tuner.
    """

    facts: tuple[MethodFacts, ...]
    rate: Rates | Callable[[Any], Rates]
    build: Callable[[Any, Base], Any] | None
    rules: tuple[Rule, ...] = ()
    unfreeze: Callable[[Any, Base, Any], None] | None = None
    trains_base: Callable[[Any], bool] = lambda _: False
    register: Callable[[], None] | None = None
    find_targets: Callable[[Any, Any], list[str]] | None = None
    check: Callable[[Any, Mapping[str, tuple[int, int]]], None] | None = None
    count: Callable[[Any, Mapping[str, tuple[int, int]]], int | None] | None = None
    describe: Callable[[Any], str] | None = None
    refuse: Callable[[Any, Any, str, str, str], str | None] | None = None
    refuse_quantized: Callable[[Any, QuantizedCheckpoint], str | None] = refuse_other_forms
    positions: Callable[[Any], int] | None = None
    prepare: Callable[[Any], None] | None = None
    start: Initialization | None = None
    optimizer: Callable[[Any, Any, Any], Any] | None = None
    callbacks: Callable[[Any, Path, bool], list[Any]] | None = None
    penalty: Callable[[Any], Any] | None = None
    continued_as: str = ""
    why_not_continued: str = ""
    finish: Callable[[Any], None] | None = None
    step: StepSupport = StepSupport()
    merging: Merging = Merging()
    page: str = ""
    on_embeddings: Callable[[Any], str] | None = None
    plain: Mapping[str, Callable[[Any, Path, str], Any]] = field(default_factory=dict)

    def rates(self, spec: Any) -> Rates:
        """Return the default peak learning rates."""
        return self.rate(spec) if callable(self.rate) else self.rate

    def rewrites_base(self, spec: Any) -> bool:
        """Return whether initialization changes the base weights."""
        return self.start is not None and self.start.rewrites_base(spec)


def whole(number: float) -> int | float:
    """Return an integral number as int, so that ranks are ints and saved configs compare equal."""
    return int(number) if float(number).is_integer() else number


VIRTUAL_TOKENS = (
    "Virtual tokens are inputs and not weights, so no weight of the base model can hold them and "
    "they cannot be merged. Keep the adapter separate from the base, or train with a method that "
    "merges, "
    "such as --method lora."
)


class UnmergeableLayer:
    """Mixin for layers that cannot be merged; must precede `BaseTunerLayer`."""

    cannot_merge: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise `NotImplementedError`, as PEFT's layers do."""
        raise NotImplementedError(self.cannot_merge)

    def unmerge(self) -> NoReturn:
        """Raise `NotImplementedError`, as PEFT's layers do."""
        raise NotImplementedError(self.cannot_merge)


class UnmergeableTuner:
    """Mixin for tuners of unmergeable layers; must precede `BaseTuner`."""

    tuner_layer_cls: type[UnmergeableLayer]

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)
