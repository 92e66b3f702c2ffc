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
from ftlevel.config.train import pop_command_line_only
from ftlevel.errors import ConfigError
from ftlevel.extensions import hooks
from ftlevel.extras.other_tools.aliases import (
    AXOLOTL,
    LLAMA_FACTORY,
    MS_SWIFT,
    TRL,
    VERL,
    detect_tool,
)

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
    defaults = _method_defaults(tool, values)
    for key, value in defaults.items():
        typer.echo(f"note: {key} {_words(value)[0]} is kept, as in {tool}: its default", err=True)
    # Of two keys that contradict each other, the first is not taken over.
    pairs = sorted({**values, **defaults}.items(), key=lambda pair: pair[0] in _METHOD_KEYS)
    typed, lost = _sort_keys(dict(pairs))
    if tool == VERL:
        lost["reward_model"] = "verl chooses a function by data_source; number is used: check it"
    config = _resolve(typed, lost)
    data = config.data
    is_name = "dataset" in typed and "/" not in data.dataset and not Path(data.dataset).suffix
    if tool == LLAMA_FACTORY and is_name:
        lost["dataset"] = (
            "dataset_info.json is not read. Use the files of "
            f"{', '.join([data.dataset, *data.also])}"
        )
    recipe = config.model_dump(mode="json", exclude_unset=True)
    for field, flag in pop_command_line_only(recipe):
        lost[field] = f"a file cannot set it. Pass {flag}"
    typer.echo(f"# {file.name} of {tool}, converted by ftlevel {__version__}.")
    for key, reason in lost.items():
        typer.echo(f"# Not converted: {key}: {reason}")
        typer.echo(f"note: not converted: {key}: {reason}", err=True)
    typer.echo(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), nl=False)
    return []


_LORA_DEFAULTS = {MS_SWIFT: {"lora_alpha": 32}, TRL: {"lora_r": 16, "lora_alpha": 32}}
_METHOD_KEYS = """
    adapter use_peft use_peft_lora use_lora peft_method finetuning_type tuner_type train_type
    """.split()


def _method_defaults(tool: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns defaults of `tool` for keys missing in `values`, if ftlevel would train otherwise."""
    given = {key: value for key, value in values.items() if value not in (None, "")}
    methods = [given[key] for key in _METHOD_KEYS if key in given]
    defaults: dict[str, Any] = {}
    if tool == AXOLOTL:
        defaults = {"adapter": "full"}
    elif tool == TRL and not methods:
        defaults = {"use_peft": False}
    elif all(method in ("lora", True) for method in methods):
        defaults = {**_LORA_DEFAULTS.get(tool, {})}
        if tool == LLAMA_FACTORY and isinstance(rank := given.get("lora_rank"), int) and rank != 8:
            defaults["lora_alpha"] = 2 * rank
    return {key: value for key, value in defaults.items() if key not in given}


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
                lost[key] = _reason(error.problems)
            else:
                typed[key] = words
    return typed, lost


def _reason(problems: Sequence[str]) -> str:
    flag, _, reason = problems[-1].partition(": ")
    return reason if reason and len(flag.split()) < 3 else problems[-1]


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
        keys = typed.keys() - {"task", "task_type", "stage", "rl", "rlhf_type"}
        left = {k: getattr(problem_of(k), "problems", []) for k in typed if k in keys}
        # Without a key, a rule may be checked that was not reached before.
        ranks = {k: (set(error.problems) <= set(rest), len(rest)) for k, rest in left.items()}
        key = min(ranks, key=lambda key: ranks[key], default="")
        solved = [text for text in error.problems if text not in left.get(key, error.problems)]
        if not solved:
            raise ConfigError([*error.problems, *(f"{k}: {reason}" for k, reason in lost.items())])
        lost[key] = _reason(solved)
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


_AXOLOTL_FLAGS = {"rl": "--stage", "rl_beta": "--beta", "chat_template": "--template"}


def convert_keys(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Returns (key, command-line arguments) of another tool's file; no arguments if unsupported."""
    converted = (convert(values) for convert in hooks("convert_keys"))
    return next((pairs for pairs in converted if pairs is not None), None) or _convert_keys(values)


def _convert_keys(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    if values.keys() & {"reward_funcs", "num_generations"} and "rlhf_type" not in values:
        yield "task", ["--task", "rl"]
    for key, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        is_often = isinstance(value, int | float) and value > 1
        if key == "datasets" and isinstance(value, list):
            yield from _data_sets(value)
        elif key in ("evals_per_epoch", "saves_per_epoch") and is_often:
            share = 1 / (float(value) * float(values.get("num_epochs") or 1))
            yield key, [f"--{key[:4]}-steps", f"{share:g}"]
        elif key in _AXOLOTL_FLAGS:
            yield key, [_AXOLOTL_FLAGS[key], str(value)]
        elif key == "trl" and isinstance(value, Mapping):
            for name, setting in value.items():
                yield f"trl.{name}", [f"--{name}", *_words(setting)]
        elif isinstance(value, Mapping) and key in ("lr_scheduler_kwargs", "optim_args"):
            yield key, [f"--{key}", ",".join(f"{name}={value[name]}" for name in value)]
        elif isinstance(value, Mapping) or _is_nested(value):
            yield key, []
        else:
            yield key, [f"--{key}", *_words(value)]


def _data_sets(sets: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
    shared: dict[str, str] = {}  # a recipe has one format for all
    for number, one in enumerate(sets):
        data = one if isinstance(one, Mapping) else {"path": one}
        for key, value in data.items():
            shown = f"datasets[{number}].{key}"
            flag = "--format" if key == "type" else _OF_A_SET.get(key)
            text = _FORMATS.get(str(value)) if key == "type" else str(value)
            if key == "path":
                yield shown, ["--dataset", str(value)]
            elif flag and text and shared.setdefault(flag, text) == text:
                yield shown, [flag, text]
            else:
                yield shown, []


def _is_nested(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(part, (list, Mapping)) for part in value)


def _words(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["true" if value else "false"]
    return [",".join(map(str, value))] if isinstance(value, list) else [str(value)]
