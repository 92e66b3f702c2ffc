"""Configuration of a run that continues an adapter: base, method, quantization, task and labels.

Flags that contradict the adapter, and adapters that the run cannot rebuild, are rejected first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD
from ftlevel.artifacts.files import file_fingerprint
from ftlevel.artifacts.run_directory import CONFIG, get_run_dir
from ftlevel.config import SPECS, Layer, MethodConfig, TrainConfig, build_config, load_recipe
from ftlevel.config.flags import FLAGS
from ftlevel.errors import ConfigError, join_names
from ftlevel.methods import METHODS
from ftlevel.methods.merging import WEIGHTS, get_merge_error
from ftlevel.models.hardware import select_device
from ftlevel.models.loading import build_task_model
from ftlevel.models.sources import resolve_source
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import apply_method, get_expected_tensors, get_shortest_targets
from ftlevel.trained.resolve import (
    ADAPTER_CONFIG,
    get_model_dir,
    is_model,
    load_peft_adapter_config,
    resolve_model,
)
from ftlevel.training.plan.run import Run, StartingAdapter
from ftlevel.weights.checkpoint import load_header

_RECIPE_FIELDS = ("target_modules", "target_parameters", "layers_to_transform", "modules_to_save")
"""Settings taken from the run's recipe: adapter_config.json has expanded module names."""


def resolve_adapter(config: TrainConfig) -> tuple[TrainConfig, StartingAdapter | None, list[str]]:
    """Apply `--adapter` to `config`; returns the new configuration, the adapter, and notes.

    A full model, such as a merged one, becomes the base model instead, and the adapter is None.
    Raises ConfigError if the adapter is missing or cannot be continued, or a flag contradicts it;
    InputError if its files are corrupted, or the base model is missing or differs.
    """
    if config.model.adapter is None:
        return config, None, []
    name, model = config.model.adapter, config.model
    path, values = get_model_dir(name), config.model_dump(exclude_unset=True)
    is_named = "name_or_path" in model.model_fields_set
    if is_model(name):
        if is_named:
            raise ConfigError(
                f"--adapter {name} is a full model, and --model {model.name_or_path} is "
                f"given too. Use one of them."
            )
        values["model"] |= {"name_or_path": str(path), "adapter": None}
        note = f"--adapter {name} is a full model and is used as --model"
        return build_config([Layer(values)]), None, [note]
    _check_adapter_path(name, path, config.output.dir)
    ref = resolve_model(
        name,
        None if (path / CARD).is_file() else values.get("task"),
        resolve_source(model.name_or_path, model.revision) if is_named else None,
        device=select_device(model.device).value,
        label=f"--adapter {name}",
        trust_remote_code=model.trust_remote_code,
    )
    card = ref.card if ref.is_ours else None
    adapter = StartingAdapter(
        name, path, load_peft_adapter_config(path), card, file_fingerprint(path / WEIGHTS)
    )
    uses_dropout = TASKS[config.task].uses_dropout
    spec = _load_method_config(adapter, config.method, uses_dropout=uses_dropout)
    _check_method_options(config, adapter, spec)
    init = {key: adapter.settings.get(key) for key in ("peft_type", "init_lora_weights")}
    if init["init_lora_weights"] and (error := get_merge_error(init)):
        raise ConfigError(f"--adapter {name} cannot be continued. {error}")
    values["method"] = spec.model_dump()
    values["model"] = {**values.get("model", {}), "name_or_path": ref.base}
    if ref.source.revision:
        values["model"]["revision"] = ref.source.revision
    if card is None:
        # The columns decide between the tasks of an encoder-decoder.
        if adapter.settings.get("task_type") != "SEQ_2_SEQ_LM" or "task" in values:
            values["task"] = ref.task
        values |= _get_task_values(values, path, {})
        return build_config([Layer(values)]), adapter, []
    values.setdefault("task", ref.task)
    values |= _get_task_values(values, path, card.options)
    if ref.labels:
        values["data"] = {**values.get("data", {}), "labels": ref.labels}
    if not ref.is_prequantized:
        values["quant"] = dict(ref.quantization)
        if ref.quantization.get("kind") == "4bit":  # packed only if the card says so
            values["quant"].setdefault("experts", False)
    in_half = card.dtype == "float16" and select_device(model.device).value == "cpu"
    if model.dtype == "auto" and not in_half:
        values["model"]["dtype"] = card.dtype
    return build_config([Layer(values)]), adapter, []


def _get_task_values(
    values: Mapping[str, Any], path: Path, card_options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    if "task" not in values:
        return {}
    values_by_section = TASKS[values["task"]].inherited_config(path, card_options)
    return {
        name: {**settings, **values.get(name, {})} for name, settings in values_by_section.items()
    }


def _check_adapter_path(name: str, path: Path, output_dir: Path | None) -> None:
    if not (path / ADAPTER_CONFIG).is_file():
        problem = "contains neither an adapter nor a model" if path.exists() else "does not exist"
        raise ConfigError(
            f"--adapter {name} {problem}. Name a run of ftlevel, its adapter directory, an adapter "
            f"of PEFT's with its {ADAPTER_CONFIG}, or a method."
        )
    if output_dir is not None and path.resolve().is_relative_to(output_dir.resolve()):
        raise ConfigError(
            f"--output-dir {output_dir} contains --adapter {name}, which is not changed. Choose "
            "another directory; --resume continues in the same."
        )


def _load_method_config(
    adapter: StartingAdapter, requested: MethodConfig, *, uses_dropout: bool
) -> MethodConfig:
    peft_config, card = adapter.settings, adapter.card
    method = card.method if card else _get_method(adapter, requested.kind)
    run_path = get_run_dir(adapter.directory)
    values: dict[str, Any] = {}
    if card is not None and run_path is not None:
        recipe = load_recipe(run_path / CONFIG).values.get("method") or {}
        values = dict(recipe) if isinstance(recipe, Mapping) else {}
    method = METHODS[method].resume_method or method
    fields = SPECS[method].model_fields
    values = {name: value for name, value in values.items() if name in fields}
    values |= {
        name: value
        for name, value in peft_config.items()
        if name in fields
        and value is not None
        and not name.startswith("init_")
        and not (name in values and name in _RECIPE_FIELDS)
    }
    if (card is None or run_path is None) and "modules_to_save" in fields:
        values["modules_to_save"] = _get_saved_modules(adapter)
    dropouts = [name for name in fields if name.endswith("dropout")]
    if not uses_dropout:
        values |= dict.fromkeys(dropouts, 0.0)
    for name in ("lora_plus_ratio", *dropouts):
        if name in requested.model_fields_set and hasattr(requested, name):
            values[name] = getattr(requested, name)  # training settings, not part of the adapter
    spec = build_config([Layer({"method": {**values, "kind": method}})]).method
    return METHODS[method].initialization.without_weights(spec)


def _get_method(adapter: StartingAdapter, requested: str) -> str:
    """Returns the method that continues `adapter`: `requested` if it can, as QLoRA can for LoRA."""
    peft_type = str(adapter.settings.get("peft_type"))
    for kind in (requested, *METHODS):
        method = METHODS[kind]
        if method.merge_info.peft_types[:1] == (peft_type,) and not method.tuner:
            return kind
    raise ConfigError(
        f"--adapter {adapter.name} is of type {peft_type}, which no --method can continue. See "
        f"ftlevel list-methods."
    )


def _get_saved_modules(adapter: StartingAdapter) -> list[str]:
    tensors, _ = load_header(adapter.directory / WEIGHTS)
    names = adapter.settings.get("modules_to_save") or []
    return [name for name in names if any(f".{name}." in key for key in tensors)]


def _check_method_options(
    config: TrainConfig, adapter: StartingAdapter, spec: MethodConfig
) -> None:
    if error := METHODS[spec.kind].resume_error:
        raise ConfigError(
            f"--adapter {adapter.name} was trained by --method {spec.kind}, which cannot be "
            f"continued: {error}. Merge it with ftlevel merge and train on the result."
        )
    requested, card, errors = config.method, adapter.card, list[str]()

    def add(flag: str, value: Any, other: Any) -> None:
        errors.append(
            f"{flag} {value}: --adapter {adapter.name} has {other}. Drop {flag}, or train a new "
            "adapter."
        )

    flag_by_field = {row.path: row.name for row in FLAGS if row.path}
    names = requested.model_fields_set - {"kind"}
    is_lora = {requested.kind, spec.kind} <= {"lora", "qlora"}
    is_same = is_lora or requested.kind in (spec.kind, card.method if card else "")
    # `kind` defaults to lora if only other method fields are given.
    is_default = requested.kind == "lora" and names
    if "method" in config.model_fields_set and not (is_same or is_default):
        add("--method", requested.kind, spec.kind)
    for name in sorted(names):
        value, other = getattr(requested, name), getattr(spec, name, None)
        if name.startswith("init_") and value == "default":
            continue
        if _sorted(value) != _sorted(other):
            expected = other if hasattr(spec, name) else "no such field"
            add(flag_by_field.get(f"method.{name}", f"method.{name}"), value, expected)
    if card is not None:
        continues = TASKS[config.task].trains_language_head
        same_head = continues and TASKS[card.task].generates_text
        if "task" in config.model_fields_set and config.task != card.task and not same_head:
            add("--task", config.task, f"the task {card.task}")
        if config.data.labels and list(config.data.labels) != card.labels:
            add("data.labels", ", ".join(config.data.labels), ", ".join(card.labels))
        quant = card.quantization.get("kind", "none")
        if config.quant.kind not in ("none", quant):
            add("--quant", config.quant.kind, f"a base of --quant {quant}")
    if errors:
        raise ConfigError(errors)


def _sorted(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value


_IGNORED_FIELDS = set(
    """
    base_model_name_or_path revision inference_mode auto_mapping peft_version task_type
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern
    target_parameters fan_in_fan_out feedforward_modules
    """.split()
)
"""Settings that are names, or that follow from names and shapes of the weights."""


def check_adapter_matches(adapter: StartingAdapter, run: Run) -> None:
    """Raise ConfigError if settings or shapes of `adapter` differ from what `run` creates."""
    method, spec = METHODS[run.config.method.kind], run.config.method
    meta = build_task_model(run.model.config, run.model.auto_class)
    problem, card_options = run.data.info["problem_type"], adapter.card and adapter.card.options
    if card_options and card_options.get("problem_type", problem) != problem:
        raise ConfigError(
            f"--adapter {adapter.name} was trained for {card_options['problem_type']}, and these "
            f"rows are {problem}. Use other rows, or train a new adapter."
        )
    base_info = replace(run.base, targets=get_shortest_targets(meta, run.base.targets))
    expected_config = json.loads(
        json.dumps(method.build(spec, base_info).to_dict(), default=_to_json)
    )
    for name, value in adapter.settings.items():
        if _is_other(name, value, expected_config):
            expected = json.dumps(expected_config.get(name))
            raise ConfigError(
                f"--adapter {adapter.name}: its {name} is {json.dumps(value)}, and in training it "
                f"would be {expected}. It cannot be continued."
            )
    required, shapes = get_expected_tensors(apply_method(meta, spec, run.base))
    tensors, _ = load_header(adapter.directory / WEIGHTS)
    saved_shapes = {name: tensor.spec.shape for name, tensor in tensors.items()}
    other = {name for name, shape in saved_shapes.items() if shapes.get(name) != shape}
    if mismatched := sorted(other | (required - saved_shapes.keys())):
        first = mismatched[0]
        raise ConfigError(
            f"--adapter {adapter.name}: {len(mismatched):,} of its tensors differ from those to "
            f"train, such as {first}: {_shape(saved_shapes.get(first))} in its file, "
            f"and {_shape(shapes.get(first))} here. It cannot be continued."
        )


def get_adapter_warnings(adapter: StartingAdapter, run: Run) -> list[str]:
    """Returns a warning if class names, the prompt format or dropout are not those of `adapter`."""
    labels, notes = run.data.info["labels"], list[str]()
    has_dropout = any(v for k, v in adapter.settings.items() if k.endswith("dropout"))
    if has_dropout and not run.task.uses_dropout:
        notes = [f"--adapter {adapter.name}: its dropout is off; --task {run.config.task} has none"]
    if adapter.card is None and labels and not run.config.data.labels:
        return [
            f"--adapter {adapter.name} stores no class names: {join_names(labels)} is assumed, in "
            "this order. Set another with --set 'data.labels=[…]'."
        ]
    prompt, current = adapter.card and adapter.card.prompt, run.data.prompt_format
    if not prompt or current is None or prompt == json.loads(json.dumps(current.to_dict())):
        return notes
    return [
        *notes,
        f"--adapter {adapter.name} was trained with another prompt layout than these rows have. "
        f"The new adapter will expect the layout of these rows; see ftlevel preview.",
    ]


def _is_other(name: str, value: Any, expected_config: Mapping[str, Any]) -> bool:
    is_initialization = "init" in name or name.endswith("_config")
    if name in _IGNORED_FIELDS or is_initialization or name.endswith("dropout"):
        return False
    return bool((value or expected_config.get(name)) and value != expected_config.get(name))


def _to_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "×".join(map(str, shape)) or "a number"
