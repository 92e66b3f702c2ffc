"""Whether the method goes with the model, the task and the quantization, and in which precision."""

from __future__ import annotations

from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.errors import ConfigError
from ftlevel.methods import METHODS
from ftlevel.methods.base import QuantizedCheckpoint
from ftlevel.methods.facts import Cell
from ftlevel.methods.matrix import check_supported
from ftlevel.models.families import lookup_family
from ftlevel.models.hardware import choose_dtype
from ftlevel.models.kinds import model_kind
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.quantized import (
    match_quantization,
    quantization_name,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream.experts.which import packable_experts


def resolve_quantization(
    config: TrainConfig, bare: Any, source: ModelSource, device: str
) -> TrainConfig:
    """Return `config` with the quantization that the base has, whoever made it.

    Raises:
        ConfigError: the checkpoint is quantized, and the method or --quant does not go with that;
            or the device trains on no such base.
    """
    stored = stored_quantization(bare)
    form = config.quant.kind if stored is None else quantization_name(stored)
    if device == "mps" and form != "none":
        raise ConfigError(
            f"--device mps: a base in {form} is not trained on Apple's GPU: its kernels were never "
            "tried with ftlevel there, and on macOS 26 bitsandbytes fetches them from the Hub. Use "
            "--device cpu, or a model in floating point without --quant."
        )
    if stored is None:
        return config
    quant = match_quantization(stored, config.quant, source.words, device)
    method = config.method
    base = QuantizedCheckpoint(source.name, form, quant.kind)
    if reason := METHODS[method.kind].refuse_quantized(method, base):
        raise ConfigError(reason)
    resolved = config.model_copy(update={"quant": quant})
    try:
        check_method(resolved, bare, model_kind(bare))
    except ConfigError as error:
        already = f"--model {source.name} is quantized already ({form})."
        raise ConfigError([f"{already} {problem}" for problem in error.problems]) from None
    return resolved


def resolve_experts(config: TrainConfig, meta: Any, stored: bool) -> tuple[TrainConfig, str]:
    """Return `config` that says whether the experts are quantized too, and why they are not.

    Args:
        config: with the quantization that the base has.
        meta: the base on the meta device.
        stored: whether the base is quantized in its checkpoint.

    Raises:
        ConfigError: --set quant.experts=true, and they cannot be.
    """
    why = ""
    if not next(ModuleTree(meta).experts(), None):
        why = "the model has no experts in one tensor"
    elif config.quant.kind != "4bit":
        why = "bitsandbytes has 8 bits for linears alone"
    elif stored:
        why = "they are what the checkpoint holds"
    elif getattr(config.method, "target_parameters", None):
        why = "adapters go on them, which PEFT puts onto floating point"
    elif not next(packable_experts(meta), None):
        why = "they have biases, or lie otherwise than can be packed"
    elif config.quant.experts is False:
        why = "--set quant.experts=false"
    if config.quant.experts and why:
        raise ConfigError(f"quant.experts: experts cannot be quantized here: {why}. Drop it.")
    quant = config.quant.model_copy(update={"experts": not why})
    return config.model_copy(update={"quant": quant}), why


def check_method(config: TrainConfig, model_config: Any, kind: str) -> None:
    """Refuse a method that cannot be used on the model, for the task or on the quantization.

    Raises:
        ConfigError: with the reason, and what works.
    """
    family, quant = lookup_family(model_config.model_type), config.quant.kind
    experts = bool(family.target_parameters) if family else None
    base = Cell("", model_config.model_type, kind, config.task, quant, experts)
    check_supported(config.method, base)
    refuse = METHODS[config.method.kind].refuse
    reason = refuse(config.method, model_config, kind, config.task, quant) if refuse else None
    if reason is not None:
        raise ConfigError(f"--method {config.method.kind}: {reason}")
    goes_back = config.train.on_nonfinite == "rollback" or config.train.spike_factor is not None
    if goes_back and METHODS[config.method.kind].callbacks is not None:
        raise ConfigError(
            f"--method {config.method.kind} changes its shape in the course of a run, so that it "
            "cannot go back to a checkpoint: use --on-nonfinite skip, and no --spike-factor."
        )


def choose_precision(config: TrainConfig, device: str, model_type: str) -> Choice:
    """Return the compute precision.

    Raises:
        ConfigError: it is one that the device, the model or the method's start cannot have.
    """
    method, wish = config.method, config.model.dtype
    start = METHODS[method.kind].start
    needed = start.precision(method, wish) if start else None
    return needed or choose_dtype(wish, device, method.kind, model_type)
