"""What works with what: every refusal with its reason, and the nearest thing that works.

One table feeds the engine, which refuses before weights load, `ftlevel list-methods`,
docs/methods.md and the sweep that trains every cell. It imports nothing heavy. What a task needs of
a model is in `ftlevel.tasks`; sizes that do not fit are found in the model itself; what a method
needs of a family that no table names is found by its `refuse`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ftlevel.config.sections import Section
from ftlevel.errors import ConfigError
from ftlevel.methods.facts import FACTS, MethodFacts, rows_of

_CONV1D = frozenset({"gpt2"})
_QUANTIZED = frozenset({"4bit", "8bit"})
_PRETRAINED_HEAD = frozenset({"text-generation", "summarization", "translation", "masked-lm"})
_ANY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rule:
    """Cells that do not work. An empty field stands for every value.

    Attributes:
        rows: names of `FACTS`.
        why: the reason, as a clause after a colon.
        instead: the one thing to do, as a sentence.
        experts: whether the base has experts, where the rule asks.
    """

    rows: frozenset[str]
    why: str
    instead: str
    families: frozenset[str] = _ANY
    kinds: frozenset[str] = _ANY
    tasks: frozenset[str] = _ANY
    quants: frozenset[str] = _ANY
    experts: bool | None = None

    def covers(self, cell: Cell) -> bool:
        """Whether `cell` is one of these; where the cell is open, whether all of it is."""
        return (
            cell.row in self.rows
            and _inside(cell.family, self.families)
            and (self.experts is None or cell.experts == self.experts)
            and _inside(cell.kind, self.kinds)
            and _inside(cell.task, self.tasks)
            and _inside(cell.quant, self.quants)
        )

    def touches(self, cell: Cell) -> bool:
        """Whether some of `cell`, which may be open, is one of these."""
        return (
            cell.row in self.rows
            and _meets(cell.family, self.families)
            and (None in (self.experts, cell.experts) or cell.experts == self.experts)
            and _meets(cell.kind, self.kinds)
            and _meets(cell.task, self.tasks)
            and _meets(cell.quant, self.quants)
        )

    @property
    def where(self) -> str:
        """Name the cells beside the method: `with gpt2 and without --quant`."""
        parts = [f"with {' or '.join(sorted(self.families))}"] * bool(self.families)
        parts += [f"with {kind}s" for kind in sorted(self.kinds)]
        parts += ["with a base without experts"] * (self.experts is False)
        parts += [f"for {', '.join(sorted(self.tasks))}"] * bool(self.tasks)
        if self.quants == {"none"}:
            parts.append("without --quant")
        elif self.quants:
            parts.append(f"with --quant {' or '.join(sorted(self.quants))}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Cell:
    """A method's row on a base, for a task; None leaves a side open."""

    row: str = ""
    family: str | None = None
    kind: str | None = None
    task: str | None = None
    quant: str | None = None
    experts: bool | None = None


def _inside(value: str | None, allowed: Collection[str]) -> bool:
    return not allowed or value in allowed


def _meets(value: str | None, allowed: Collection[str]) -> bool:
    return not allowed or value is None or value in allowed


def _rows(*names: str) -> frozenset[str]:
    return frozenset(names)


RULES: tuple[Rule, ...] = (
    Rule(
        _rows("full", "linear-probe"), "quantized weights receive no gradients",
        "Use --method qlora, or drop --quant.", quants=_QUANTIZED,
    ),
    Rule(
        _rows("linear-probe"), "its head is the pretrained one, so nothing would be new to train",
        "Drop method.freeze_base, or use --method lora.", tasks=_PRETRAINED_HEAD,
    ),
    Rule(
        _rows("qlora"), "it is LoRA on a quantized base, and --quant is none",
        "Use --quant 4bit or 8bit, or --method lora.", quants=frozenset({"none"}),
    ),
    Rule(
        _rows("dora"), "PEFT cannot read 8-bit weights for the magnitude",
        "Use --quant 4bit, or drop --dora.", quants=frozenset({"8bit"}),
    ),
    Rule(
        _rows("pissa", "olora"),
        "it takes its start out of the base's weights, and what is left would be quantized anew",
        "Use --init default, or drop --quant.", quants=_QUANTIZED,
    ),
    Rule(
        _rows("loftq"), "it begins at what 4-bit quantization took from the weights, and there is "
        "nothing of it here", "Use --quant 4bit, or --init pissa.", quants=frozenset({"none"}),
    ),
    Rule(
        _rows("loftq"), "8-bit quantization takes next to nothing from the weights",
        "Use --quant 4bit, or --init default.", quants=frozenset({"8bit"}),
    ),
    Rule(
        _rows("orthogonal"), "PEFT draws its start in the type of the weights, which is an integer",
        "Use --init default, or drop --quant.", quants=_QUANTIZED,
    ),
    Rule(
        _rows("olora"), "its linears are Conv1D, whose transposed weight PEFT factors as it lies",
        "Use --init pissa.", families=_CONV1D, quants=frozenset({"none"}),
    ),
    Rule(
        _rows("eva"), "encoder and decoder see other inputs, and EVA takes one mask for both",
        "Use --init pissa or default.", kinds=frozenset({"encoder-decoder"}),
    ),
    Rule(
        _rows("eva"), "some of its linears see other rows than those of the input, where EVA looks",
        "Use --init pissa or default.", families=frozenset({"deberta-v2", "opt"}),
    ),
    Rule(
        _rows("experts"), "it has no experts in one tensor",
        "Drop method.target_parameters; --target-modules all-linear reaches every linear.",
        experts=False,
    ),
    Rule(
        _rows("oft", "boft"), "its linears are Conv1D, which PEFT has no rotation for",
        "Use --method lora, or --quant 4bit, which makes them linears.",
        families=_CONV1D, quants=frozenset({"none"}),
    ),
    Rule(
        _rows("loha", "lokr"), "its linears are Conv1D, which PEFT does not take here",
        "Use --method lora.", families=_CONV1D, quants=frozenset({"none"}),
    ),
    Rule(
        _rows("loha", "lokr"), "PEFT multiplies the update with packed 4-bit weights",
        "Use --quant 8bit, or --method lora.", quants=frozenset({"4bit"}),
    ),
    Rule(
        _rows("prefix"), "it computes its attention itself, so there is no place for a prefix",
        "Use --method prompt, or --method lora.", families=frozenset({"bloom", "falcon", "mpnet"}),
    ),
    Rule(
        _rows("prefix"), "its attention is more than what a prefix goes through",
        "Use --method prompt, or --method lora.", families=frozenset({"gemma2"}),
    ),
)  # fmt: skip
"""Every refusal. The first that covers a cell is its reason."""


def find_refusal(cell: Cell) -> Rule | None:
    """Return why `cell` does not work, or None if it does, or does in part where it is open."""
    return next((rule for rule in RULES if rule.covers(cell)), None)


def find_limits(cell: Cell) -> list[Rule]:
    """Return the rules that refuse a part of an open `cell`."""
    return [rule for rule in RULES if rule.touches(cell)]


def explain(rule: Rule, row: MethodFacts, cell: Cell) -> str:
    """Say what cannot be used with what, why, and what to do."""
    asked = row.flags if not row.fields else row.flags.partition(f"--method {row.kind} ")[2]
    sides = []
    if rule.kinds:
        sides.append(f"{cell.family}, an {cell.kind}")
    elif rule.families or rule.experts is not None:
        sides.append(str(cell.family))
    if rule.tasks:
        sides.append(f"--task {cell.task}")
    if rule.quants and cell.quant != "none":
        sides.append(f"--quant {cell.quant}")
    with_what = f" with {' and '.join(sides)}" if sides else ""
    return f"{asked} cannot be used{with_what}: {rule.why}. {rule.instead}"


def find_problems(spec: Section, base: Cell) -> list[str]:
    """Return why a run with the method `spec` cannot be, one message a row of it that cannot.

    Args:
        spec: the method's spec.
        base: the model, the task and the quantization; its row is not looked at.
    """
    problems = []
    for row in rows_of(spec):
        cell = replace(base, row=row.name)
        rule = find_refusal(cell)
        if rule is not None:
            problems.append(explain(rule, row, cell))
    return problems


def check_supported(spec: Section, base: Cell) -> None:
    """Refuse a method that cannot work on a base, for a task.

    Raises:
        ConfigError: with each reason and the nearest thing that works.
    """
    problems = find_problems(spec, base)
    if problems:
        raise ConfigError(problems)


def known_rows(kinds: Iterable[str]) -> list[MethodFacts]:
    """Return the rows of the methods named `kinds`, in the order in which they are shown."""
    wanted = set(kinds)
    return [row for row in FACTS.values() if row.kind in wanted]
