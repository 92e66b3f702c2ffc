"""Flags that set a field of the configuration: declared by hand, described by the field.

`flag("train.learning_rate")` is a Typer option whose help is the field's description; the command
collects what was given with `given_flags` and hands it to the configuration as one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ftlevel.config import SPECS, Layer, TrainConfig, put

FLAG_PATHS: dict[str, tuple[str, tuple[str, ...]]] = {}
"""Parameter name → (flag as shown, path of the field that it sets)."""


def flag(path: str, *names: str, panel: str | None = None) -> Any:
    """Declare an option that sets the configuration field at `path`.

    Args:
        path: dotted path of the field; `method.NAME` may be a field of any method.
        names: the flag as Typer declares it; the default is the field's name in kebab case.
        panel: heading under which `--help` shows it.
    """
    key = tuple(path.split("."))
    declared = names or ("--" + key[-1].replace("_", "-"),)
    shown = declared[0].partition("/")[0]
    FLAG_PATHS[shown.removeprefix("--").replace("-", "_")] = (shown, key)
    return typer.Option(
        *declared,
        help=field_at(key).description,
        rich_help_panel=panel,
        show_default=False,
    )


def field_at(key: tuple[str, ...]) -> FieldInfo:
    """Return the configuration field at `key`."""
    if key[0] == "method" and len(key) == 2:
        if key[1] == "kind":
            return FieldInfo(description=f"What is trained: {', '.join(SPECS)}.")
        return next(s.model_fields[key[1]] for s in SPECS.values() if key[1] in s.model_fields)
    model: type[BaseModel] = TrainConfig
    for part in key[:-1]:
        annotation = model.model_fields[part].annotation
        while get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            raise KeyError(".".join(key))
        model = annotation
    return model.model_fields[key[-1]]


def given_flags(parameters: Mapping[str, Any]) -> Layer:
    """Return the configuration layer of the flags in `parameters` that the user gave."""
    layer = Layer()
    for name, value in parameters.items():
        if value is not None and name in FLAG_PATHS:
            shown, key = FLAG_PATHS[name]
            put(layer, key, value, shown)
    return layer
