"""Target modules of a method on a meta model, and checks of method, model, task and precision."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ftlevel.config import MethodConfig, QuantConfig, TrainerConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, did_you_mean, join_names
from ftlevel.methods import METHODS, Method, check_supported
from ftlevel.methods.base import QuantizedCheckpoint
from ftlevel.methods.support_table import Cell
from ftlevel.models.families import lookup_family
from ftlevel.models.hardware import select_dtype
from ftlevel.models.loading import build_task_model
from ftlevel.models.module_tree import ModuleTree, linear_size
from ftlevel.models.quantization import (
    get_quantization_config,
    match_quantization,
    quantization_name,
)
from ftlevel.models.sources import ModelSource
from ftlevel.models.targets import resolve_targets
from ftlevel.models.upstream.architectures import packable_experts


@dataclass(frozen=True)
class MethodTargets:
    """Full names of the modules and tensors that a method adapts.

    Attributes:
        parameters: PEFT's `target_parameters`.
        fan_in_fan_out: whether the modules are Conv1D, with `(in, out)` weights.
        sizes: `(in, out)` of linear layers, and the weight's shape of embeddings.
        full_modules: PEFT's `modules_to_save`.
    """

    modules: list[str]
    parameters: list[str]
    fan_in_fan_out: bool
    sizes: Mapping[str, tuple[int, int]]
    full_modules: list[str]

    def choices(self, target_modules: Any) -> list[Choice]:
        """Returns the printed lines on the targets; `target_modules` is the option's value."""
        if not self.modules:
            return []
        names = dict.fromkeys(re.sub(r"^\d+$", "norm", n.rpartition(".")[2]) for n in self.modules)
        text = f"{', '.join(names)}: {len(self.modules)} modules"
        is_default = target_modules == "all-linear"
        note = "all-linear: every linear layer of the blocks" if is_default else ""
        choices = [Choice("target tensors", ", ".join(self.parameters))] if self.parameters else []
        if self.full_modules:
            choices.append(Choice("in full", ", ".join(self.full_modules), "--modules-to-save"))
        return [Choice("targets", text, note), *choices]


def resolve_method_targets(
    spec: MethodConfig, meta: Any, model_name: str, quant: str = "none"
) -> MethodTargets:
    """Returns what `spec` adapts in the meta model `meta`; ConfigError if it lacks a target."""
    method, tree = METHODS[spec.kind], ModuleTree(meta)
    modules = _resolve_modules(spec, method, tree, model_name)
    layers = getattr(spec, "layers_to_transform", None)
    if layers:
        modules = _filter_layers(modules, tree, layers)
    sizes = {name: size for name in modules if (size := linear_size(tree.modules[name]))}
    # Quantization replaces Conv1D by linear layers with `(out, in)` weights.
    conv1d = quant == "none" and {kind for kind, _, _ in sizes.values()} == {"Conv1D"}
    target_parameters = getattr(spec, "target_parameters", None)
    parameters = (
        _resolve_parameters(target_parameters, tree, model_name) if target_parameters else []
    )
    widths = {name: (fan_in, fan_out) for name, (_, fan_in, fan_out) in sizes.items()}
    method.check(spec, widths)
    widths |= {
        name: tuple(tree.modules[name].weight.shape)
        for name in modules
        if isinstance(tree.modules[name], nn.Embedding)
    }
    full_modules = _resolve_saved_modules(
        getattr(spec, "modules_to_save", ()), tree, model_name, quant
    )
    return MethodTargets(modules, parameters, conv1d, widths, full_modules)


def _resolve_modules(
    spec: MethodConfig, method: Method, tree: ModuleTree, model_name: str
) -> list[str]:
    requested = getattr(spec, "target_modules", None)
    if requested:
        embeddings, rest = _split_embeddings(spec, method, tree, requested)
        names = resolve_targets(tree.model, rest, model_name=model_name) if rest else []
        return sorted({*embeddings, *names})
    names = list(filter(tree.is_called, method.default_target_modules(spec, tree.model)))
    if not names and spec.all_linear:
        raise ConfigError(
            f"--method {spec.kind} matches no module of {model_name}. Set --target-modules. Try: "
            f"ftlevel list-targets {model_name}"
        )
    return names


def _split_embeddings(
    spec: MethodConfig, method: Method, tree: ModuleTree, requested: str | list[str]
) -> tuple[list[str], str | list[str]]:
    error = method.get_embedding_error(spec)
    if isinstance(requested, str) or error is None:
        return [], requested
    model: Any = tree.model
    layers = [
        layer
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
    ]
    embeddings = [name for name, module in tree.modules.items() if any(module is x for x in layers)]
    matches = {name: [f for f in embeddings if f".{f}".endswith(f".{name}")] for name in requested}
    selected = [result for founds in matches.values() for result in founds]
    if selected and error:
        raise ConfigError(
            f"--target-modules: {selected[0]} is not a linear of a block, and {error}."
        )
    return selected, [name for name in requested if not matches[name]]


def _filter_layers(modules: Sequence[str], tree: ModuleTree, layers: Sequence[int]) -> list[str]:
    available = {tree.layer(name) for name in modules} - {None}
    missing = [layer for layer in layers if layer not in available]
    if missing:
        last = max(layer for layer in available if layer is not None) if available else 0
        raise ConfigError(
            f"method.layers_to_transform: there is no layer {join_names(map(str, missing))} with "
            f"adapted modules. Layers here are 0 to {last}."
        )
    return [name for name in modules if tree.layer(name) in layers]


def _resolve_saved_modules(
    names: Sequence[str], tree: ModuleTree, model_name: str, quant: str
) -> list[str]:
    """Returns `names` (`modules_to_save`), in full where PEFT's suffix match would add others."""
    resolved: list[str] = []
    for name in names:
        matches = [full for full in tree.modules if f".{full}".endswith(f".{name}")]
        if not matches:
            suffixes = sorted({full.rpartition(".")[2] for full in tree.modules if full})
            raise ConfigError(
                f"--modules-to-save: {name!r} is not a module of {model_name}."
                f"{did_you_mean(name, suffixes)}"
            )
        fused = [full for full in matches if linear_size(tree.modules[full])]
        if quant != "none" and (quantized := [full for full in fused if not tree.in_heads(full)]):
            raise ConfigError(
                f"--modules-to-save: {quantized[0]} is quantized, and its integers cannot be "
                "trained. Drop it, or drop --quant."
            )
        # PEFT matches without a dot before the name.
        peft_matches = [full for full in tree.modules if full.endswith(name)]
        resolved += [name] if peft_matches == matches else matches
    return resolved


def _resolve_parameters(
    requested: str | Sequence[str], tree: ModuleTree, model_name: str
) -> list[str]:
    experts = list(dict.fromkeys(part.pattern.rpartition("}.")[2] for part in tree.experts()))
    if requested == "experts":
        if not experts:
            raise ConfigError(
                f"method.target_parameters: {model_name} has no experts in one tensor. "
                "Drop it; --target-modules all-linear covers all linear layers."
            )
        return experts
    tensors = [name for name, _ in tree.model.named_parameters()]
    for name in requested:
        if not any(f".{tensor}".endswith(f".{name}") for tensor in tensors):
            available = f" Expert tensors here: {join_names(experts)}." if experts else ""
            suffixes = {".".join(tensor.split(".")[-3:]) for tensor in tensors}
            raise ConfigError(
                f"method.target_parameters: {name!r} is not a tensor of {model_name}."
                f"{did_you_mean(name, sorted(suffixes))}{available}"
            )
    return list(requested)


def resolve_quantization(
    quant: QuantConfig, method: MethodConfig, model_config: Any, source: ModelSource, device: str
) -> QuantConfig:
    """Returns the quantization of the base: that of its checkpoint, or else `quant`.

    ConfigError if the former contradicts `--quant`, or method or device do not support the result.
    """
    checkpoint_config = get_quantization_config(model_config)
    name = quant.kind if checkpoint_config is None else quantization_name(checkpoint_config)
    if device == "mps" and name != "none":
        raise ConfigError(
            f"--device mps: a base in {name} is not trained on Apple's GPU: ftlevel has not been "
            f"tested with its kernels there. Use --device cpu, or a model in floating point "
            f"without --quant."
        )
    if checkpoint_config is None:
        return quant
    quant = match_quantization(checkpoint_config, quant, source.label, device)
    base = QuantizedCheckpoint(source.name, name, quant.kind)
    if error := METHODS[method.kind].get_quantized_error(method, base):
        raise ConfigError(error)
    return quant


def resolve_experts(
    quant: QuantConfig, method: MethodConfig, model_config: Any, auto_class: str
) -> tuple[QuantConfig, Choice | None]:
    """Returns `quant` with `experts` resolved, and the line to print; None without experts.

    ConfigError if `quant.experts=true` is unsupported.
    """
    if quant.kind == "none" and not quant.experts:
        return quant, None
    meta, message = build_task_model(model_config, auto_class), ""
    has_experts = next(ModuleTree(meta).experts(), None) is not None
    if not has_experts:
        message = "the model has no experts in one tensor"
    elif quant.kind != "4bit":
        message = "bitsandbytes supports 8 bits for linear layers only"
    elif get_quantization_config(model_config) is not None:
        message = "they are stored like this in the checkpoint"
    elif getattr(method, "target_parameters", None):
        message = "they are adapted, which PEFT supports in floating point"
    elif not next(packable_experts(meta), None):
        message = "they have biases, or a layout that cannot be packed"
    elif quant.experts is False:
        message = "--set quant.experts=false"
    if quant.experts and message:
        raise ConfigError(f"quant.experts: experts cannot be quantized here: {message}. Drop it.")
    precision = "in floating point" if message else "4 bits, as the linear layers"
    choice = Choice("experts", precision, message) if has_experts else None
    return quant.model_copy(update={"experts": not message}), choice


def check_method(
    spec: MethodConfig,
    train: TrainerConfig,
    task: str,
    quant: QuantConfig,
    model_config: Any,
    model_type: str,
) -> None:
    """Raise ConfigError if the method does not support model, task or quantization."""
    family, method = lookup_family(model_config.model_type), METHODS[spec.kind]
    experts = bool(family.target_parameters) if family else None
    check_supported(spec, Cell("", model_config.model_type, model_type, task, quant.kind, experts))
    error = method.get_error(spec, model_config, model_type, task, quant.kind)
    if error is not None:
        raise ConfigError(f"--method {spec.kind}: {error}")
    uses_rollback = train.on_nonfinite == "rollback" or train.spike_factor is not None
    if uses_rollback and method.changes_shape:
        raise ConfigError(
            f"--method {spec.kind} changes its shape during a run and cannot roll back to a "
            f"checkpoint. Use --on-nonfinite skip, without --spike-factor."
        )


def resolve_precision(method: MethodConfig, requested: str, device: str, model_type: str) -> Choice:
    """Returns the compute dtype for `requested` (`--dtype`); ConfigError if it is not supported."""
    info = METHODS[method.kind]
    required = info.initialization.required_dtype(method, requested)
    return required or select_dtype(
        requested, device, model_type, float32_weights=not info.is_adapter
    )
