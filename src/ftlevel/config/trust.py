"""Settings that only the command line or Python code may make: files may be a stranger's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ftlevel.config.train import SECTIONS

COMMAND_LINE_ONLY = {
    "model.trust_remote_code": ("--trust-remote-code", "runs Python code that ships with a model"),
    "output.overwrite": ("--overwrite", "deletes an existing run"),
    "output.push_to_hub": ("--push-to-hub {}", "uploads the trained model"),
    **{
        f"{name}.{field}": row
        for name, section in SECTIONS.items()
        for field, row in section.command_line_only.items()
    },
}
"""Dotted field → (flag, what it does); a file cannot set it."""


def check_values(values: Mapping[str, Any], locations: Mapping[str, str]) -> Iterator[str]:
    """Yields a message for each value of a file that only the command line may set.

    `locations` has the dotted fields that a file set → file:line; `values` is the configuration.
    """
    for field, (flag, effect) in COMMAND_LINE_ONLY.items():
        section, _, name = field.partition(".")
        value = (values.get(section) or {}).get(name)
        if field in locations and value not in (None, False):
            yield (
                f"{locations[field]}: {field} is {value!r}, which {effect}; a file cannot decide "
                f"this. If you want it, pass {flag.format(value)}; otherwise delete the line."
            )


def pop_command_line_only(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Remove the fields that a file cannot set from `values`; yields (dotted field, flag)."""
    for field, (flag, _) in COMMAND_LINE_ONLY.items():
        section, _, name = field.partition(".")
        value = values.get(section, {}).pop(name, None)
        if value not in (None, False):
            yield field, flag.format(value)
