"""Flags, values and configuration files of other training tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ftlevel.extensions import Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag, FlagAliases


def _flags() -> Sequence[Flag]:
    from ftlevel.extras.other_tools.aliases import UNSUPPORTED_FLAGS

    return UNSUPPORTED_FLAGS


def _aliases() -> Mapping[str, FlagAliases]:
    from ftlevel.extras.other_tools.aliases import ALIASES

    return ALIASES


EXTENSION = Extension(
    flags=_flags,
    aliases=_aliases,
    hooks={
        "detect_tool": "ftlevel.extras.other_tools.aliases:detect_tool",
        "convert_recipe": "ftlevel.extras.other_tools.convert:convert",
    },
)
