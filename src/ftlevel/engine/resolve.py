"""Turn a configuration into facts: what will be loaded, on what, with which targets.

Everything that can be wrong before weights are read is found here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftlevel.config import DEFAULT_MODEL, LoraSpec, TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.config.methods import DEFAULT_LEARNING_RATE
from ftlevel.engine.examples import Loaded, Prepared, load_examples, prepare_examples
from ftlevel.engine.pad_token import choose_pad_token
from ftlevel.methods import METHODS
from ftlevel.models.hardware import choose_device, choose_dtype
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import (
    build_task_model,
    checkpoint_tensors,
    label_overrides,
    load_config,
    load_tokenizer,
)
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.targets import (
    find_heads,
    find_new_language_head,
    find_new_poolers,
    lora_parameters,
    resolve_targets,
)
from ftlevel.tasks import TASKS, Task
from ftlevel.tasks.objectives import Objective, build_objective


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
        objective: what the model is trained on.
        heads: modules trained in full.
        new_modules: where weights may be that the checkpoint lacks.
        targets: full names of the modules that get an update.
        fan_in_fan_out: whether these are Conv1D.
        learning_rate: the user's or the method's.
        data: encoded rows.
        choices: lines for the screen, in order.
    """

    source: ModelSource
    task: Task
    kind: str
    auto_class: str
    model_config: Any
    tokenizer: Any
    device: str
    dtype: str
    objective: Objective
    heads: list[str]
    new_modules: list[str]
    targets: list[str]
    fan_in_fan_out: bool
    learning_rate: float
    data: Prepared
    choices: list[Choice]


def resolve(config: TrainConfig) -> Plan:
    """Resolve `config`.

    Raises:
        ConfigError: with the first problem found; nothing was loaded or written.
    """
    task = TASKS[config.task]
    source = resolve_source(
        config.model.name_or_path, config.model.revision, config.model.trust_remote_code
    )
    bare = load_config(source)
    kind = model_kind(bare)
    auto_class = task.auto_class(kind, bare.model_type)
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, device.value, config.method.kind, bare.model_type)
    loaded = load_examples(config.data, task, config.train.seed)
    tokenizer = load_tokenizer(source)
    pad = choose_pad_token(tokenizer)
    model_config = _task_config(source, loaded, tokenizer)
    meta = build_task_model(model_config, auto_class)
    heads, new_modules = _heads(task, meta, source)
    targets, conv1d, target_choices = _targets(config, meta, source)
    data = prepare_examples(
        loaded, config.data, task, kind, tokenizer, model_config, config.train.seed
    )
    objective = build_objective(
        task,
        kind,
        problem_type=loaded.format.problem_type,
        labels=loaded.labels.names if loaded.labels else (),
        unanswerable=loaded.unanswerable,
    )
    learning_rate = config.train.learning_rate or DEFAULT_LEARNING_RATE[config.method.kind]
    choices = [
        _model_choice(config, meta, source),
        Choice("task", task.name),
        *data.choices,
        device,
        dtype,
        *_method_choices(config),
        *target_choices,
        *_head_choices(task, heads),
        *([pad] if pad else []),
        Choice(
            "learning rate",
            f"{learning_rate:g}",
            "" if config.train.learning_rate else f"default for {config.method.kind}",
        ),
    ]
    return Plan(
        source, task, kind, auto_class, model_config, tokenizer, device.value, dtype.value,
        objective, heads, new_modules, targets, conv1d, learning_rate, data, choices,
    )  # fmt: skip


def _heads(task: Task, meta: Any, source: ModelSource) -> tuple[list[str], list[str]]:
    """Return the modules to train in full, and those whose weights a checkpoint may lack."""
    if task.has_new_head:
        tensors = checkpoint_tensors(source)
        poolers = find_new_poolers(meta, tensors) if tensors is not None else []
        heads = [*poolers, *find_heads(meta)]
        return heads, heads
    if task.target == "mask":
        return find_new_language_head(meta)
    return [], []


def _head_choices(task: Task, heads: list[str]) -> list[Choice]:
    if not heads:
        return []
    why = "trained in full and saved"
    if task.target == "mask":
        why = f"the checkpoint has no masked language head: new, {why}"
    return [Choice("heads", ", ".join(heads), why)]


def _task_config(source: ModelSource, loaded: Loaded, tokenizer: Any) -> Any:
    overrides: dict[str, Any] = {}
    if loaded.format.produces == "labelled":
        overrides["problem_type"] = loaded.format.problem_type
        overrides["num_labels"] = 1  # of a quantity
    if loaded.labels is not None:
        overrides |= label_overrides(loaded.labels.names)
    config = load_config(source, **overrides)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _targets(
    config: TrainConfig, meta: Any, source: ModelSource
) -> tuple[list[str], bool, list[Choice]]:
    """Return the resolved targets, whether they are Conv1D, and what to show of them."""
    method = METHODS.get(config.method.kind)
    if method is None:
        return [], False, []
    wish = getattr(config.method, "target_modules", None)
    if method.find_targets is not None and not wish:
        targets = method.find_targets(config.method, meta)
    elif wish:
        targets = resolve_targets(meta, wish, model_name=source.name)
    else:
        return [], False, []
    modules = dict(meta.named_modules())
    kinds = {type(modules[name]).__name__ for name in targets}
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
    shown = f"{', '.join(names)}: {len(targets)} modules"
    reason = "all-linear: every linear of the blocks" if wish == "all-linear" else ""
    return targets, kinds == {"Conv1D"}, [Choice("targets", shown, reason)]


def _model_choice(config: TrainConfig, meta: Any, source: ModelSource) -> Choice:
    parameters = sum(p.numel() for p in meta.parameters())
    size = f"{meta.config.model_type}, {parameters / 1e6:,.1f} M parameters"
    default = config.model.name_or_path == DEFAULT_MODEL
    return Choice("model", source.name, size + ("; the built-in model" if default else ""))


def _method_choices(config: TrainConfig) -> list[Choice]:
    method, quant, train = config.method, config.quant, config.train
    shown = []
    if isinstance(method, LoraSpec):
        forms = [n for n, on in (("rsLoRA", method.use_rslora), ("DoRA", method.use_dora)) if on]
        detail = f"r {method.r}, alpha {method.lora_alpha:g}, dropout {method.lora_dropout:g}"
        shown.append(Choice("method", method.kind, ", ".join([detail, *forms])))
    else:
        shown.append(Choice("method", method.kind, "every weight is trained"))
    if quant.kind == "4bit":
        double = ", double quantization" if quant.double_quant else ""
        shown.append(Choice("base", f"4-bit {quant.quant_type}{double}", "heads kept in float"))
    elif quant.kind == "8bit":
        shown.append(Choice("base", "8-bit LLM.int8()", "heads kept in float"))
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    shown.append(
        Choice(
            "batch",
            f"{batch} rows a step",
            f"{train.per_device_train_batch_size} × {train.gradient_accumulation_steps} accumulated"
            if train.gradient_accumulation_steps > 1
            else "",
        )
    )
    return shown


def default_name(config: TrainConfig) -> str:
    """Return what a run is called if the user does not say: method, model and data."""
    model = config.model.name_or_path.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    data = config.data.dataset.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
    model, data = model.removesuffix(".gguf"), data.partition(".")[0]
    return f"{config.method.kind}-{model}-{data}"


def count_trainable(config: TrainConfig, plan: Plan) -> tuple[int, int]:
    """Return how many parameters are trained and how many the model has, without its weights."""
    meta = build_task_model(plan.model_config, plan.auto_class)
    total = sum(p.numel() for p in meta.parameters())
    if not isinstance(config.method, LoraSpec):
        return total, total
    modules = dict(meta.named_modules())
    trained = sum(p.numel() for head in plan.heads for p in modules[head].parameters())
    for name in plan.targets:
        fan_out, fan_in = modules[name].weight.shape
        trained += lora_parameters(fan_in, fan_out, config.method.r)
        trained += (fan_in if plan.fan_in_fan_out else fan_out) * config.method.use_dora
    return trained, total + trained
