"""What each task is: its model class, its prompt and its metrics. One small module a task."""

from ftlevel.tasks import (
    masked_lm,
    question_answering,
    summarization,
    text_classification,
    text_generation,
    token_classification,
    translation,
)
from ftlevel.tasks.base import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        text_generation,
        summarization,
        translation,
        text_classification,
        token_classification,
        question_answering,
        masked_lm,
    )
}

__all__ = ["TASKS", "Task"]
