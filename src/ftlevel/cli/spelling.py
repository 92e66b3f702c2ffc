"""Replace aliases of flags and values with ftlevel's own, and complete shell command lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlevel.config.flag import FieldMetadata, Flag, NoOpValue, UnsupportedFlag, ValueAliases
from ftlevel.config.flags import flags_of
from ftlevel.errors import ConfigError

ON, OFF = ("true", "1", "yes", "on", "y", "t"), ("false", "0", "no", "off", "n", "f", "none")
"""Lowercase values that turn a switch on or off."""

_THOUSANDS = re.compile(r"(\d+(?:\.\d+)?)([km])", re.IGNORECASE)
_FACTORS = {"k": (1024, 1000), "m": (1024**2, 1000**2)}


def number_hint(text: str) -> str:
    """Returns a hint such as "Did you mean 2048 or 2000?" for `2k`; "" for other text."""
    match = _THOUSANDS.fullmatch(text.strip())
    if match is None:
        return ""
    two, ten = (round(float(match[1]) * factor) for factor in _FACTORS[match[2].lower()])
    return f"numbers are written out. Did you mean {two} or {ten}?"


Setting = tuple[str, str]
"""Flag and value; "true" and "false" for a switch."""

_UNAVAILABLE = NoOpValue("it is not available")
_NEXT_FLAG = re.compile(r"\s+(?=--[a-z])")


@dataclass(frozen=True)
class FlagSpec:
    """How to parse one name of a flag and the value after it.

    Attributes:
        flag: canonical flag; empty if unsupported and only `values` are accepted.
        off: canonical flag that turns the switch off.
        is_switch: whether the canonical flag takes no value.
        value: value that this name alone sets, as `--load-in-4bit` does; None if it takes a value.
        values: alias of a value, in lower case → replacement.
        convert: converts other values; for a switch, raises ValueError.
        multiple: whether the canonical flag is repeated for several values.
    """

    flag: str
    path: str = ""
    off: str = ""
    is_switch: bool = False
    value: str | None = None
    is_value_optional: bool = False
    values: ValueAliases = field(default_factory=dict)
    convert: Callable[[str], str] | None = None
    multiple: bool = False
    is_list: bool = False
    is_number: bool = False
    message: str = ""


@dataclass(frozen=True)
class NoOpUse:
    """Use of a flag value that changes nothing; the configuration must not contradict it."""

    typed: str
    no_op: NoOpValue


@dataclass
class RewrittenArgs:
    """Command line with canonical flags; `typed` maps each to the name that the user typed."""

    args: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    no_ops: list[NoOpUse] = field(default_factory=list)


def build_flag_specs(command: str, flags: Sequence[Flag]) -> dict[str, FlagSpec]:
    """Returns name → `FlagSpec` for all flags of `command` and all aliases."""
    specs: dict[str, FlagSpec] = {}
    for row in flags_of(command, flags):
        if row.is_argument:
            continue
        option = _canonical_spec(row, command)
        for name in row.typer_names(option.is_switch):
            specs |= dict.fromkeys([part for part in name.split("/") if part != option.off], option)
        if option.off:
            specs[option.off] = replace(option, value="false", values={}, convert=None)
    for row in flags:
        if isinstance(row, UnsupportedFlag):
            if command in row.on:
                values = row.aliases.values
                is_switch = bool(values) and set(values) <= {"true", "false"}
                specs[row.name] = FlagSpec(
                    "", is_value_optional=is_switch, values=values, message=row.message
                )
        elif (canonical := specs.get(row.name)) is not None:
            specs = {**_alias_specs(row, canonical), **specs}
    return specs


def _canonical_spec(row: Flag, command: str) -> FlagSpec:
    metadata = row.metadata(command)
    is_switch = metadata.type is bool
    on, _, off = row.typer_names(is_switch)[0].partition("/")
    return FlagSpec(
        flag=on,
        path=row.path,
        off=off,
        is_switch=is_switch,
        is_value_optional=is_switch,
        values=row.aliases.values,
        convert=row.aliases.convert,
        multiple=row.multiple,
        is_list=metadata.type == list[str],
        is_number=metadata.type in (int, float) or metadata.is_number,
    )


def _alias_specs(row: Flag, canonical: FlagSpec) -> dict[str, FlagSpec]:
    """Returns alias → `FlagSpec` for the aliases of flag `row`, whose own spec is `canonical`."""
    specs = {}
    for alias in row.alias_names:
        has_value = alias.value is not None
        specs[alias.name] = replace(
            canonical,
            value=alias.value,
            is_value_optional=has_value or canonical.is_switch,
            values=alias.values if has_value else {**canonical.values, **alias.values},
            convert=alias.convert or (None if has_value else canonical.convert),
            multiple=(canonical.multiple or alias.multiple) and not has_value,
            is_number=canonical.is_number and alias.convert is None and not has_value,
        )
    return specs


def resolve_flag_aliases(args: Sequence[str], specs: Mapping[str, FlagSpec]) -> RewrittenArgs:
    """Replace aliases in `args`: `--load_in_4bit true` becomes `--quant 4bit`.

    Raises ConfigError if values are invalid, or two aliases set a field to different values.
    """
    rewritten = RewrittenArgs()
    values_by_flag: dict[str, tuple[str, str]] = {}
    problems: list[str] = []
    queue = list(args)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            rewritten.args += [argument, *queue]
            break
        if not argument.startswith("--"):
            rewritten.args.append(argument)
            continue
        typed, equals, text = argument.partition("=")
        name, option = _find(typed, specs)
        if option is None:
            rewritten.args.append(name + equals + text)
            continue
        values = [text] if equals else _pop_values(queue, option)
        if values is None:
            rewritten.args.append(option.flag or name)
            continue
        shown = f"{name} {','.join(values)}".strip()
        try:
            result = _convert(name, shown, values, option)
            for flag, value in () if isinstance(result, NoOpValue) else result:
                _validate_unique(values_by_flag, flag, value, name, option)
                rewritten.typed.setdefault(flag, name)
                rewritten.args += _to_args(flag, value, specs, joined=bool(equals))
        except ConfigError as error:
            problems += error.problems
            continue
        if isinstance(result, NoOpValue):
            rewritten.no_ops.append(NoOpUse(shown, result))
    if problems:
        raise ConfigError(problems)
    return rewritten


def validate_no_ops(no_ops: Sequence[NoOpUse], config: Any) -> list[str]:
    """Returns why each value changes nothing; raises ConfigError if `config` contradicts one."""
    lines, problems = [], []
    for claim in no_ops:
        no_op, value = claim.no_op, config
        for part in filter(None, no_op.path.split(".")):
            value = getattr(value, part, None)
        if no_op.path and not no_op.accepts(value):
            problems.append(
                f"{claim.typed} contradicts {no_op.path}, which is {value}. {no_op.fix}."
            )
        lines.append(f"{claim.typed}: {no_op.reason or f'{no_op.path} is {value}'}")
    if problems:
        raise ConfigError(problems)
    return lines


def _find(typed: str, specs: Mapping[str, FlagSpec]) -> tuple[str, FlagSpec | None]:
    """Returns `typed` with dashes, and its `FlagSpec`, None if unknown; `--no-x` is `--x false`."""
    name = typed.replace("_", "-")
    option = specs.get(name)
    if option is None and name.startswith("--no-"):
        positive = specs.get(f"--{name[5:]}")
        if positive is not None and positive.is_value_optional and "false" in positive.values:
            return name, FlagSpec(
                positive.flag,
                values={"true": positive.values["false"]},
                is_value_optional=True,
                message=positive.message,
            )
    return name, option


def _pop_values(queue: list[str], option: FlagSpec) -> list[str] | None:
    if option.is_value_optional:
        next_word = queue[0] if queue and _is_word(queue[0]) else ""
        is_value = next_word.lower() in (*ON, *OFF, *option.values)
        if next_word and (is_value or (option.convert is not None and not _is_recipe(next_word))):
            return [queue.pop(0)]
        return []
    may_be_bare = bool(option.message) or "" in option.values
    if not queue:
        return [] if may_be_bare else None
    if may_be_bare and queue[0].startswith("--"):
        return []
    values = [queue.pop(0)]
    while option.multiple and queue and _is_word(queue[0]) and not _is_recipe(queue[0]):
        values.append(queue.pop(0))
    return values


def _is_word(text: str) -> bool:
    return bool(text) and not text.startswith("-")


def _is_recipe(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or (Path(text) / "config.yaml").is_file()


def _convert(
    name: str, shown: str, values: Sequence[str], option: FlagSpec
) -> list[Setting] | NoOpValue:
    """Returns (flag, value) pairs for `name` and `values`, or a `NoOpValue`; errors use `shown`."""
    text = ",".join(values)
    word = _parse_bool(text) if option.is_value_optional else text.lower()
    result = option.values.get(word)
    if result is None and option.is_value_optional:
        result = option.values.get(text.lower())
    if isinstance(result, NoOpValue):
        return result
    if result is not None:
        return list(_split_flags(option.flag, result))
    if option.message:
        if _parse_bool(text) == "false" and "true" not in option.values:
            return _UNAVAILABLE
        raise ConfigError(f"{shown}: {option.message}")
    if option.is_value_optional and (option.convert is None or word in ("true", "false")):
        return _convert_switch(option, _require_bool(name, text, word))
    if option.is_number and (hint := number_hint(text)):
        raise ConfigError(f"{shown}: {hint}")
    if option.convert is not None:
        try:
            return list(_split_flags(option.flag, option.convert(text)))
        except ValueError as error:
            raise ConfigError(f"{shown}: {error}.") from None
    parts = values if option.is_list else [text]
    if option.is_list and option.multiple:
        parts = [part for value in values for part in _split_datasets(value)]
    return [(option.flag, part) for part in parts]


def _convert_switch(option: FlagSpec, word: str) -> list[Setting] | NoOpValue:
    """Returns the (flag, value) pair of a switch for `word`, "true" or "false", in a list.

    An alias that sets a value, as `--load-in-4bit` does, sets nothing if `word` is "false"; the
    returned `NoOpValue` then forbids that value.
    """
    if option.value is None:
        return [(option.flag, word)]
    if word == "true":
        return [(option.flag, option.value)]
    denied: Any = {"true": True, "false": False}.get(option.value, option.value)
    return NoOpValue("", option.path, excluded=(denied,))


def _parse_bool(text: str) -> str:
    word = text.lower()
    return "true" if word in ON or not word else "false" if word in OFF else word


def _require_bool(name: str, text: str, word: str) -> str:
    if word not in ("true", "false"):
        raise ConfigError(f"{name} is a switch, and {text!r} is neither true nor false.")
    return word


def _split_datasets(value: str) -> list[str]:
    """Split `a,b` into two datasets, unless a file is named `a,b`."""
    if "," not in value or Path(value).expanduser().exists():
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()]


def _split_flags(flag: str, text: str) -> Iterator[Setting]:
    """Yields (flag, value) pairs of a replacement for `flag`, such as `4bit --quant-type nf4`."""
    for number, piece in enumerate(_NEXT_FLAG.split(f"{flag} {text}".strip())):
        name, _, value = piece.partition(" ")
        if value or (number == 0 and name != flag):
            yield name, value


def _validate_unique(
    values: dict[str, tuple[str, str]], flag: str, value: str, name: str, option: FlagSpec
) -> None:
    """Add (`name`, `value`) to `values`; raise ConfigError if another name set another value."""
    if option.is_list or flag == "--set":
        return
    before, first_value = values.setdefault(flag, (name, value))
    is_edit = {before, name} <= {flag, option.off} or before == name
    if not is_edit and first_value != value:
        target = option.path or flag
        raise ConfigError(f"{before} and {name} both set {target}. Use one of them.")
    values[flag] = (name, value)


def _to_args(flag: str, value: str, specs: Mapping[str, FlagSpec], *, joined: bool) -> list[str]:
    flag_spec = specs.get(flag)
    if flag_spec is not None and flag_spec.is_switch:
        name = flag if value == "true" else flag_spec.off
        return [name] if name else []
    return [f"{flag}={value}"] if joined else [flag, value]


_RECIPES = ("*.yaml", "*.yml", "recipes/*.yaml", "recipes/*.yml")
_RUNS = ("*/.ftlevel.json", "runs/*/.ftlevel.json")  # marker file of a run directory


def completer(row: Flag, metadata: FieldMetadata) -> Callable[[str], list[str]]:
    """Returns a function that completes values of the flag `row` in a shell."""

    def complete(incomplete: str) -> list[str]:
        return sorted(v for v in _completions(row, metadata) if v.startswith(incomplete))

    return complete


def _completions(row: Flag, metadata: FieldMetadata) -> list[str]:
    if metadata.choices:
        return list(metadata.choices)
    if row.name == "--task":
        from ftlevel.config.tasks import TASKS

        return list(TASKS)
    metavars = (row.metavar or row.names).strip("[].").split("|")
    if "RECIPE" in metavars or row.name == "--recipe":
        return [str(path) for pattern in _RECIPES for path in Path().glob(pattern)]
    if "RUN" in metavars:
        return [str(path.parent) for pattern in _RUNS for path in Path().glob(pattern)]
    if "FAMILY" in metavars:
        from ftlevel.models.families import FAMILIES

        return list(FAMILIES)
    return []
