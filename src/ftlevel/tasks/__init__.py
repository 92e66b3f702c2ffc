"""What each task is: its model class, its prompt and its metrics. One small module a task."""

from ftlevel.task import Task
from ftlevel.tasks import (
    masked_lm,
    question_answering,
    summarization,
    text_classification,
    text_generation,
    token_classification,
    translation,
)

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
