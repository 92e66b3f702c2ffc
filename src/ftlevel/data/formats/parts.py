"""What an example says, as the gate reads it: what is asked and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parts:
    """What an example says, as the gate reads it.

    Attributes:
        asked: what the model is given: a prompt, the user's turns, a text that has a class.
        answered: what it learns: an answer, the assistant's turns, a class; of a plain text all.
        before: all that stands before the last answer; empty where nothing does.
        last: that answer.
        written: whether `answered` is written by the model after what it is given.
        roles: of the turns of a conversation.
        one_class: whether `last` is a class of the whole.
    """

    asked: str
    answered: str
    before: str
    last: str
    written: bool = False
    roles: tuple[str, ...] = ()
    one_class: bool = False


def parts_of(example: Any) -> Parts:
    """Return the parts of an example; one that does not tell them is a text as a whole."""
    parts = getattr(example, "parts", None)
    return parts if isinstance(parts, Parts) else Parts("", example.key_text, "", "")
