"""Old names of keys, which files and scripts of users may have, and what they are called now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "speed.target_head": "speed.chunked_cross_entropy",
    "speed.skip_unread": "speed.prune_last_layer",
    "speed.low_rank": "speed.fused_lora",
    "speed.elementwise": "speed.fused_norm_glu",
    "speed.tokens_per_pass": "speed.tokens_per_micro_batch",
    "speed.passes_at_once": "speed.parallel_workers",
}
"""Old dotted key → the new one, in the same section."""


def with_new_names(
    values: Mapping[str, Any], origins: Mapping[tuple[str, ...], str]
) -> tuple[dict[str, Any], list[str]]:
    """Return `values` (section → its keys) under new names, and a line for each that was old.

    Args:
        values: raw values of one place.
        origins: key path → its origin as the user would name it, where one is known.

    Raises:
        ValueError: a key is given by both of its names.
    """
    renamed, lines = dict(values), []
    for old, new in RENAMED.items():
        section, key = old.split(".")
        own, new_key = renamed.get(section), new.split(".")[1]
        if not isinstance(own, Mapping) or key not in own:
            continue
        origin = origins.get((section, key))
        prefix = f"{origin}: " if origin else ""
        if new_key in own:
            raise ValueError(
                f"{prefix}{old!r} is the old name of {new!r}, and both are given. Give {new} alone."
            )
        renamed[section] = {new_key if name == key else name: own[name] for name in own}
        lines.append(f"{prefix}{old} is now called {new}; the old name is still accepted.")
    return renamed, lines
