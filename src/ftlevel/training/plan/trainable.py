"""Number of trainable parameters of a run, and compatibility of an adapter to continue from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, join_names
from ftlevel.methods import METHODS
from ftlevel.models.loading import build_task_model
from ftlevel.trained.adapt import apply_method, compact_targets, describe_state
from ftlevel.trained.model_ref import ADAPTER_WEIGHTS
from ftlevel.training.plan.adapter import StartingAdapter
from ftlevel.training.plan.run import Run
from ftlevel.weights.tensor_files import read_header

_ELSEWHERE = set(
    """
    base_model_name_or_path revision inference_mode auto_mapping peft_version task_type
    target_modules exclude_modules modules_to_save layers_to_transform layers_pattern
    target_parameters fan_in_fan_out feedforward_modules
    """.split()
)
"""Settings that are names, or that follow from names and shapes of the weights."""


def check_adapter_matches(adapter: StartingAdapter, run: Run) -> None:
    """Raise ConfigError if settings or tensors of an adapter differ from those the run builds."""
    own, spec = METHODS[run.config.method.kind], run.config.method
    meta = build_task_model(run.model.config, run.model.auto_class)
    if own.build is None:
        raise TypeError("a whole model has no adapter")
    problem, known = run.data.facts["problem_type"], adapter.card and adapter.card.options
    if known and known.get("problem_type", problem) != problem:
        raise ConfigError(
            f"--adapter {adapter.name} was trained for {known['problem_type']}, and these rows are "
            f"{problem}. Use other rows, or train a new adapter."
        )
    compact = replace(run.base, targets=compact_targets(meta, run.base.targets))
    built = json.loads(json.dumps(own.build(spec, compact).to_dict(), default=_plain))
    for name, value in adapter.settings.items():
        if _is_other(name, value, built):
            now = json.dumps(built.get(name))
            raise ConfigError(
                f"--adapter {adapter.name}: its {name} is {json.dumps(value)}, and in training it "
                f"would be {now}. It cannot be continued."
            )
    needed, wanted = describe_state(apply_method(meta, spec, run.base))
    stored, _ = read_header(adapter.directory / ADAPTER_WEIGHTS)
    found = {name: tensor.spec.shape for name, tensor in stored.items()}
    other = {name for name, shape in found.items() if wanted.get(name) != shape}
    if odd := sorted(other | (needed - found.keys())):
        first = odd[0]
        raise ConfigError(
            f"--adapter {adapter.name}: {len(odd):,} of its tensors are not those that would be "
            f"trained, such as {first}: {_shape(found.get(first))} in its file, and "
            f"{_shape(wanted.get(first))} here. It cannot be continued."
        )


def find_adapter_warnings(adapter: StartingAdapter, run: Run) -> list[str]:
    """Return warnings about unnamed classes and prompts that differ from the adapter's."""
    labels = run.data.facts["labels"]
    if adapter.card is None and labels and not run.config.data.labels:
        return [
            f"--adapter {adapter.name} keeps no names of its classes: its head's are taken for "
            f"{join_names(labels)}, in this order. --set 'data.labels=[…]' says otherwise."
        ]
    own, now = adapter.card and adapter.card.prompt, run.data.prompt_format
    if not own or now is None or own == json.loads(json.dumps(now.to_dict())):
        return []
    return [
        f"--adapter {adapter.name} has learned prompts that are laid out otherwise than those of "
        "these rows, and so will the new adapter have: it is asked as these rows are. ftlevel "
        "preview shows them."
    ]


def _is_other(name: str, value: Any, built: Mapping[str, Any]) -> bool:
    """Return whether an adapter setting differs from what would be built."""
    of_start = "init" in name or name.endswith("_config")
    if name in _ELSEWHERE or of_start or name.endswith("dropout"):
        return False
    return bool((value or built.get(name)) and value != built.get(name))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "×".join(map(str, shape)) or "a number"


def size_choices(run: Run, *, try_method: bool) -> list[Choice]:
    """Return the lines that show trainable parameters and steps; see `count_trainable`."""
    epochs = f"{run.config.train.num_train_epochs:g} epochs"
    reason = "" if run.config.train.max_steps else f"{epochs} of {len(run.data.train):,} rows"
    trainable, total = count_trainable(run, try_method=try_method)
    return [
        Choice("trainable", f"{trainable:,} of {total:,}", f"{trainable / total:.2%}"),
        Choice("steps", f"{run.schedule.steps:,}", reason),
    ]


def count_trainable(run: Run, *, try_method: bool = False) -> tuple[int, int]:
    """Return the number of trainable and of all parameters, without weights.

    The method's own formula is used where it exists, since building every adapter module on the
    meta model takes as long as on the real one. `try_method` builds the modules in any case, for a
    dry run.
    """
    method, total = run.config.method, run.model.total_parameters
    own = METHODS[method.kind]
    if own.count and not (try_method or run.base.heads or run.targets.parameters):
        added = own.count(method, run.targets.sizes)
        if added is not None:
            return added, total + added
    meta = build_task_model(run.model.config, run.model.auto_class)
    adapted = apply_method(meta, own.start.default(method) if own.start else method, run.base)
    return count_parameters(adapted)


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the number of trainable and of all parameters of `model`, each counted once.

    The frozen original that PEFT's `ModulesToSaveWrapper` keeps next to its copy is not counted.
    """
    from peft.utils import ModulesToSaveWrapper

    kept = tuple(
        f"{name}.original_module."
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    named = model.named_parameters(remove_duplicate=False)
    own = {id(p): p for name, p in named if not name.startswith(kept)}.values()
    return sum(p.numel() for p in own if p.requires_grad), sum(_count(p) for p in own)


def _count(parameter: Any) -> int:
    """Return the number of values in `parameter`; 4-bit weights store two per byte."""
    packed = type(parameter).__name__ == "Params4bit" or hasattr(parameter, "quant_state")
    return parameter.numel() * (2 if packed else 1)
