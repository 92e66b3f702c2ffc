"""Topics of messages: the section of docs/troubleshooting.md that explains an error or warning.

The module that raises a message determines its topic, so messages need not name one.
"""

from __future__ import annotations

import traceback

from ftlevel.errors import ConfigError, Interrupted

TOPICS = {
    "settings": "__init__ cli commands config evaluation.intervals extensions pipeline objectives "
    "training",
    "recipes": "cli.recipes extras.other_tools",
    "files": "artifacts.row_files commands.preview data",
    "rows": "data.formats data.gate data.prepare data.sources.table tasks",
    "columns": "data.formats.columns data.formats.detect",
    "encoding": "data.encoding",
    "models": "models training.model weights.checkpoint",
    "targets": "commands.list_targets models.targets",
    "methods": "methods training.plan.adapter training.plan.method",
    "adapters": "artifacts evaluation.two_models trained",
    "output": "artifacts.files artifacts.hub artifacts.run_directory config.output",
    "memory": "commands.plan training.forecast training.memory",
    "training": "fast training.callbacks training.finish training.gradients training.proof "
    "training.saving",
    "resume": "training.identity training.resume",
    "processes": "extras.launch training.processes training.sharding world",
    "evaluation": "cli.evaluate cli.generate commands.evaluate commands.generate commands.predict "
    "evaluation training.best",
    "embeddings": "extras.retrieval",
    "preferences": "extras.preference training.teacher",
    "rewards": "extras.rl",
    "merge": "commands.merge merging methods.merging methods.updates",
    "export": "commands.quantize extras.serving "
    "merging.normal_form methods.lora_conversion weights",
    "reports": "extras.compare extras.report",
}
"""Modules of ftlevel, with their submodules, by topic; the longest name that matches is used."""

_TOPIC_OF = {module: topic for topic, modules in TOPICS.items() for module in modules.split()}


def topic_of_module(name: str) -> str | None:
    """Returns the topic of messages of an ftlevel module; None for any other module."""
    parts = name.split(".")
    if parts[0] != "ftlevel":
        return None
    if len(parts) == 1:
        return _TOPIC_OF["__init__"]
    candidates = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
    return next((_TOPIC_OF[module] for module in candidates if module in _TOPIC_OF), None)


def topic_of_error(error: BaseException) -> str | None:
    """Returns the topic of the module that raised `error`; None for an interrupt."""
    if isinstance(error, Interrupted):
        return None
    topic = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        topic = topic_of_module(frame.f_globals.get("__name__", "")) or topic
    # Settings are checked by the module that they belong to, such as a task.
    return "settings" if topic == "rows" and type(error) is ConfigError else topic


def with_topic(message: str, topic: str | None) -> str:
    """Returns `message` followed by `topic` in brackets, as mypy prints error codes."""
    return f"{message}  [{topic}]" if topic else message
