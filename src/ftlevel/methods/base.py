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
from ftlevel.methods.lora_conversion import LoraConversion
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import MethodInfo, Rule


@dataclass(frozen=True)
class Base:
    """Facts about the base model and the run that `Method.build` needs.

    Attributes:
        config: configuration of the base model, as in transformers.
        architecture: `encoder`, `decoder` or `encoder-decoder`.
        task_type: PEFT task type; None for masked LMs.
        targets: names of the adapted modules, shortened to suffixes that PEFT matches.
        heads: names of the modules that are fully trained.
        fan_in_fan_out: whether the adapted layers are `Conv1D`.
        total_steps: number of optimizer steps of the run.
        parameters: names of adapted tensors outside linear layers, such as fused experts.
        unused: names of modules that do not affect the loss.
    """

    config: Any
    architecture: str
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
        """Keyword arguments for any PEFT config class that has `target_modules`."""
        return {
            "task_type": self.task_type,
            "target_modules": self.targets,
            "modules_to_save": self.heads or None,
        }


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """Quantized base model; `quantization` is 4bit or 8bit of bitsandbytes, none otherwise."""

    name: str
    format: str
    quantization: str


@dataclass(frozen=True)
class InitializationInputs:
    """What an initialization may need besides the model; data and weights are loaded on demand.

    `batches` returns batches, with a mask `supervised` `(batch, seq)`; they can be iterated again.
    `float_weights` returns a function that loads a linear layer's unquantized weight `(out, in)` by
    name, on the CPU.
    """

    batches: Callable[[], Any]
    float_weights: Callable[[], Callable[[str], Any]]
    device: str
    dtype: str


class Initialization:
    """Base class of adapter initializations; the default is PEFT's and keeps the base unchanged."""

    def required_dtype(self, spec: Any, dtype: str) -> Choice | None:
        """Returns the dtype that `spec` requires, or None; `ConfigError` if `dtype` differs."""
        return None

    def rewrites_base(self, spec: Any) -> bool:
        """Returns whether initialization changes the base weights."""
        return False

    def without_weights(self, spec: Any) -> Any:
        """Returns `spec` with PEFT's default initialization, for models on the meta device."""
        return spec

    def initialize(self, model: Any, spec: Any, inputs: InitializationInputs) -> None:
        """Initialize the adapter of `model` (modified) in addition to PEFT's own initialization."""

    def copy(self, model: Any) -> dict[str, Any]:
        """Returns name → copy of the initial tensors that `as_saved` needs after training."""
        return {}

    def as_saved(
        self, model: Any, initial: dict[str, Any]
    ) -> AbstractContextManager[dict[str, Any] | None]:
        """Context manager that yields the state dict to save, or None to save `model` as it is.

        `initial` is the result of `copy`. The state dict fits the base before initialization.
        """
        return nullcontext()


@dataclass(frozen=True)
class MergeInfo:
    """How adapters of a method are merged into the base weights.

    Attributes:
        peft_types: `peft_type` values in adapter_config.json.
        into_weights: whether adapters can be merged.
        get_error: takes adapter_config.json; returns why the adapter cannot be merged, or None.
        prepare: removes settings that matter only for training from a `PeftConfig` (modified).
        restore: takes a loaded `PeftModel` (modified) and its config; sets values not in its file.
        lora_conversion: conversion to a plain LoRA of the unchanged base, for inference servers.
    """

    peft_types: tuple[str, ...] = ()
    into_weights: bool = True
    get_error: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    prepare: Callable[[Any], None] = lambda _: None
    restore: Callable[[Any, Any], None] = lambda *_: None
    lora_conversion: LoraConversion = field(default_factory=LoraConversion)


@dataclass(frozen=True)
class StepSupport:
    """Which parts of the fast training step support a method.

    Each attribute maps a method's configuration to the reason why a part is unsupported, or "".

    Attributes:
        fusing: fused layers; None for methods other than LoRA.
        packing: packed rows.
        workers: micro-batches in parallel threads.
        pruning: skipping unsupervised tokens in the last layer.
    """

    fusing: Callable[[Any], str] | None = None
    packing: Callable[[Any], str] = lambda _: ""
    workers: Callable[[Any], str] = lambda _: ""
    pruning: Callable[[Any], str] = lambda _: ""


@runtime_checkable
class HasState(Protocol):
    """Protocol of Trainer callbacks whose own state is saved in checkpoints, with the model's."""

    def save_state(self, path: Path) -> None:
        """Save in the directory `path` what the callback needs to resume training."""

    def load_state(self, path: Path, model: Any) -> None:
        """Restore from the directory `path` what `save_state` wrote; `model` is modified."""


class Method:
    """Base class of fine-tuning methods; its defaults fit most, `info` and `rate` have none.

    A subclass overrides `build`, or `unfreeze` if the model's own weights are trained. `spec` is
    the method's section of the configuration.

    Attributes:
        info: rows of the support table, in display order.
        rate: default peak learning rates.
        rules: unsupported cells of the support table.
        tuner: module whose import registers a tuner of ftlevel in PEFT; empty for PEFT's tuners.
        step: support for the fast training step.
        peft_loaders: functions that load adapters trained with PEFT's own tuner, by PEFT type.
        resume_method: method that trains saved adapters of this one further; empty: this one.
        resume_error: why neither adapters nor runs of this method can be trained further.
        changes_shape: whether tensors change their shape during training.
        page: Markdown text for docs/methods.md.
    """

    info: tuple[MethodInfo, ...]
    rate: Rates
    rules: tuple[Rule, ...] = ()
    tuner: str = ""
    initialization: Initialization = Initialization()
    step: StepSupport = StepSupport()
    merge_info: MergeInfo = MergeInfo()
    peft_loaders: Mapping[str, Callable[[Any, Path, str], Any]] = MappingProxyType({})
    resume_method: str = ""
    resume_error: str = ""
    changes_shape: bool = False
    page: str = ""

    def __init__(self) -> None:
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

    def format_spec(self, spec: Any) -> str:
        """Returns the settings in `spec` as one line of text."""
        values = spec.model_dump(exclude={"kind", "target_modules"})
        return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)

    def get_error(
        self, spec: Any, config: Any, architecture: str, task: str, quant: str
    ) -> str | None:
        """Returns why the method does not support the model of `config`, and a fix; or None."""
        return None

    def get_quantized_error(self, spec: Any, base: QuantizedCheckpoint) -> str | None:
        """Returns why the method does not support a quantized checkpoint, or None.

        On weights quantized by other libraries than bitsandbytes, PEFT supports only plain LoRA.
        """
        if base.quantization != "none":
            return None
        return (
            f"--model {base.name} is quantized by {base.format}, for which PEFT supports --method "
            "lora only. Use --method lora, or the original model with --quant 4bit."
        )

    def get_embedding_error(self, spec: Any) -> str | None:
        """Returns why `spec` cannot adapt embeddings; "" if it can, None if no `spec` can."""
        return None

    def default_target_modules(self, spec: Any, model: Any) -> list[str]:
        """Returns the full names, sorted, of the modules adapted if `target_modules` is unset."""
        return []

    def check(self, spec: Any, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if `spec` does not fit `sizes`: layer name → (in, out) features."""

    def num_parameters(self, spec: Any, sizes: Mapping[str, tuple[int, int]]) -> int | None:
        """Returns the number of adapter parameters for layers of `sizes`; None if it is unknown."""
        return None

    def positions(self, spec: Any) -> int:
        """Returns the number of virtual tokens, by which the maximum length of texts is reduced."""
        return 0

    def trains_base(self, spec: Any) -> bool:
        """Returns whether weights of the base model are trained, apart from heads."""
        return False

    # With a model:

    def build(self, spec: Any, base: Base) -> Any:
        """Returns the `PeftConfig`; not overridden if the model's own weights are trained."""
        return None

    def unfreeze(self, spec: Any, base: Base, model: Any) -> None:
        """Unfreeze the weights to train in the frozen `model`, for methods without an adapter."""

    def prepare(self, model: Any) -> None:
        """Change `model` for training, after the adapter was added; does nothing by default."""

    def optimizer(self, spec: Any, model: Any, args: Any) -> Any:
        """Returns an optimizer, or None for the Trainer's; `args` are `TrainingArguments`."""
        return None

    def callbacks(self, spec: Any, checkpoint_dir: Path, should_save: bool) -> list[Any]:
        """Returns Trainer callbacks, one of which may be a `HasState`.

        `should_save` is whether this process saves the checkpoints in `checkpoint_dir`.
        """
        return []

    def penalty(self, model: Any) -> Any:
        """Returns a regularization term (scalar) that is added to the loss of a step, or None."""
        return None

    def finish(self, model: Any) -> None:
        """Remove training-only modules of the trained `PeftModel` (modified) before saving."""


def as_int(number: float) -> int | float:
    """Returns `number` as int if it is integral, as PEFT saves such values in configs."""
    return int(number) if float(number).is_integer() else number


def shortest_names(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """Returns the shortest suffixes (1 to 3 parts or all) that match only `targets` in `names`."""
    selected, available = set(targets), set(names)
    for depth in (1, 2, 3):
        short = {".".join(name.split(".")[-depth:]) for name in selected}
        if {n for n in available if any(n == s or n.endswith(f".{s}") for s in short)} == selected:
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


class MergeNotAllowedError(NotImplementedError, ValueError):
    """Raised on merging an adapter that cannot be merged.

    PEFT raises NotImplementedError in `merge`, ValueError in `_check_merge_allowed`; this is both.
    """


class UnmergeableLayer:
    """Mixin for layers that cannot be merged; a base class before `BaseTunerLayer`."""

    merge_error: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raise `MergeNotAllowedError`."""
        raise MergeNotAllowedError(self.merge_error)

    def unmerge(self) -> NoReturn:
        """Raise `MergeNotAllowedError`."""
        raise MergeNotAllowedError(self.merge_error)


class UnmergeableTuner:
    """Mixin for tuners of unmergeable layers; a base class before `BaseTuner`."""

    tuner_layer_cls: type[UnmergeableLayer]

    def _check_merge_allowed(self) -> NoReturn:
        raise MergeNotAllowedError(self.tuner_layer_cls.merge_error)
