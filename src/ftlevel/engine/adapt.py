"""Put a method onto a loaded model, and put a saved adapter onto a fresh one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ftlevel.config import FullSpec, MethodConfig
from ftlevel.methods import BUILDERS
from ftlevel.tasks import Task


def apply_method(
    model: Any,
    method: MethodConfig,
    task: Task,
    kind: str,
    *,
    targets: Sequence[str],
    heads: Sequence[str],
    fan_in_fan_out: bool,
) -> Any:
    """Return `model` with what `method` trains, in float32, and everything else frozen.

    Args:
        model: the loaded base (mutated by PEFT).
        method: the method's spec.
        task: for PEFT's task type.
        kind: kind of the model.
        targets: full names of the modules to adapt.
        heads: modules trained in full.
        fan_in_fan_out: whether the targets are Conv1D.
    """
    if isinstance(method, FullSpec):
        model.requires_grad_(True)
        return model
    from peft import get_peft_model

    config = BUILDERS[method.kind](
        method, compact_targets(model, targets), task.peft_types[kind], list(heads), fan_in_fan_out
    )
    adapted = get_peft_model(model, config)
    train_in_float32(adapted)
    return adapted


def train_in_float32(model: Any) -> None:
    """Hold every trainable parameter of `model` in float32 (mutated): updates are small.

    A head that was loaded in bfloat16 would lose most of AdamW's steps to rounding.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compact_targets(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the shortest names that PEFT's suffix match reads as exactly `targets`.

    `q_proj` instead of 32 full names, if every linear of that name is a target; other programs
    that read adapter_config.json expect such names. Where none will do, the full names.
    """
    wanted = set(targets)
    leaves = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    for depth in (1, 2, 3):
        short = {".".join(name.split(".")[-depth:]) for name in wanted}
        matched = {
            name for name in leaves if any(name == s or name.endswith("." + s) for s in short)
        }
        if matched == wanted:
            return sorted(short)
    return sorted(wanted)


def load_adapter(base: Any, directory: Path) -> Any:
    """Return `base` with the adapter saved in `directory`, in eval mode.

    Raises:
        RunError: the adapter lacks weights that its configuration promises, or has others.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, str(directory), is_trainable=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.float()
    return adapted.eval()
