"""Regular expressions in another's adapter_config.json, which PEFT tries on every module's name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlevel.errors import InputError
from ftlevel.models.strangers.time_limit import ending_in

_SECONDS = 10.0
_WHOLE = ("target_modules", "exclude_modules")  # a text is one expression, a list are names
_ENDS = ("rank_pattern", "alpha_pattern")


def check_patterns(directory: Path, settings: Mapping[str, Any], base: Any) -> None:
    """Refuse an adapter whose expressions are none, or go back and forth without end.

    Args:
        directory: of an adapter of PEFT's form.
        settings: what its adapter_config.json holds.
        base: the model whose modules' names they are tried on.

    Raises:
        InputError: naming the expression.
    """
    path = directory / "adapter_config.json"
    names = [name for name, _ in base.named_modules()]
    for field, written, pattern in _patterns(settings):
        try:
            with ending_in(_SECONDS):
                compiled = re.compile(pattern)
                for name in names:
                    compiled.fullmatch(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{path}: {field} has {written!r}, which is no regular expression ({error})."
            ) from None
        except TimeoutError as error:
            raise InputError(
                f"{path}: {field} has {written!r}, which goes back and forth without end ({error})."
            ) from None


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield field, expression as it is written, and as PEFT 0.21 tries it."""
    for field in _WHOLE:
        if isinstance(text := settings.get(field), str):
            yield field, text, text
    for field in _ENDS:
        if isinstance(found := settings.get(field), Mapping):
            yield from ((field, key, rf"(.*\.)?({key})") for key in found)
