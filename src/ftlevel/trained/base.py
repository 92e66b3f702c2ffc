"""The base model of an adapter: where it is now, and that its weights are those trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.fingerprint import base_digest, base_fingerprint
from ftlevel.artifacts.places import resolve_relative
from ftlevel.errors import InputError, listing
from ftlevel.models.sources import ModelSource, resolve_source

_LOCAL = ("directory", "gguf")
_WAY_OUT = "If it is elsewhere now, name its place: --model PATH."


def find_base(card: AdapterCard, directory: Path, place: str | None = None) -> ModelSource:
    """Find the base of the adapter in `directory`, and check that it is the one trained on.

    A local one is looked for from the adapter's directory, so that it may be moved with it, and
    then where it was.

    Args:
        card: of the adapter.
        directory: where the adapter is.
        place: where the user says that the base is now.

    Raises:
        InputError: it is nowhere, or its weights are others.
    """
    name, revision = card.base["name"], card.base.get("revision")
    if place is not None:
        source = resolve_source(place, said=f"--model {place}")
    elif card.base.get("kind") in _LOCAL:
        source = _find_local(card, directory)
    else:
        words = base_words(str(directory), name)
        try:
            source = resolve_source(name, revision, said=words)
        except InputError as error:
            raise InputError(f"{error} {_WAY_OUT}") from None
    check_base(source, card, directory)
    return source


def _find_local(card: AdapterCard, directory: Path) -> ModelSource:
    name, relative = card.base["name"], card.base.get("path")
    tried = [resolve_relative(relative, directory)] if relative else []
    tried = list(dict.fromkeys([*tried, Path(name)]))
    there = [path for path in tried if path.exists()]
    if not there:
        raise InputError(
            f"the base model of {directory} is not there (looked for at "
            f"{listing(map(str, tried))}). Name its place: --model PATH."
        )
    expected = card.base.get("fingerprint")
    same = [path for path in there if len(there) == 1 or base_fingerprint(path) == expected]
    path = str((same or there)[0])
    return resolve_source(path, said=base_words(str(directory), path))


def check_base(source: ModelSource, card: AdapterCard, directory: Path) -> None:
    """Refuse a base that is not the one on which the adapter in `directory` was trained.

    Raises:
        InputError: the weights differ.
    """
    expected = card.base.get("fingerprint")
    if source.path is None or expected is None:
        return
    found = base_fingerprint(source.path)
    if found == expected and (whole := card.base.get("digest")) and source.path.is_dir():
        expected, found = whole, base_digest(source.path)
    if found != expected:
        raise InputError(
            f"{directory} was trained on {card.base['name']} with weights {expected[:12]}…, and "
            f"{source.words} has other weights ({found[:12]}…). On them the adapter would be wrong "
            "without a word. Name the base that it was trained on: --model PATH, or train again."
        )


def check_cached_base(source: ModelSource, card: AdapterCard, directory: Path) -> None:
    """Refuse another base of the Hub than the one trained on, where it is cached; fetch it else."""
    if source.kind == "hub" and card.base.get("fingerprint") is not None:
        from ftlevel.weights.checkpoint import local_directory

        local = local_directory(source)
        check_base(replace(source, kind="directory", location=str(local)), card, directory)


def base_words(adapter: str, base: str) -> str:
    """Return what errors call the base of an adapter, which the user did not name."""
    return f"{base} (the base of {adapter})"
