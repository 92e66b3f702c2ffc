"""served.json: what a server must answer to be right, and what it answers if it is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import write_json
from ftlevel.errors import InputError
from ftlevel.merging.serving.answers import Answer, Spoken
from ftlevel.merging.serving.entry import Prompt

FILE = "served.json"
_FORMAT = 1


@dataclass(frozen=True)
class Recorded:
    """What was asked of one adapter.

    Attributes:
        name: what the server calls it.
        place: its file or directory, from that of served.json.
        rank: of its normal form; None for a whole model.
        prompts: texts, token ids, messages; the answers `trained`, and `base` where there is one.
    """

    name: str
    place: str
    rank: int | None
    prompts: list[dict[str, Any]] = field(default_factory=list)


def record(
    name: str,
    place: str,
    rank: int | None,
    prompts: Sequence[Prompt],
    spoken: Mapping[str, Spoken | None],
) -> Recorded:
    """Return what `spoken` (`trained`, and `base` if there is one) answered to `prompts`."""
    asked = []
    for index, prompt in enumerate(prompts):
        answers = {
            who: said.answers[index].to_dict()
            for who, said in spoken.items()
            if said is not None and said.answers
        }
        if answers:
            row = {"text": prompt.text, "ids": prompt.ids, "messages": prompt.messages,
                   "rendered": prompt.rendered}  # fmt: skip
            asked.append(row | answers)
    return Recorded(name, place, rank, asked)


def write_served(path: Path, facts: Mapping[str, Any], adapters: Sequence[Recorded]) -> None:
    """Write served.json; `facts` name the server, the format, the base and the commands."""
    rows = [{"name": a.name, "place": a.place, "rank": a.rank, "prompts": a.prompts}
            for a in adapters]  # fmt: skip
    write_json(path, {"format": _FORMAT, **facts, "adapters": rows, "versions": library_versions()})


@dataclass(frozen=True)
class Served:
    """A served.json that was read.

    Attributes:
        path: of the file.
        facts: what it says beside the adapters.
        adapters: what was recorded of each.
    """

    path: Path
    facts: Mapping[str, Any]
    adapters: list[Recorded]


def read_served(out: Path) -> Served:
    """Read the served.json of what `export` wrote to `out`.

    Raises:
        InputError: there is none, or it is damaged, or it holds no answers.
    """
    path = out / FILE if out.is_dir() else out.with_suffix(".served.json")
    if not path.is_file():
        raise InputError(
            f"{out} has no {path.name}. Expected what ftlevel export --for SERVER --out wrote, "
            "without --no-verify."
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("format") != _FORMAT:
            raise InputError(f"{path} was written by a later ftlevel. Install that version.")
        adapters = [Recorded(**row) for row in facts.pop("adapters")]
        for adapter in adapters:
            for row in adapter.prompts:
                for who in ("trained", "base"):
                    if who in row:
                        row[who] = Answer(**row[who])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not as export writes it ({error!r}). Export again.") from None
    if not any(adapter.prompts for adapter in adapters):
        raise InputError(f"{path} holds no answers: its model does not go on writing after a text.")
    return Served(path, facts, adapters)
