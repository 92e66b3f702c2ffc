"""Convert configuration files of Axolotl, LLaMA-Factory, ms-swift, TRL and verl to recipes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ftlevel._version import __version__
from ftlevel.cli.flags import CommandInput, add_command, read_config
from ftlevel.cli.spelling import build_flag_specs, resolve_flag_aliases
from ftlevel.config import TrainConfig
from ftlevel.config.flags import FLAGS
from ftlevel.config.layers import load_yaml_file
from ftlevel.errors import ConfigError
from ftlevel.extras.other_tools.aliases import (
    AXOLOTL,
    LLAMA_FACTORY,
    MS_SWIFT,
    TRL,
    VERL,
    detect_tool,
)
from ftlevel.extras.other_tools.rl import convert_verl

_NO_COUNTERPART = "no equivalent in ftlevel"


def convert(file: Path) -> list[str]:
    """Print another tool's configuration as a recipe, with comments on keys left out.

    Returns []; if the file is of no known tool, prints nothing and returns the known tools.
    """
    import yaml

    values, _ = load_yaml_file(file)
    tool = detect_tool(values)
    if not tool:
        return [AXOLOTL, LLAMA_FACTORY, MS_SWIFT, TRL, VERL]
    if tool == TRL and "num_generations" in values and "reward_funcs" not in values:
        raise ConfigError(
            f"{file}: no reward function, because TRL's GRPO scripts pass it in Python. Expected "
            "reward_funcs. Add a line to the file: reward_funcs: [MODULE.FUNCTION]"
        )
    typed, lost = _sort_keys(values)
    if tool == VERL:
        lost["reward_model"] = "verl chooses a function by data_source; number is used: check it"
    config = _resolve(typed, lost)
    data = config.data
    if tool == LLAMA_FACTORY and "/" not in data.dataset and not Path(data.dataset).suffix:
        lost["dataset"] = (
            "dataset_info.json is not read. Use the files of "
            f"{', '.join([data.dataset, *data.also])}"
        )
    typer.echo(f"# {file.name} of {tool}, converted by ftlevel {__version__}.")
    for key, reason in lost.items():
        typer.echo(f"# Not taken over: {key}: {reason}")
        typer.echo(f"note: not converted: {key}: {reason}", err=True)
    recipe = config.model_dump(mode="json", exclude_unset=True)
    typer.echo(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), nl=False)
    return []


def _sort_keys(values: dict[str, Any]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Returns key → command-line arguments, and key → reason for keys without an equivalent."""
    specs = build_flag_specs("train", FLAGS)
    typed: dict[str, list[str]] = {}
    lost: dict[str, str] = {}
    for key, words in convert_keys(values):
        name = (words or [f"--{key}"])[0].replace("_", "-")
        if name not in specs:
            lost[key] = _NO_COUNTERPART
        elif not words:
            lost[key] = specs[name].message or _NO_COUNTERPART
        else:
            try:
                resolve_flag_aliases([*itertools.chain(*typed.values()), *words], specs)
            except ConfigError as error:
                lost[key] = _reason(error)
            else:
                typed[key] = words
    return typed, lost


def _reason(error: ConfigError) -> str:
    return error.problems[-1].partition(": ")[2] or error.problems[-1]


def _resolve(typed: dict[str, list[str]], lost: dict[str, str]) -> TrainConfig:
    """Returns the configuration of `typed` (key → arguments); moves keys with errors to `lost`."""
    configs: list[TrainConfig] = []

    def command(inputs: CommandInput) -> None:
        configs.append(read_config(inputs, notes.append)[0])

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    add_command(app, "train", command, FLAGS)

    def problem_of(without: str) -> ConfigError | None:
        notes.clear()
        values = (values for key, values in typed.items() if key != without)
        try:
            app(args=[*itertools.chain(*values)], standalone_mode=False)
        except ConfigError as error:
            return error
        return None

    notes: list[str] = []
    while (error := problem_of("")) is not None:
        fewer = ((key, problem_of(key)) for key in list(typed))
        key = next(
            (k for k, left in fewer if left is None or len(left.problems) < len(error.problems)),
            None,
        )
        if key is None:
            raise ConfigError([*error.problems, *(f"{k}: {reason}" for k, reason in lost.items())])
        lost[key] = _reason(error)
        del typed[key]
    for line in notes:
        typer.echo(f"note: {line}", err=True)
    return configs[-1]


_FORMATS = {
    "alpaca": "alpaca",
    "chat_template": "messages",
    "completion": "text",
    "sharegpt": "conversations",
}
_OF_A_SET = {
    "split": "--split",
    "name": "--subset",
    "field": "--text-column",
    "field_messages": "--messages-column",
}


_AXOLOTL_FLAGS = {"rl": "--stage", "rl_beta": "--beta"}


def convert_keys(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yields (key, command-line arguments) of another tool's file; no arguments if unsupported."""
    if "actor_rollout_ref" in values:
        yield from convert_verl(values)
        return
    if values.keys() & {"reward_funcs", "num_generations"} and "rlhf_type" not in values:
        yield "task", ["--task", "rl"]
    for key, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        if key == "datasets" and isinstance(value, list):
            yield from _data_sets(value)
        elif key in ("evals_per_epoch", "saves_per_epoch") and _is_often(value):
            share = 1 / (float(value) * float(values.get("num_epochs") or 1))
            yield key, [f"--{key[:4]}-steps", f"{share:g}"]
        elif key in _AXOLOTL_FLAGS:
            yield key, [_AXOLOTL_FLAGS[key], str(value)]
        elif key == "trl" and isinstance(value, Mapping):
            for name, setting in value.items():
                yield f"trl.{name}", [f"--{name}", *_words(setting)]
        elif isinstance(value, Mapping) or _is_nested(value):
            yield key, []
        else:
            yield key, [f"--{key}", *_words(value)]


def _data_sets(sets: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
    for number, one in enumerate(sets):
        data = one if isinstance(one, Mapping) else {"path": one}
        for key, value in data.items():
            shown = f"datasets[{number}].{key}"
            if key == "path":
                yield shown, ["--dataset", str(value)]
            elif key == "type" and str(value) in _FORMATS:
                yield shown, ["--format", _FORMATS[str(value)]]
            elif key in _OF_A_SET:
                yield shown, [_OF_A_SET[key], str(value)]
            else:
                yield shown, []


def _is_often(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 1


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, (list, Mapping)) for part in value)


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["true" if value else "false"]
    return [",".join(map(str, value))] if isinstance(value, list) else [str(value)]
