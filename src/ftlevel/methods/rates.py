"""The learning rate where the user gives none: by the method, the model's kind and width, the run.

What papers give is for models some thousand features wide and for runs of thousands of steps; a
narrow model in a short run learns next to nothing at it. So a method says two rates: what was
measured to be best on narrow models in short runs (`benchmarks/defaults.py`), and what is used on
wide ones in long runs. Between the two a rate falls by a power of the width and of the steps,

    rate = narrow · (wide / narrow)^t,  t = ½ ln(width / 384) / ln(4096 / 384)
                                          + ½ ln(steps / 100) / ln(3000 / 100),

each of the halves between 0 and ½, rounded to one digit.

New heads learn at a rate of their own: which, and how an optimizer is told.

Learning rates where the user gives none: the rule, and the rate of new heads.

What each method's rates are stands in its own module. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftlevel.config.section import Choice

if TYPE_CHECKING:
    import torch


NARROW, SHORT = 384, 100  # features and steps of the measurements
WIDE, LONG = 4096, 3000
TOKEN_HEAD = 3
"""How many times the rate is best where every token has a target: so with each of five methods on
the tags of `benchmarks/defaults.py`. Where a row has one or two targets, classes and spans alike,
most methods learn nothing at that."""
_ARTICLES = {"encoder": "an", "decoder": "a", "encoder-decoder": "an"}


@dataclass(frozen=True)
class RunFacts:
    """What is known before a run.

    Attributes:
        kind: of the model: encoder, decoder or encoder-decoder.
        width: features of its hidden states.
        new_head: whether it gets a head that begins at random.
        steps: optimizer steps of the run.
        deep_head: whether that head has a layer of its own below the last.
        token_head: whether that head has a target for every token, and not one or two a row.
    """

    kind: str
    width: int
    new_head: bool
    steps: int
    deep_head: bool = False
    token_head: bool = False

    def __str__(self) -> str:
        """In words: `an encoder of hidden size 384 with a new head for tokens and 100 steps`."""
        head = " with a new head" if self.new_head else ""
        head += " for tokens" if self.token_head else ""
        model = f"{_ARTICLES[self.kind]} {self.kind} of hidden size {self.width:,}{head}"
        return f"{model} and {self.steps:,} step{'s' * (self.steps != 1)}"

    @property
    def size(self) -> float:
        """How large model and run are: 0 as the measured ones, 1 as those of papers."""
        return (_between(self.width, NARROW, WIDE) + _between(self.steps, SHORT, LONG)) / 2


def _between(value: int, low: int, high: int) -> float:
    """Return where the logarithm of `value` is between `low` and `high`: from 0 to 1."""
    return min(max(math.log(max(value, 1) / low) / math.log(high / low), 0.0), 1.0)


@dataclass(frozen=True)
class Rates:
    """The peak rates of a method.

    Attributes:
        narrow: measured on narrow models in short runs, with one or two targets a row.
        wide: used on wide models in long runs.
        source: of `wide`.
        kinds: kind of model → what was measured with its own language head, where that is another.
        tokens: what was measured where every token has a target, if not `TOKEN_HEAD` times as much.
        is_heads: whether heads are all that is trained, so that there is one rate.
    """

    narrow: float
    wide: float
    source: str
    kinds: Mapping[str, float] = field(default_factory=dict)
    tokens: float | None = None
    is_heads: bool = False

    def rate(self, known: RunFacts) -> float:
        """Return the rate of a run, rounded to one digit."""
        narrow = self.measured(known)
        return float(f"{narrow * (self.wide / narrow) ** known.size:.0e}")

    def measured(self, known: RunFacts) -> float:
        """Return the rate for such a head and model, were it narrow and the run short."""
        rate = self.narrow if known.new_head else self.kinds.get(known.kind, self.narrow)
        if known.token_head and not self.is_heads:
            return min(rate * TOKEN_HEAD, 1.0) if self.tokens is None else self.tokens
        return rate

    def choose(self, what: str, known: RunFacts, name: str = "learning rate") -> Choice:
        """Return the rate with its reason.

        Args:
            what: is trained, as `lora`.
            known: of the run.
            name: of the choice.
        """
        narrow = self.measured(known)
        if known.size == 0:
            why = "measured"
        elif known.size == 1:
            why = self.source
        else:
            why = f"{narrow:g} on short runs, {self.wide:g} on long ones, {self.source}"
        return Choice(name, self.rate(known), f"default for {what} on {known}; {why}")


HEAD = Rates(
    narrow=2e-2, wide=5e-4, source="what keeps a step on wide features as small", is_heads=True
)
"""Of a new head of one linear. One rate for all loses up to ten points of accuracy in 100 steps:
what brings a random head anywhere breaks the pretrained rest, and what that bears leaves the head
where it was."""
DEEP_HEAD = Rates(narrow=5e-3, wide=1e-4, source=HEAD.source, is_heads=True)
"""Of a new head with a layer below the last, as RoBERTa's or a new pooler: its tanh saturates."""


def choose_head_rate(known: RunFacts) -> Choice:
    """Return the rate of a new head, with its reason."""
    rates, what = (DEEP_HEAD, "a deep head") if known.deep_head else (HEAD, "a linear head")
    return rates.choose(what, known, "head learning rate")


@dataclass(frozen=True)
class HeadRate:
    """The rate of heads that begin at random.

    Attributes:
        modules: names in the base model.
        rate: at the peak.
    """

    modules: Sequence[str]
    rate: float


def set_head_rate(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, heads: HeadRate
) -> None:
    """Move the heads' parameters into groups with their rate (`optimizer` is mutated).

    What else a group says, as its weight decay, stays; a second call changes nothing.

    Args:
        optimizer: before its schedule is made, which multiplies the rate of every group.
        model: with the method on it; PEFT's names hold the base model's.
        heads: and their rate.
    """
    inside = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if any(f".{module}." in f".{name}" for module in heads.modules)
    }
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in inside]
        if not own:
            continue
        others = [parameter for parameter in group["params"] if id(parameter) not in inside]
        if others:
            group["params"] = others
            group = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**group, "params": own, "lr": heads.rate})
        else:
            group["lr"] = heads.rate


__all__ = ["HeadRate", "Rates", "RunFacts", "choose_head_rate", "set_head_rate"]
