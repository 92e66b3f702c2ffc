"""What every fact about another library is held to, whatever its canary looks at."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from ftlevel.models.upstream import Fact

if (found := torch.__file__) is None:
    raise RuntimeError("torch is installed, but not in a directory")
SITE = Path(found).parents[1]


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
    installed, read = Version(version(fact.library)), Version(fact.version)
    bound = lower_bound(fact.library)
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
