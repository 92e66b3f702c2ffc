"""Table of known model families.

Needs neither torch nor transformers. A test compares each entry with transformers' modules.
"""

from __future__ import annotations

from ftlevel.errors import InputError, closest_matches
from ftlevel.models.families.decoder import DECODER_FAMILIES
from ftlevel.models.families.encoder import ENCODER_FAMILIES
from ftlevel.models.families.facts import Family
from ftlevel.models.families.seq2seq import SEQ2SEQ_FAMILIES

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*DECODER_FAMILIES, *ENCODER_FAMILIES, *SEQ2SEQ_FAMILIES)
}


def _fold(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_INDEX: dict[str, Family] = {
    _fold(spelling): family
    for family in FAMILIES.values()
    for spelling in (*family.aliases, family.name)
}


def lookup_family(name: str) -> Family | None:
    """Return the family of a `model_type` or alias, ignoring case and dashes, or None."""
    return _INDEX.get(_fold(name))


def find_family(name: str) -> Family:
    """Return the family `name`; raises `InputError`, which lists similar names, if unknown."""
    family = lookup_family(name)
    if family is not None:
        return family
    close = closest_matches(_fold(name), _INDEX, count=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise InputError(
        f"{name!r} is neither a supported family nor a model.{hint} "
        f"Families: {', '.join(FAMILIES)}. "
        "For a model, use its directory or full id: ftlevel list-targets OWNER/NAME"
    )
