"""What a method is to the rest: its facts, how it gets onto a model, and what it does in a run.

A method's own module fills in a `Method`. Every member but the facts and the rate is optional, and
nobody outside asks which method it has in hand: what differs between methods is a member here.

Refusing to merge, in the way that PEFT's base classes ask of what no weight can hold.
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

    @property
    def shared(self) -> dict[str, Any]:
        """What every config of PEFT for a method that adapts modules is given."""
        return {
            "task_type": self.task_type,
            "target_modules": self.targets,
            "modules_to_save": self.heads or None,
        }


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A base whose weights were quantized before this run.

    Attributes:
        name: of the model, as the user gave it.
        form: by what it was quantized, as `GPTQ, 4-bit`.
        kind: as in `--quant`; none where it is another library's form.
    """

    name: str
    form: str
    kind: str


@dataclass(frozen=True)
class StartInputs:
    """What a method may begin from, made only if it is asked for.

    Attributes:
        batches: gives the training rows in batches on the device, to be gone through as often as
            one likes; each has a mask `supervised` (batch, seq) of the tokens that are learned.
        float_weights: gives the way from a linear's name in the base to its weight (out, in)
            before quantization, on the CPU.
        device: torch device type.
        dtype: compute precision's name.
    """

    batches: Callable[[], Any]
    float_weights: Callable[[], Callable[[str], Any]]
    device: str
    dtype: str


@dataclass(frozen=True)
class Start:
    """How a method begins, where that is more than PEFT's default.

    Attributes:
        precision: spec and `--dtype` → the precision that the start needs, None for any; raises
            ConfigError where the user wants another.
        begin: model, spec and what it may begin from; mutates the model before it is trained.
        rewrites_base: spec → whether the start is taken out of the base's weights, so that with
            the adapter off the model is not what it was.
        copy: untrained model → what `as_saved` needs of the start, by tensors' names.
        as_saved: trained model and copied start → context that gives the state dict to save for
            the untouched base; None saves the model as it is.
        default: spec → the spec of the same shapes that begins as PEFT's default.
    """

    precision: Callable[[Any, str], Choice | None]
    begin: Callable[[Any, Any, StartInputs], None]
    rewrites_base: Callable[[Any], bool]
    copy: Callable[[Any], dict[str, Any]]
    as_saved: Callable[[Any, dict[str, Any]], AbstractContextManager[dict[str, Any] | None]]
    default: Callable[[Any], Any]


@dataclass(frozen=True)
class Merging:
    """How an adapter of a method becomes part of the base's weights.

    Attributes:
        peft_types: what adapter_config.json calls its adapters, those of PEFT's own tuners for the
            same method too.
        into_weights: whether it can at all.
        why_not: adapter_config.json → why this adapter cannot be merged and what to do, or None.
        prepare: the adapter's `PeftConfig`, mutated before it is put onto the base: what only
            training needs goes.
        restore: the adapter on its base, and its config; mutated: what the file does not hold.
        plain_form: how it becomes plain LoRA on the untouched base, as servers read it.
    """

    peft_types: tuple[str, ...] = ()
    into_weights: bool = True
    why_not: Callable[[Mapping[str, Any]], str | None] = lambda _: None
    prepare: Callable[[Any], None] = lambda _: None
    restore: Callable[[Any, Any], None] = lambda *_: None
    plain_form: PlainForm = ASKED


@dataclass(frozen=True)
class StepSupport:
    """What of the fast step a method goes with: spec → the reason against, empty for none.

    Attributes:
        fusing: why its linears are PEFT's; None where they are no LoRA in the first place.
        packing: why rows need padding.
        workers: what a forward pass changes in the model, so that two at once would meet.
        pruning: why the last block computes every token.
    """

    fusing: Callable[[Any], str] | None = None
    packing: Callable[[Any], str] = lambda _: ""
    workers: Callable[[Any], str] = lambda _: ""
    pruning: Callable[[Any], str] = lambda _: ""


def refuse_other_forms(_spec: Any, base: QuantizedCheckpoint) -> str | None:
    """Return why only a plain LoRA goes onto weights that another library quantized."""
    if base.kind != "none":
        return None
    return (
        f"--model {base.name} is quantized by {base.form}, and on such weights PEFT has --method "
        "lora alone. Use --method lora, or give the original model with --quant 4bit."
    )


@runtime_checkable
class HasState(Protocol):
    """A callback of a method that knows something of the model beside its tensors."""

    def keep(self, directory: Path) -> None:
        """Write it beside the tensors."""

    def take_up(self, directory: Path, model: Any) -> None:
        """Give `model` (mutated), whose training is over, what was kept in `directory`."""


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    Attributes:
        facts: its rows of the table, in the order in which they are shown.
        rules: the cells of the table where they do not work.
        rate: peak learning rates where the user gives none, or spec → them.
        build: spec and base → `peft.PeftConfig`; None where the model itself is trained.
        unfreeze: spec, base and frozen model → nothing; in place of `build`, mutates the model.
        trains_base: spec → whether the base's own weights are trained.
        register: makes PEFT know a tuner of our own; a second call does nothing. Imports peft.
        find_targets: spec and meta model → full names of the modules it adapts, sorted; None where
            the spec's `target_modules` are linears that the user names.
        check: spec and (in, out) of each linear that it adapts → nothing; raises ConfigError
            where they do not fit.
        count: spec and (in, out) of each linear that it adapts → how many parameters it trains;
            None where only PEFT can say.
        describe: spec → its settings in a line, for the screen.
        refuse: spec, model config, kind of model, task and quantization → why the method cannot be
            used there and the nearest thing that works, in sentences that follow `--method NAME: `;
            None where it can. Asked before weights load.
        refuse_quantized: spec and a base that was quantized before → the same, as a whole message.
        positions: spec → positions of the model that the method takes from the text.
        prepare: the model that the method was put onto, mutated before it is trained.
        start: how it begins, where that is more than PEFT's default.
        optimizer: spec, model and `TrainingArguments` → the optimizer; None leaves it to Trainer.
        callbacks: spec, directory of checkpoints, and whether this process writes to it → what the
            method does between steps; one may be a `HasState`.
        penalty: trained model → what is added to the loss of an optimizer step.
        continued_as: the method by which an adapter of it is trained on, where that is another.
        why_not_continued: why neither its adapter nor a run of it can be trained for longer than
            was planned; empty where it can.
        finish: the trained `PeftModel`, mutated before it is saved: what only training needs goes.
        step: what of the fast step it goes with.
        merging: how it becomes part of the weights.
        page: what docs/methods.md says of it beside the tables, in Markdown.
        on_embeddings: spec → why it cannot go on embeddings and output layers, empty if it can,
            where they are named.
        plain: type of an adapter of PEFT's own tuner for the same → base, its directory and a name
            → the base with it on, by the tuner that is used here.
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
    start: Start | None = None
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
        """Return the peak learning rates where the user gives none."""
        return self.rate(spec) if callable(self.rate) else self.rate

    def rewrites_base(self, spec: Any) -> bool:
        """Return whether the base without the adapter is not what it was before."""
        return self.start is not None and self.start.rewrites_base(spec)


def whole(number: float) -> int | float:
    """Return a whole number as an int: PEFT divides by ranks, and saved configs compare equal."""
    return int(number) if float(number).is_integer() else number


VIRTUAL_TOKENS = (
    "Virtual tokens are inputs and not weights, so no weight of the base model can hold them and "
    "they cannot be merged. Keep the adapter beside the base, or train with a method that merges, "
    "such as --method lora."
)


class UnmergeableLayer:
    """A layer that refuses; it stands before `BaseTunerLayer` among the bases.

    Attributes:
        cannot_merge: why, and what to do instead.
    """

    cannot_merge: ClassVar[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refuse.

        Raises:
            NotImplementedError: always, as PEFT's layers do.
        """
        raise NotImplementedError(self.cannot_merge)

    def unmerge(self) -> NoReturn:
        """Refuse, as nothing was merged.

        Raises:
            NotImplementedError: always, as PEFT's layers do.
        """
        raise NotImplementedError(self.cannot_merge)


class UnmergeableTuner:
    """A tuner of such layers; it stands before `BaseTuner` among the bases."""

    tuner_layer_cls: type[UnmergeableLayer]

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(self.tuner_layer_cls.cannot_merge)
