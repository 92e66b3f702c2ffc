"""Task names and their modules; a new task is a module and a line here, or in an extension."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from ftlevel.extensions import added_rows

TASKS: dict[str, str] = {
    "text-generation": "ftlevel.tasks.text",
    "summarization": "ftlevel.tasks.text",
    "translation": "ftlevel.tasks.text",
    "text-classification": "ftlevel.tasks.classes",
    "token-classification": "ftlevel.tasks.tags",
    "question-answering": "ftlevel.tasks.span",
    "masked-lm": "ftlevel.tasks.mask",
}
TASKS |= added_rows("tasks", TASKS)

if TYPE_CHECKING:
    TaskName: TypeAlias = str
else:
    TaskName = Literal[tuple(TASKS)]
