"""Replace aliases of flags and values with ftlevel's own, and complete shell command lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlevel.config.flag import Flag, NoOpValue, ValueAliases
from ftlevel.config.flags import flags_of
from ftlevel.errors import ConfigError

if TYPE_CHECKING:
    from ftlevel.config.flag import FieldMetadata, Flag


ON, OFF = ("true", "1", "yes", "on", "y", "t"), ("false", "0", "no", "off", "n", "f", "none")
"""What a switch may be given, in small letters."""

_THOUSANDS = re.compile(r"(\d+(?:\.\d+)?)([km])", re.IGNORECASE)
_FACTORS = {"k": (1024, 1000), "m": (1024**2, 1000**2)}


def number_hint(text: str) -> str:
    """Return "Did you mean 2048 or 2000?" for `2k`, or "" for any other text."""
    found = _THOUSANDS.fullmatch(text.strip())
    if found is None:
        return ""
    two, ten = (round(float(found[1]) * factor) for factor in _FACTORS[found[2].lower()])
    return f"numbers are written out. Did you mean {two} or {ten}?"


Setting = tuple[str, str]
"""Flag and value; "true" and "false" for a switch."""

_NOT_ASKED = NoOpValue("it is not available")
_NEXT_FLAG = re.compile(r"\s+(?=--[a-z])")


@dataclass(frozen=True)
class FlagSpec:
    """Interpretation of a flag name and its value.

    Attributes:
        flag: canonical flag; empty if unsupported and only `words` are accepted.
        path: field that it sets.
        off: flag that disables a switch.
        is_switch: whether the canonical flag takes no value.
        value: value that this name stands for.
        takes_none: whether the value may be omitted.
        words: aliases of values, in lower case.
        read: conversion of other values; for a switch, raises why there is none.
        several: whether several values may follow.
        is_list: whether the canonical flag is repeated for several values.
        noun: name of the setting, for errors about two aliases.
        answer: error for an unsupported flag.
    """

    flag: str
    path: str = ""
    off: str = ""
    is_switch: bool = False
    value: str | None = None
    takes_none: bool = False
    words: ValueAliases = field(default_factory=dict)
    read: Any = None
    several: bool = False
    is_list: bool = False
    is_number: bool = False
    noun: str = ""
    answer: str = ""


@dataclass(frozen=True)
class NoOpClaim:
    """Accepted value without effect, to be checked against the configuration."""

    typed: str
    agrees: NoOpValue


@dataclass
class RewrittenArguments:
    """Command line with canonical flags.

    `typed` maps a canonical flag to the name that the user typed.
    """

    arguments: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    claims: list[NoOpClaim] = field(default_factory=list)


def build_flag_specs(command: str, flags: Sequence[Flag]) -> dict[str, FlagSpec]:
    """Return every flag name that `command` accepts, with its interpretation."""
    found: dict[str, FlagSpec] = {}
    for row in flags_of(command, flags):
        if row.is_argument:
            continue
        own = _own_reading(row, command)
        for name in row.typer_names(own.is_switch):
            found |= dict.fromkeys([part for part in name.split("/") if part != own.off], own)
        if own.off:
            found[own.off] = replace(own, value="false", words={}, read=None)
    for row in flags:
        own_or_none = found.get(row.shown)
        if row.answer:
            if command in row.on:
                on_off = not set(row.words) - {"true", "false"} and bool(row.words)
                found[row.shown] = FlagSpec(
                    "", takes_none=on_off, words=row.words, answer=row.answer
                )
        elif own_or_none is not None:
            found = {**_second_readings(row, own_or_none), **found}
    return found


def _own_reading(row: Flag, command: str) -> FlagSpec:
    facts = row.facts(command)
    kind = row.type if facts is None or facts.type is str else facts.type
    is_switch = kind is bool
    on, _, off = row.typer_names(is_switch)[0].partition("/")
    return FlagSpec(
        flag=on,
        path=row.path,
        off=off,
        is_switch=is_switch,
        takes_none=is_switch,
        words=row.words,
        read=row.read,
        several=row.several,
        is_list=list[str] in (row.type, kind),
        is_number=kind in (int, float) or (facts is not None and facts.takes_number),
        noun=row.noun,
    )


def _second_readings(row: Flag, own: FlagSpec) -> dict[str, FlagSpec]:
    """Return the aliases of `row`, whose canonical interpretation is `own`."""
    found = {}
    for other in row.spellings:
        is_value = other.value is not None
        found[other.name] = FlagSpec(
            flag=own.flag,
            path=own.path,
            off=own.off,
            is_switch=own.is_switch,
            value=other.value,
            takes_none=is_value or own.is_switch,
            words={**own.words, **other.values} if not is_value else other.values,
            read=other.read or (None if is_value else own.read),
            several=(own.several or other.several) and not is_value,
            is_list=own.is_list,
            is_number=own.is_number and other.read is None and not is_value,
            noun=own.noun or own.path,
        )
    return found


def resolve_flag_aliases(
    arguments: Sequence[str], readings: Mapping[str, FlagSpec]
) -> RewrittenArguments:
    """Replace aliases in `arguments`: `--load_in_4bit true` becomes `--quant 4bit`.

    Raises:
        ConfigError: with all invalid values, and all fields set to different values by two aliases.
    """
    done = RewrittenArguments()
    given: dict[str, tuple[str, str]] = {}
    problems: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument == "--":
            done.arguments += [argument, *queue]
            break
        if not argument.startswith("--"):
            done.arguments.append(argument)
            continue
        typed, equals, text = argument.partition("=")
        name, reading = _find(typed, readings)
        if reading is None:
            done.arguments.append(name + equals + text)
            continue
        values = [text] if equals else _take(queue, reading)
        if values is None:
            done.arguments.append(reading.flag or name)
            continue
        shown = f"{name} {','.join(values)}".strip()
        try:
            meant = _meaning(name, shown, values, reading)
            for flag, value in () if isinstance(meant, NoOpValue) else meant:
                _check_given_once(given, flag, value, name, reading)
                done.typed.setdefault(flag, name)
                done.arguments += _spell(flag, value, readings, joined=bool(equals))
        except ConfigError as error:
            problems += error.problems
            continue
        if isinstance(meant, NoOpValue):
            done.claims.append(NoOpClaim(shown, meant))
    if problems:
        raise ConfigError(problems)
    return done


def check_claims(claims: Sequence[NoOpClaim], config: Any) -> list[str]:
    """Return the reason for each claim; raise ConfigError if `config` contradicts one."""
    lines, problems = [], []
    for claim in claims:
        agrees, value = claim.agrees, config
        for part in filter(None, agrees.path.split(".")):
            value = getattr(value, part, None)
        if agrees.path and not agrees.holds(value):
            problems.append(
                f"{claim.typed} contradicts {agrees.path}, which is {value}. {agrees.otherwise}."
            )
        lines.append(f"{claim.typed}: {agrees.reason or f'{agrees.path} is {value}'}")
    if problems:
        raise ConfigError(problems)
    return lines


def _find(typed: str, readings: Mapping[str, FlagSpec]) -> tuple[str, FlagSpec | None]:
    """Return the name with dashes and its interpretation; `--no_x` is `--x false`."""
    name = typed.replace("_", "-")
    reading = readings.get(name)
    if reading is None and name.startswith("--no-"):
        positive = readings.get(f"--{name[5:]}")
        if positive is not None and positive.takes_none and "false" in positive.words:
            return name, FlagSpec(
                positive.flag,
                words={"true": positive.words["false"]},
                takes_none=True,
                answer=positive.answer,
            )
    return name, reading


def _take(queue: list[str], reading: FlagSpec) -> list[str] | None:
    """Remove and return the values of a flag from `queue` (mutated); None if one is missing."""
    if reading.takes_none:
        follows = queue[0] if queue and _is_word(queue[0]) else ""
        is_own = follows.lower() in (*ON, *OFF, *reading.words)
        if follows and (is_own or (reading.read is not None and not _is_recipe(follows))):
            return [queue.pop(0)]
        return []
    may_be_bare = bool(reading.answer) or "" in reading.words
    if not queue:
        return [] if may_be_bare else None
    if may_be_bare and queue[0].startswith("--"):
        return []
    values = [queue.pop(0)]
    while reading.several and queue and _is_word(queue[0]) and not _is_recipe(queue[0]):
        values.append(queue.pop(0))
    return values


def _is_word(text: str) -> bool:
    return bool(text) and not text.startswith("-")


def _is_recipe(text: str) -> bool:
    return text.endswith((".yaml", ".yml")) or (Path(text) / "config.yaml").is_file()


def _meaning(
    name: str, shown: str, values: Sequence[str], reading: FlagSpec
) -> list[Setting] | NoOpValue:
    """Return the settings that `values` stand for, or the condition that they require."""
    text = ",".join(values)
    word = _truth(text) if reading.takes_none else text.lower()
    found = reading.words.get(word)
    if found is None and reading.takes_none:
        found = reading.words.get(text.lower())
    if isinstance(found, NoOpValue):
        return found
    if found is not None:
        return list(_pieces(reading.flag, found))
    if reading.answer:
        if _truth(text) == "false" and "true" not in reading.words:
            return _NOT_ASKED
        raise ConfigError(f"{shown}: {reading.answer}")
    if reading.takes_none and (reading.read is None or word in ("true", "false")):
        return _switched(reading, _checked_truth(name, text, word))
    if reading.is_number and (hint := number_hint(text)):
        raise ConfigError(f"{shown}: {hint}")
    if reading.read is not None:
        try:
            return list(_pieces(reading.flag, reading.read(text)))
        except ValueError as error:
            raise ConfigError(f"{shown}: {error}.") from None
    parts = values if reading.is_list else [text]
    if reading.is_list and reading.several:
        parts = [part for value in values for part in _parts(value)]
    return [(reading.flag, part) for part in parts]


def _switched(reading: FlagSpec, word: str) -> list[Setting] | NoOpValue:
    """Return the setting of a switch, or a condition if it disables a specific value."""
    if reading.value is None:
        return [(reading.flag, word)]
    if word == "true":
        return [(reading.flag, reading.value)]
    denied: Any = {"true": True, "false": False}.get(reading.value, reading.value)
    return NoOpValue("", reading.path, unless=(denied,))


def _truth(text: str) -> str:
    word = text.lower()
    return "true" if word in ON or not word else "false" if word in OFF else word


def _checked_truth(name: str, text: str, word: str) -> str:
    if word not in ("true", "false"):
        raise ConfigError(f"{name} is a switch, and {text!r} is neither true nor false.")
    return word


def _parts(value: str) -> list[str]:
    """Split `a,b` into datasets, unless a file has that name."""
    if "," not in value or Path(value).expanduser().exists():
        return [value]
    return [part.strip() for part in value.split(",") if part.strip()]


def _pieces(flag: str, text: str) -> Iterator[Setting]:
    """Yield the settings of a fragment: "4bit --quant-type nf4" after `--quant`."""
    for number, piece in enumerate(_NEXT_FLAG.split(f"{flag} {text}".strip())):
        name, _, value = piece.partition(" ")
        if value or (number == 0 and name != flag):
            yield name, value


def _check_given_once(
    given: dict[str, tuple[str, str]], flag: str, value: str, name: str, reading: FlagSpec
) -> None:
    """Raise ConfigError if two aliases set one field differently; repeats override."""
    if reading.is_list or flag == "--set":
        return
    before, earlier = given.setdefault(flag, (name, value))
    is_edit = {before, name} <= {flag, reading.off} or before == name
    if not is_edit and earlier != value:
        what = reading.noun or reading.path or flag
        raise ConfigError(f"{before} and {name} both set {what}. Use one of them.")
    given[flag] = (name, value)


def _spell(flag: str, value: str, readings: Mapping[str, FlagSpec], *, joined: bool) -> list[str]:
    """Return a setting as arguments for Typer."""
    own = readings.get(flag)
    if own is not None and own.is_switch:
        wanted = flag if value == "true" else own.off
        return [wanted] if wanted else []
    return [f"{flag}={value}"] if joined else [flag, value]


_RECIPES = ("*.yaml", "*.yml", "recipes/*.yaml", "recipes/*.yml")
_RUNS = ("*/.ftlevel.json", "runs/*/.ftlevel.json")  # marker file of a run directory


def completer(row: Flag, facts: FieldMetadata | None) -> Callable[[str], list[str]]:
    """Return a function that completes the values of `row`; nothing for free-form values."""

    def complete(incomplete: str) -> list[str]:
        return sorted(value for value in _values(row, facts) if value.startswith(incomplete))

    return complete


def _values(row: Flag, facts: FieldMetadata | None) -> list[str]:
    if facts is not None and facts.choices:
        return list(facts.choices)
    if row.dest == "recipe_file" or row.shown == "--recipe":
        return [str(path) for pattern in _RECIPES for path in Path().glob(pattern)]
    if row.shown == "--task":
        from ftlevel.config.tasks import TASKS

        return list(TASKS)
    if "RUN" in (row.metavar or row.names).split(".")[0].split("|"):
        return [str(path.parent) for pattern in _RUNS for path in Path().glob(pattern)]
    if "FAMILY" in row.shown or "FAMILY" in (row.metavar or ""):
        from ftlevel.models.families import FAMILIES

        return list(FAMILIES)
    return []
