"""The libraries' releases that ftlevel needs, for whoever runs it from a source tree.

pip asks for the same, and a test compares the two; but a tree on `PYTHONPATH` was never installed,
and an older transformers would stop in the middle of a run at a name that it does not know.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

LOWEST = {"torch": "2.8", "transformers": "5.24", "peft": "0.21", "accelerate": "1.15"}
"""Library → its lowest release, as in pyproject.toml."""


def find_old_libraries() -> list[str]:
    """Return a sentence for each library that is too old or not there."""
    problems = []
    for name, lowest in LOWEST.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = ""
        if not found or Version(found) < Version(lowest):
            has = f"{name} {found} is installed" if found else f"{name} is not installed"
            problems.append(
                f"{has}, and ftlevel needs {name} {lowest} or later. "
                f'pip install --upgrade "{name}>={lowest}".'
            )
    return problems
