"""Checks of facts about other libraries."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if (torch_file := torch.__file__) is None:
    raise RuntimeError("torch is installed, but not in a directory")
SITE = Path(torch_file).parents[1]


class UpstreamFact(NamedTuple):
    """A name in another library that is not part of its documented API.

    Attributes:
        name: name in the library, with its class for methods.
        file: path below site-packages.
        why: what it is used for.
    """

    name: str
    file: str
    why: str


_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
VERSIONS: dict[str, str] = _TABLES["versions"]
"""Library -> version on which the facts are based."""
OF_MODELS: dict[str, dict[str, str]] = _TABLES["models"]
"""File below site-packages -> internal name, with its class -> purpose."""
OF_METHODS: dict[str, dict[str, str]] = _TABLES["methods"]
"""Likewise, for `methods/upstream.py`."""


def create_facts(table: Mapping[str, Mapping[str, str]]) -> tuple[UpstreamFact, ...]:
    """Return the facts of a table: file → names, separated by commas → why."""
    return tuple(
        UpstreamFact(name, file, why)
        for file, entries in table.items()
        for names, why in entries.items()
        for name in names.split(", ")
    )


def lower_bound(library: str) -> Version:
    """Return the oldest version that pyproject.toml allows."""
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    requirements = re.findall(rf'^  "({library}>=[^"]+)"', pyproject.read_text(), re.MULTILINE)
    (bound,) = {next(iter(Requirement(line).specifier)).version for line in requirements}
    return Version(bound)


def check_fact(fact: UpstreamFact) -> None:
    """Check the versions, and that the name is in its file.

    The checked version is not older than the allowed ones, and the installed version is not older
    than the checked one, up to the minor release (torch's CPU builds are 2.13.0+cpu).
    """
    library = fact.file.partition("/")[0]
    installed, checked = Version(version(library)), Version(VERSIONS[library])
    bound = lower_bound(library)
    assert bound <= checked, (
        f"{fact.name}: read in {checked}, and we ask for {bound}: read it again"
    )
    assert installed.release[:2] >= checked.release[:2], f"{fact.name}: {installed} is installed"
    name = fact.name.rpartition(".")[2]
    text = (SITE / fact.file).read_text(encoding="utf-8")
    assert re.search(rf"\b{name}\b", text), f"{fact.name} is not in {fact.file} any more"


def get_parameters(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of `function`."""
    return list(inspect.signature(function).parameters)


class CanaryRegistry(dict[str, Callable[..., None]]):
    """Name of a fact → test that fails when it changes."""

    def of(self, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Register the decorated function for these facts."""

        def register(canary: Callable[..., None]) -> Callable[..., None]:
            for name in names:
                assert name not in self, name
                self[name] = canary
            return canary

        return register
