"""Turn a configuration into facts: what will be loaded, on what, with which targets.

Everything that can be wrong before weights are read is found here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ftlevel.config import DEFAULT_MODEL, LoraSpec, MethodConfig, QuantConfig, TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.config.methods import default_learning_rate
from ftlevel.config.methods.lora import INSIDE_BASE
from ftlevel.data.encoding.chat_templates import choose_chat_template
from ftlevel.data.encoding.pad_token import choose_pad_token
from ftlevel.data.prepare.context import EncodingContext, Prepared
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.parallel import Progress, be_silent
from ftlevel.errors import ConfigError
from ftlevel.fast.plan.fast_plan import FastPlan, plan_fast
from ftlevel.fast.plan.fused_lora import fused_lora_choices
from ftlevel.fast.plan.liger import kernel_choices
from ftlevel.methods import METHODS
from ftlevel.methods.matrix import Cell, check_supported
from ftlevel.models.families import lookup_family
from ftlevel.models.hardware import choose_device, choose_dtype
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import (
    build_task_model,
    label_overrides,
    load_config,
    load_tokenizer,
)
from ftlevel.models.quantized import (
    quantization_name,
    settle_quantization,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource, check_revision, resolve_source
from ftlevel.models.threads import choose_threads
from ftlevel.task import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.training.plan.bounds import find_bounds
from ftlevel.training.plan.method_targets import find_method_targets


@dataclass(frozen=True)
class Plan:
    """A run, before its weights are loaded.

    Attributes:
        source: where the model is.
        task: the task.
        kind: kind of the model.
        auto_class: transformers' class for the task.
        model_config: the model's config, with labels and padding for the task.
        tokenizer: the model's, with a padding token.
        device: torch device type.
        dtype: compute precision's name.
        quant: how the base is quantized, by the user's wish or in its checkpoint.
        objective: what the model is trained on.
        heads: modules trained in full.
        new_modules: where weights may be that the checkpoint lacks.
        targets: full names of the modules that get an update.
        parameters: ends of names of the tensors that get one beside them.
        fan_in_fan_out: whether these are Conv1D.
        sizes: target → (in, out), of those that are linears.
        total_parameters: how many the base has.
        learning_rate: the user's or the method's.
        data: encoded rows.
        fast: the parts of the fast step that are used.
        choices: lines for the screen, in order.
    """

    source: ModelSource
    task: BaseTask
    kind: str
    auto_class: str
    model_config: Any
    tokenizer: Any
    device: str
    dtype: str
    quant: QuantConfig
    objective: Objective
    heads: list[str]
    new_modules: list[str]
    targets: list[str]
    parameters: list[str]
    fan_in_fan_out: bool
    sizes: Mapping[str, tuple[int, int]]
    total_parameters: int
    learning_rate: float
    data: Prepared
    fast: FastPlan
    choices: list[Choice]


def resolve(config: TrainConfig, *, lenient: bool = False, progress: Progress = be_silent) -> Plan:
    """Resolve `config`.

    Args:
        config: the whole configuration.
        lenient: report rows that ought to stop the run, as a preview does.
        progress: told how many examples are encoded.

    Raises:
        ConfigError: with the first problem found; nothing was loaded or written.
    """
    task = TASKS[config.task]
    source = resolve_source(
        config.model.name_or_path, config.model.revision, config.model.trust_remote_code
    )
    check_revision(source, config.model.revision)
    bare = load_config(source)
    kind = model_kind(bare)
    device = choose_device(config.model.device)
    config = _settle_quantization(config, bare, source, device.value)
    _check_method(config, bare, kind)
    auto_class = task.auto_class(kind, bare.model_type)
    dtype = _dtype(config, device.value, bare.model_type)
    tokenizer = load_tokenizer(source)
    template = choose_chat_template(tokenizer, config.data.chat_template)
    pad = choose_pad_token(tokenizer)
    bounds = find_bounds(config, bare, device.value, dtype.value)
    vocabulary = bare.get_text_config().vocab_size
    context = EncodingContext(task, kind, tokenizer, vocabulary, bounds, config.train.seed, lenient)
    data = prepare_data(config.data, context, progress)
    model_config = _task_config(source, data.facts, tokenizer)
    layers = _keep_every_layer(model_config)
    meta = build_task_model(model_config, auto_class)
    _check_checkpointing(config, meta)
    heads, new_modules = task.find_heads(meta, source)
    adapted = find_method_targets(config.method, meta, source.name, config.quant.kind)
    objective = task.build_objective(kind, data.facts)
    learning_rate = _learning_rate(config, source)
    threads = [choose_threads()] if device.value == "cpu" else []
    fast = plan_fast(config, meta, kind, objective, device.value, data.train, data.max_length)
    total = sum(p.numel() for p in meta.parameters())
    choices = [
        _model_choice(config, model_config.model_type, total, source),
        Choice("task", task.name),
        *data.choices,
        device,
        *threads,
        dtype,
        *_method_choices(config, stored_quantization(bare) is not None),
        *fused_lora_choices(config, device.value),
        *kernel_choices(config, device.value, bare.model_type),
        *adapted.choices(getattr(config.method, "target_modules", None)),
        *_head_choices(task, heads),
        *filter(None, (template, pad)),
        *layers,
        learning_rate,
        *fast.choices,
    ]
    return Plan(
        source, task, kind, auto_class, model_config, tokenizer, device.value, dtype.value,
        config.quant, objective, heads, new_modules, adapted.modules, adapted.parameters,
        adapted.fan_in_fan_out, adapted.sizes, total, learning_rate.value, data, fast, choices,
    )  # fmt: skip


def _settle_quantization(
    config: TrainConfig, bare: Any, source: ModelSource, device: str
) -> TrainConfig:
    """Return `config` with the quantization that the base has, whoever made it.

    Raises:
        ConfigError: the checkpoint is quantized, and the method or --quant does not go with that.
    """
    stored = stored_quantization(bare)
    if stored is None:
        return config
    quant = settle_quantization(stored, config.quant, source.words, device)
    method, form = config.method, quantization_name(stored)
    plain = isinstance(method, LoraSpec) and method.init_lora_weights in ("default", "gaussian")
    if quant.kind == "none" and not plain:
        raise ConfigError(
            f"--model {source.name} is quantized by {form}, and on such weights PEFT has --method "
            "lora alone. Use --method lora, or give the original model with --quant 4bit."
        )
    if isinstance(method, LoraSpec) and method.init_lora_weights == "loftq":
        raise ConfigError(
            f"--init loftq begins at what quantization took from the weights, and --model "
            f"{source.name} is quantized already ({form}). Give the original model with --quant "
            "4bit, or use --init default."
        )
    settled = config.model_copy(update={"quant": quant})
    try:
        _check_method(settled, bare, model_kind(bare))
    except ConfigError as error:
        already = f"--model {source.name} is quantized already ({form})."
        raise ConfigError([f"{already} {problem}" for problem in error.problems]) from None
    return settled


def _head_choices(task: BaseTask, heads: list[str]) -> list[Choice]:
    return [Choice("heads", ", ".join(heads), task.why_heads)] if heads else []


def _check_method(config: TrainConfig, model_config: Any, kind: str) -> None:
    """Refuse a method that cannot be used on the model, for the task or on the quantization.

    Raises:
        ConfigError: with the reason, and what works.
    """
    family, quant = lookup_family(model_config.model_type), config.quant.kind
    experts = bool(family.target_parameters) if family else None
    base = Cell("", model_config.model_type, kind, config.task, quant, experts)
    check_supported(config.method, base)
    method = METHODS.get(config.method.kind)
    if method is None or method.refuse is None:
        return
    reason = method.refuse(config.method, model_config, kind, config.task, config.quant.kind)
    if reason is not None:
        raise ConfigError(f"--method {config.method.kind}: {reason}")


def _keep_every_layer(model_config: Any) -> list[Choice]:
    """Switch off the random skipping of whole layers (mutated), and say so.

    What is trained in a layer that a step skips gets no gradient in it, which could not be told
    from an adapter that is dead.
    """
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    shares = {name: share for name in names if (share := getattr(model_config, name, 0.0))}
    for name in shares:
        setattr(model_config, name, 0.0)
    was = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    return [Choice("layers", "none is skipped", f"the model has {was}")] if shares else []


def _check_checkpointing(config: TrainConfig, model: Any) -> None:
    """Refuse --gradient-checkpointing where transformers has none for the model.

    Raises:
        ConfigError: it cannot be had.
    """
    if config.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"--gradient-checkpointing cannot be used with {model.config.model_type}: transformers "
            "has none for it. Drop it; a smaller --per-device-train-batch-size with "
            "--gradient-accumulation-steps needs less memory too."
        )


def _dtype(config: TrainConfig, device: str, model_type: str) -> Choice:
    """Return the compute precision.

    Raises:
        ConfigError: a LoRA that starts inside the weights, in a precision that would round them.
    """
    init = getattr(config.method, "init_lora_weights", "default")
    if init not in INSIDE_BASE:
        return choose_dtype(config.model.dtype, device, config.method.kind, model_type)
    if config.model.dtype not in ("auto", "float32"):
        raise ConfigError(
            f"--init {init} cannot be used with --dtype {config.model.dtype}: it takes its start "
            "out of the base's weights, what is left is rounded, and the adapter would not be what "
            "was trained. Use --dtype float32, or --init default."
        )
    return Choice("dtype", "float32", f"auto: {init} takes its start out of the weights")


def _learning_rate(config: TrainConfig, source: ModelSource) -> Choice:
    """Return the peak learning rate: the user's, or the method's default.

    The papers' rates are for models a hundred times the size of the built-in one, which learns
    next to nothing at them in a short run; it gets ten times as much where that is below 0.01.
    """
    kind = config.method.kind
    if config.train.learning_rate is not None:
        return Choice("learning rate", config.train.learning_rate)
    rate, reason = default_learning_rate(config.method), f"default for {kind}"
    if source.kind == "builtin" and rate * 10 <= 1e-2:
        return Choice("learning rate", rate * 10, f"{reason}, times 10 for a model this small")
    return Choice("learning rate", rate, reason)


def _task_config(source: ModelSource, facts: Mapping[str, Any], tokenizer: Any) -> Any:
    overrides: dict[str, Any] = {}
    if facts["problem_type"]:
        overrides |= {"problem_type": facts["problem_type"], "num_labels": 1}  # of a quantity
    if facts["labels"]:
        overrides |= label_overrides(facts["labels"])
    config = load_config(source, **overrides)
    if getattr(config, "pad_token_id", None) is None:  # CodeGen's has no such field at all
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _model_choice(config: TrainConfig, model_type: str, total: int, source: ModelSource) -> Choice:
    size = f"{model_type}, {total / 1e6:,.1f} M parameters"
    default = config.model.name_or_path == DEFAULT_MODEL
    return Choice("model", source.name, size + ("; the built-in model" if default else ""))


def _method_choices(config: TrainConfig, quantized_already: bool) -> list[Choice]:
    method, quant, train = config.method, config.quant, config.train
    shown = []
    shown.append(Choice("method", method.kind, _describe(method)))
    if quant.kind != "none":
        origin = "quantized in its checkpoint; " if quantized_already else ""
        shown.append(Choice("base", quant.form, f"{origin}heads kept in float"))
    factors = {"accumulated": train.gradient_accumulation_steps,
               "processes": train.num_processes or 1}  # fmt: skip
    batch = train.per_device_train_batch_size * math.prod(factors.values())
    parts = [f"{number} {name}" for name, number in factors.items() if number > 1]
    reason = " × ".join([str(train.per_device_train_batch_size), *parts]) if parts else ""
    shown.append(Choice("batch", f"{batch} rows a step", reason))
    return shown


def _describe(method: MethodConfig) -> str:
    """Return the settings of a method in a few words."""
    if isinstance(method, LoraSpec):
        init, ratio = method.init_lora_weights, method.lora_plus_ratio
        forms = {
            "rsLoRA": method.use_rslora,
            "DoRA": method.use_dora,
            f"{init} start": init != "default",
            f"LoRA+ with ratio {ratio or 0:g}": ratio is not None,
        }
        detail = f"r {method.r}, alpha {method.lora_alpha:g}, dropout {method.lora_dropout:g}"
        return ", ".join([detail, *(name for name, on in forms.items() if on)])
    if method.kind == "full":
        return "the head is trained" if method.freeze_base else "every weight is trained"
    own = METHODS[method.kind].describe
    if own is not None:
        return own(method)
    fields = method.model_dump(exclude={"kind", "target_modules"})
    return ", ".join(f"{name} {value}" for name, value in fields.items() if value is not None)


def default_name(config: TrainConfig) -> str:
    """Return what a run is called if the user does not say: method, model and data."""
    model = config.model.name_or_path.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    data = config.data.dataset.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    model, data = model.removesuffix(".gguf"), data.partition(".")[0]
    return f"{config.method.kind}-{model}-{data}"
