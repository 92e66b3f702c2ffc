"""The task of a run where the user named none: an encoder's is read off the data's columns."""

from __future__ import annotations

from ftlevel.config import TrainConfig
from ftlevel.data.sources.lines import PART
from ftlevel.data.sources.splits import load_splits
from ftlevel.errors import InputError
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import load_config
from ftlevel.models.sources import resolve_source
from ftlevel.tasks import TASKS

_OF_ENCODERS = ("text-classification", "token-classification", "question-answering", "masked-lm")
"""What an encoder can learn, that which needs the most columns of its own first.

Columns are taken by their own names before the user's `--map` is, which says what they are for.
"""


def choose_task(config: TrainConfig) -> tuple[TrainConfig, str]:
    """Return `config` with the task that its model and its columns speak for, and the reason.

    A task that the user named stays, and so does that of a model that writes text; then there is
    no reason.

    Raises:
        ConfigError: the model or the data is not there, or the task does not go with the rest.
        InputError: the columns speak for none.
    """
    wish, data = config.model, config.data
    if "task" in config.model_fields_set or data.dataset.startswith("builtin:"):
        return config, ""
    source = resolve_source(wish.name_or_path, wish.revision, wish.trust_remote_code)
    if model_kind(load_config(source)) != "encoder":
        return config, ""
    table = load_splits(
        data.dataset,
        split=data.split,
        subset=data.subset,
        on_bad_row=data.on_bad_row,
        input_format=data.input_format,
        ignored=data.ignore_columns,
    ).train
    by_name = data.model_copy(update={"columns": {}})
    refusals: dict[str, InputError] = {}
    for name, section in ((n, s) for s in (by_name, data) for n in _OF_ENCODERS):
        try:
            found = TASKS[name].find_format(table.columns, section, table.rows[:PART])
        except InputError as error:
            refusals[name] = error
            continue
        why = f"the model is an encoder, and the columns are {found.name}; --task names another"
        return config.with_sections(task=name), why
    try:
        TASKS[config.task].find_format(table.columns, data, table.rows[:PART])
    except InputError:
        raise InputError(
            f"--model {wish.name_or_path} is an encoder, and the columns speak for none of its "
            f"tasks. {refusals[_OF_ENCODERS[0]]}"
        ) from None
    return config, ""
