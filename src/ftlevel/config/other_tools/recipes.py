"""Configuration files of other tools: whose one is, and its keys as that tool's command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

AXOLOTL, LLAMA_FACTORY, MS_SWIFT, TRL = "Axolotl", "LLaMA-Factory", "ms-swift", "TRL"

_KEYS = {
    AXOLOTL: ("base_model",),
    LLAMA_FACTORY: ("finetuning_type", "stage", "cutoff_len"),
    MS_SWIFT: ("tuner_type", "train_type", "rlhf_type"),
    TRL: ("model_name_or_path", "dataset_name"),
}
"""Tool → top-level keys of which one is enough to know its files by."""

_FORMATS = {"alpaca": "alpaca", "chat_template": "messages", "completion": "text",
            "sharegpt": "conversations"}  # fmt: skip
_OF_A_SET = {"split": "--split", "name": "--subset", "field": "--text-column",
             "field_messages": "--messages-column"}  # fmt: skip


def tool_of(values: Mapping[str, Any]) -> str:
    """Return the tool whose file has these keys; empty for a recipe of ftlevel."""
    if any(isinstance(values.get(key), Mapping) for key in ("model", "data", "train", "method")):
        return ""
    return next((tool for tool, keys in _KEYS.items() if set(keys) & set(values)), "")


def typed_keys(values: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield each key that has a value, and what would be typed for it; nothing for no counterpart.

    Args:
        values: of a file of another tool.
    """
    for key, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        if key == "datasets" and isinstance(value, list):
            yield from _data_sets(value)
        elif key in ("evals_per_epoch", "saves_per_epoch") and _is_often(value):
            share = 1 / (float(value) * float(values.get("num_epochs") or 1))
            yield key, [f"--{key[:4]}-steps", f"{share:g}"]
        elif isinstance(value, Mapping) or _is_nested(value):
            yield key, []
        else:
            yield key, [f"--{key}", *_words(value)]


def _data_sets(sets: Sequence[Any]) -> Iterator[tuple[str, list[str]]]:
    for number, one in enumerate(sets):
        fields = one if isinstance(one, Mapping) else {"path": one}
        for key, value in fields.items():
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
