"""What each task is: its model class, its prompt and its metrics. One small module a task."""

from ftlevel.tasks import summarization, text_classification, text_generation
from ftlevel.tasks.base import Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (text_generation, summarization, text_classification)
}

__all__ = ["TASKS", "Task"]
