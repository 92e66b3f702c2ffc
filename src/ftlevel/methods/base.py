"""Interface of PEFT methods: how a method is built, initialized, trained, saved and merged.

A method is a subclass of `Method`, whose members have defaults that fit most methods. Callers never
check which method they have; everything that differs between methods is a member here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Protocol, runtime_checkable

from ftlevel.config.section import Choice
from ftlevel.methods.facts import MethodFacts, Rule
from ftlevel.methods.plain_form import PlainForm
from ftlevel.methods.rates import Rates


@dataclass(frozen=True)
class Base:
    """Base model to which a method is applied.

    `targets` are names of adapted modules, shortened to suffixes that PEFT matches. `heads` are
    fully trained. `parameters` are adapted tensors outside linear layers, such as fused experts.
    `unused` modules do not affect the loss. `task_type` is None for masked LMs.
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
        """Arguments that the PEFT configs of all methods have in common, if they adapt modules."""
        return {
            "task_type": self.task_type,
            "target_modules": self.targets,
            "modules_to_save": self.heads or None,
        }


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """Base model with a quantized checkpoint; `kind` is `none` if not quantized by bitsandbytes."""

    name: str
    form: str
    kind: str


@dataclass(frozen=True)
class InitializationInputs:
    """Inputs of data- or weight-dependent initializations, computed on demand.

    `batches` returns batches with a mask `supervised` `(batch, seq)`; they can be iterated again.
    `float_weights` returns a function that loads a linear layer's unquantized weight `(out, in)` by
    name, on the CPU.
    """

    batches: Callable[[], Any]
    float_weights: Callable[[], Callable[[str], Any]]
    device: str
    dtype: str


class Initialization:
    """Initialization of an adapter; by default PEFT's, which leaves the base unchanged."""

    def required_dtype(self, spec: Any, dtype: str) -> Choice | None:
        """Returns the dtype that `spec` needs, or None; raises `ConfigError` if `dtype` differs."""
        return None

    def rewrites_base(self, spec: Any) -> bool:
        """Returns whether initialization changes the base weights."""
        return False

    def without_weights(self, spec: Any) -> Any:
        """Returns `spec` with PEFT's default initialization, for models on the meta device."""
        return spec

    def initialize(self, model: Any, spec: Any, inputs: InitializationInputs) -> None:
        """Initialize the adapter of `model` (modified)."""

    def copy(self, model: Any) -> dict[str, Any]:
        """Returns tensors of the untrained model, by name, to pass to `as_saved` after training."""
        return {}

    def as_saved(
        self, model: Any, initial: dict[str, Any]
    ) -> AbstractContextManager[dict[str, Any] | None]:
        """Returns a context manager that yields the state dict to save for the original base.

        `initial` is the result of `copy`. If the context yields None, `model` is saved unchanged.
        """
        return nullcontext()


@dataclass(frozen=True)
class Merging:
    """How adapters of a method are merged into the base weights.

    Attributes:
        peft_types: `peft_type` values in adapter_config.json, including PEFT's own tuners.
        into_weights: whether merging is possible at all.
        why_not: adapter_config.json -> why this adapter cannot be merged, with a fix, or None.
        prepare: removes training-only settings from a `PeftConfig` (modified) before injection.
        restore: sets values of the injected adapter (modified) that are not saved in its file.
        plain_form: conversion to a plain LoRA of the unchanged base, for inference servers.
    """

    peft_types: tuple[str, ...] = ()
    into_weights: bool = True
    why_not: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    prepare: Callable[[Any], None] = lambda _: None
    restore: Callable[[Any, Any], None] = lambda *_: None
    plain_form: PlainForm = field(default_factory=PlainForm)


@dataclass(frozen=True)
class StepSupport:
    """Support for the fast step: each function returns why one part is unsupported, or "".

    `fusing` is for fused layers (None for methods other than LoRA), `workers` for parallel batches.
    """

    fusing: Callable[[Any], str] | None = None
    packing: Callable[[Any], str] = lambda _: ""
    workers: Callable[[Any], str] = lambda _: ""
    pruning: Callable[[Any], str] = lambda _: ""


@runtime_checkable
class HasState(Protocol):
    """Trainer callback of a method, with state to save that is not in the model's tensors."""

    def save_state(self, directory: Path) -> None:
        """Save the state in `directory`."""

    def load_state(self, directory: Path, model: Any) -> None:
        """Load the state from `directory` into the trained `model` (modified)."""


class Method:
    """A PEFT method; a subclass sets `facts` and `rate`, and overrides defaults that do not fit.

    Each overrides `build`, or, if the model's own weights are trained, `unfreeze`.

    `spec` is always the method's section of the configuration.

    Attributes:
        facts: rows of the support table, in display order.
        rate: default peak learning rates.
        rules: unsupported cells of the support table.
        tuner: module that adds a tuner of ftlevel to PEFT when it is imported.
        initialization: how the adapter is initialized.
        step: support for the fast training step.
        merging: how adapters are merged.
        plain_loaders: PEFT type -> loader (base, directory, adapter name) of PEFT's own adapters.
        continued_as: method that continues training of its adapters, if not itself.
        why_not_continued: reason if neither adapters nor runs can be trained further.
        changes_shape: whether tensors change their shape during training.
        page: Markdown text for docs/methods.md.
    """

    facts: tuple[MethodFacts, ...]
    rate: Rates
    rules: tuple[Rule, ...] = ()
    tuner: str = ""
    initialization: Initialization = Initialization()
    step: StepSupport = StepSupport()
    merging: Merging = Merging()
    plain_loaders: Mapping[str, Callable[[Any, Path, str], Any]] = MappingProxyType({})
    continued_as: str = ""
    why_not_continued: str = ""
    changes_shape: bool = False
    page: str = ""

    def __init__(self) -> None:
        """Raise TypeError for a method that trains nothing."""
        if not self.is_adapter and type(self).unfreeze is Method.unfreeze:
            raise TypeError(f"{type(self).__name__} defines neither build nor unfreeze")

    @property
    def is_adapter(self) -> bool:
        """Whether PEFT adds an adapter; otherwise the model's own weights are trained."""
        return type(self).build is not Method.build

    # Before weights load:

    def rates(self, spec: Any) -> Rates:
        """Returns the default peak learning rates."""
        return self.rate

    def describe(self, spec: Any) -> str:
        """Returns the settings of `spec` in one line."""
        values = spec.model_dump(exclude={"kind", "target_modules"})
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

    def refuse(self, spec: Any, config: Any, kind: str, task: str, quant: str) -> str | None:
        """Returns why a model is unsupported and a fix (text after `--method NAME: `), or None."""
        return None

    def refuse_quantized(self, spec: Any, base: QuantizedCheckpoint) -> str | None:
        """Returns why a quantized checkpoint is unsupported, as a complete message, or None.

        On weights quantized by other libraries than bitsandbytes, PEFT supports only plain LoRA.
        """
        if base.kind != "none":
            return None
        return (
            f"--model {base.name} is quantized by {base.form}, for which PEFT supports --method "
            "lora only. Use --method lora, or the original model with --quant 4bit."
        )

    def refuse_embeddings(self, spec: Any) -> str | None:
        """Returns why `spec` cannot adapt embeddings: "" if it can, None if no `spec` ever can."""
        return None

    def find_targets(self, spec: Any, model: Any) -> list[str]:
        """Returns the sorted full names of the modules to adapt if `target_modules` is not set."""
        return []

    def check(self, spec: Any, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if layer sizes, name -> (in, out), do not fit `spec`."""

    def count(self, spec: Any, sizes: Mapping[str, tuple[int, int]]) -> int | None:
        """Returns the number of trainable parameters; None if only PEFT can tell."""
        return None

    def positions(self, spec: Any) -> int:
        """Returns how many of the model's positions are taken by virtual tokens."""
        return 0

    def trains_base(self, spec: Any) -> bool:
        """Returns whether base weights are trained."""
        return False

    # With a model:

    def build(self, spec: Any, base: Base) -> Any:
        """Returns the `peft.PeftConfig` for `spec` on `base`; None without an adapter."""
        return None

    def unfreeze(self, spec: Any, base: Base, model: Any) -> None:
        """Without an adapter, unfreeze the trained weights of the frozen `model` (modified)."""

    def prepare(self, model: Any) -> None:
        """Change `model` (modified), to which the method has been applied, before training."""

    def optimizer(self, spec: Any, model: Any, arguments: Any) -> Any:
        """Returns the optimizer, or None for the Trainer's; `arguments` are `TrainingArguments`."""
        return None

    def callbacks(self, spec: Any, checkpoints: Path, writes: bool) -> list[Any]:
        """Returns callbacks, one of which may be a `HasState`.

        `checkpoints` is the directory of checkpoints; `writes` is whether this process writes them.
        """
        return []

    def penalty(self, model: Any) -> Any:
        """Returns the regularization term of an optimizer step, or None."""
        return None

    def finish(self, model: Any) -> None:
        """Remove training-only modules of the trained `PeftModel` (modified) before saving."""


def as_int(number: float) -> int | float:
    """Returns an integral number as int, so that ranks are ints and saved configs compare equal."""
    return int(number) if float(number).is_integer() else number


def shortest_names(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """Returns the shortest suffixes by which PEFT selects exactly `targets` among `names`.

    Other programs expect `q_proj` instead of full names in adapter_config.json.
    """
    selected, others = set(targets), set(names)
    for depth in (1, 2, 3):
        short = {".".join(name.split(".")[-depth:]) for name in selected}
        if {n for n in others if any(n == s or n.endswith(f".{s}") for s in short)} == selected:
            return short
    return selected


VIRTUAL_TOKENS = (
    "Virtual tokens are inputs and not weights, so no weight of the base model can hold them and "
    "they cannot be merged. Keep the adapter separate from the base, or train with a method that "
    "merges, such as --method lora."
)


VIRTUAL_TOKEN_STEP = StepSupport(
    packing=lambda spec: f"{spec.kind} puts virtual tokens into every row",
    workers=lambda spec: f"{spec.kind} keeps its place in the model",
)


class UnmergeableLayer:
    """Mixin for layers that cannot be merged; must precede `BaseTunerLayer`."""

    cannot_merge: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise `NotImplementedError`, as PEFT layers do."""
        raise NotImplementedError(self.cannot_merge)

    def unmerge(self) -> NoReturn:
        """Raise `NotImplementedError`, as PEFT layers do."""
        raise NotImplementedError(self.cannot_merge)


class UnmergeableTuner:
    """Mixin for tuners of unmergeable layers; must precede `BaseTuner`."""

    tuner_layer_cls: type[UnmergeableLayer]

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)
