"""chat: short English conversations of the ChatterBot corpus, as messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

import yaml

from data_sets.sources import Sources
from data_sets.splits import Row, Splits, split_rows, squeeze
from wheels import Package

PACKAGE = Package(
    "chatterbot-corpus",
    "1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
)
# Files with poor or tasteless rows.
EXCLUDED = ("gossip", "humor", "politics", "conversations", "emotion", "psychology")


def conversation_rows(text: str, topic: str) -> Iterator[Row]:
    """Yield the conversations of a YAML file whose first answer has at least 8 characters.

    Turns alternate, starting with the user; an unanswered last turn is dropped.
    """
    for conversation in yaml.safe_load(text)["conversations"]:
        turns = [squeeze(str(turn)) for turn in conversation]
        if len(turns) < 2 or len(turns[1]) < 8:
            continue
        roles = ("user", "assistant") * (len(turns) // 2)
        messages = [
            {"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)
        ]
        yield {"messages": messages, "topic": topic}


def build_chat(name: str, sources: Sources) -> Splits:
    """Build chat."""
    rows: list[Row] = []
    for file, text in sources.members(PACKAGE, r"chatterbot_corpus/data/english/[^/]+\.yml"):
        topic = PurePosixPath(file).stem
        if topic not in EXCLUDED:
            rows += conversation_rows(text, topic)
    return split_rows(
        name, rows, (2000, 100, 100), key=lambda row: str(row["messages"][0]["content"].lower())
    )
