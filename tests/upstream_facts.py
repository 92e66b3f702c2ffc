"""Checks that every fact about another library must pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ftlevel.models.upstream import VERSIONS

if (found := torch.__file__) is None:
    raise RuntimeError("torch is installed, but not in a directory")
SITE = Path(found).parents[1]


class Fact(NamedTuple):
    """A name that its library may change silently.

    Attributes:
        name: what is used; with a class where it belongs to one.
        file: where it was read, below site-packages.
        why: what it is used for, there being no documented way.
    """

    name: str
    file: str
    why: str


def facts(table: Mapping[str, Mapping[str, str]]) -> tuple[Fact, ...]:
    """Return the facts of a table: file → names, with commas between them → why."""
    return tuple(
        Fact(name, file, why)
        for file, entries in table.items()
        for names, why in entries.items()
        for name in names.split(", ")
    )


def lower_bound(library: str) -> Version:
    """Return the oldest version that pyproject.toml allows."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    stated = re.findall(rf'^  "({library}>=[^"]+)"', pyproject.read_text(), re.MULTILINE)
    (bound,) = {next(iter(Requirement(line).specifier)).version for line in stated}
    return Version(bound)


def check_fact(fact: Fact) -> None:
    """Check the versions, and that the name stands where it was read.

    It was read no earlier than what we allow, and is used with nothing older than what was read,
    up to the minor release (torch's CPU builds call themselves 2.13.0+cpu).
    """
    library = fact.file.partition("/")[0]
    installed, read = Version(version(library)), Version(VERSIONS[library])
    bound = lower_bound(library)
    assert bound <= read, f"{fact.name}: read in {read}, and we ask for {bound}: read it again"
    assert installed.release[:2] >= read.release[:2], f"{fact.name}: {installed} is installed"
    name = fact.name.rpartition(".")[2]
    text = (SITE / fact.file).read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", text), f"{fact.name} is not in {fact.file} any more"


def arguments(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of `function`."""
    return list(inspect.signature(function).parameters)


class Canaries(dict[str, Callable[..., None]]):
    """Name of a fact → what fails when it changes."""

    def of(self, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the decorated function for these facts."""

        def register(canary: Callable[..., None]) -> Callable[..., None]:
            for name in names:
                assert name not in self, name
                self[name] = canary
            return canary

        return register
