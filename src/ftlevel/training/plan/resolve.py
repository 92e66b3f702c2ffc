"""Resolve a configuration into a run: model, task, rows, targets, schedule.

Every error that can be detected without weights is raised here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from ftlevel.config import (
    DataConfig,
    ModelConfig,
    OutputConfig,
    QuantConfig,
    TrainConfig,
    TrainerConfig,
)
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.data.encoding.collate import ensure_pad_token, separate_pad_from_eos
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, Progress, ignore_progress
from ftlevel.data.prepare.loading import read_dataset
from ftlevel.data.sources.lines import CHUNK_ROWS
from ftlevel.data.sources.table import Table
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.intervals import check_metrics, should_generate
from ftlevel.fast.plan import fused_lora_choices, plan_fast
from ftlevel.methods.rates import RateInputs
from ftlevel.models.hardware import select_device, select_tf32, select_threads
from ftlevel.models.kinds import max_positions, model_kind, width_of
from ftlevel.models.loading import (
    build_task_model,
    get_new_heads,
    label_overrides,
    load_config,
    load_tokenizer,
)
from ftlevel.models.module_tree import ModuleTree
from ftlevel.models.quantization import get_quantization_config, quantization_name
from ftlevel.models.sources import ModelSource, check_revision, resolve_source
from ftlevel.models.upstream.libraries import get_outdated_libraries
from ftlevel.objectives import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.training.best import resolve_best_model
from ftlevel.training.plan.adapter import check_adapter_matches
from ftlevel.training.plan.method import (
    check_method,
    resolve_experts,
    resolve_method_targets,
    resolve_precision,
    resolve_quantization,
)
from ftlevel.training.plan.run import (
    PlannedModel,
    Run,
    StartingAdapter,
    method_choices,
    model_choice,
)
from ftlevel.training.plan.schedule import (
    check_schedule,
    count_steps,
    count_steps_per_epoch,
    get_length_bounds,
    resolve_rates,
    resolve_training_loss,
    rows_per_epoch,
)


@dataclass(frozen=True)
class _BaseModel:
    """Properties of the base model, resolved before rows are read; `choices` are lines to print."""

    source: ModelSource
    config: Any
    kind: str
    auto_class: str
    device: Choice
    dtype: Choice
    quant: QuantConfig
    tokenizer: Any
    choices: list[Choice]


_SYNTHETIC = "synthetic rows"
_MAX_LENGTH = 1024
"""Tokens per row, if neither --max-length nor the model sets a lower limit."""

_NO_TOKENIZER = {
    **dict.fromkeys(("pad_token_id", "eos_token_id"), 0),
    **dict.fromkeys(("pad_token", "eos_token"), ""),
    **dict.fromkeys(("bos_token_id", "chat_template")),
}


@dataclass(frozen=True)
class SyntheticBatch:
    """Substitutes for parts of a run; None for a part means the real one.

    Attributes:
        source: the model; its weights are not read and may be missing.
        device: it need not exist, as nothing is placed on it.
        tokenizer: has padding id 0 if the model has none.
        num_rows: number of random rows of maximum length; 0 for the real data.
    """

    source: ModelSource | None = None
    device: Choice | None = None
    tokenizer: Any = None
    num_rows: int = 0

    @classmethod
    def of(
        cls, source: ModelSource, card: str | None, num_rows: int, tokenizer: Any = None
    ) -> SyntheticBatch:
        """Returns substitutes for a GPU named `card`; None for this machine's device."""
        device = None if card is None else Choice("device", "cuda", f"planned for {card}")
        if num_rows and tokenizer is None:
            try:
                tokenizer = load_tokenizer(source)
            except InputError:
                tokenizer = SimpleNamespace(**_NO_TOKENIZER, name_or_path=source.name)
        return cls(source, device, tokenizer, num_rows)

    def create_data(self, task: BaseTask, data: DataConfig, model_config: Any) -> PreparedData:
        """Returns the random rows as the data of a run."""
        positions, count = max_positions(model_config) or _MAX_LENGTH, self.num_rows
        default = min(_MAX_LENGTH, positions)
        length = data.max_length if isinstance(data.max_length, int) else default
        vocab_size, draw = model_config.get_text_config().vocab_size, random.Random(0)
        rows = [
            task.synthetic_row([draw.randrange(3, vocab_size) for _ in range(length)], row)
            for row in range(count)
        ]
        info = {
            "name": _SYNTHETIC,
            "train_rows": count,
            "labels": list(task.synthetic_labels),
            "problem_type": None,
            "overlong": data.overlong,
            "fingerprint": "",
            "target_language": None,
            "tokens": count * length,
            "supervised": sum(row.supervised for row in rows),
            **task.synthetic_info,
        }
        text = f"synthetic, {length:,} tokens each"
        choices = [Choice("rows", text, "no --dataset: all as long as --max-length")]
        return PreparedData(rows, [], None, length, Table([], [], _SYNTHETIC, "row"), info, choices)


def resolve(
    config: TrainConfig,
    *,
    lenient: bool = False,
    progress: Progress = ignore_progress,
    why_task: str = "",
    adapter: StartingAdapter | None = None,
    synthetic: SyntheticBatch | None = None,
) -> Run:
    """Returns the run of `config`: model, rows, task, targets and schedule, without weights.

    Args:
        config: configuration of the run.
        lenient: report rows that would stop a run instead of raising, as for a preview.
        progress: callback with the number of encoded examples.
        why_task: reason for an inferred task.
        adapter: adapter to continue from, already applied to `config`.
        synthetic: substitutes used by an estimate.

    Raises:
        ConfigError: the first problem found; nothing was loaded or written.
    """
    method, train, is_estimate = config.method, config.train, synthetic is not None
    synthetic = synthetic or SyntheticBatch()
    task = TASKS[config.task].configured(config.task_options)
    base = _load_model_info(config, task, synthetic)
    device, dtype, quant = base.device.value, base.dtype.value, base.quant.kind
    task, task_choices = task.for_model(
        base.source, base.kind, width_of(base.config), base.tokenizer, train.rows_per_step
    )
    if synthetic.num_rows:
        data = synthetic.create_data(task, config.data, base.config)
    else:
        memory_device = "cpu" if synthetic.device else device
        bounds = get_length_bounds(method, quant, train, base.config, memory_device, dtype)
        vocab_size = base.config.get_text_config().vocab_size
        context = EncodingContext(
            task, base.kind, base.tokenizer, vocab_size, bounds, train.seed, lenient
        )
        data = prepare_data(config.data, context, progress)
    model_config = _load_task_config(base.source, data.info, base.tokenizer, task)
    layers = _disable_layerdrop(model_config)
    if not task.uses_dropout:
        layers += _disable_dropout(model_config)
    meta = build_task_model(model_config, base.auto_class)
    _check_checkpointing(train, meta, device)
    model = _plan_model(base, model_config, meta, task, has_adapter=adapter is not None)
    targets = resolve_method_targets(method, meta, base.source.name, quant)
    objective = task.create_objective(base.kind, data.info)
    if config.distillation.teacher is not None:
        objective = objective.with_teacher(config.distillation)
    uses_generation = should_generate(train.predict_with_generate, task)
    check_metrics(
        train.metrics, task, objective, generates=uses_generation, how="--predict-with-generate"
    )
    loss, loss_choices = resolve_training_loss(train, objective, data.info["labels"], data.train)
    epoch_rows = rows_per_epoch(train, config.task_section.steps_per_batch, data)
    steps = count_steps(train, epoch_rows)
    info = _get_rate_info(model, meta, objective, steps)
    factor, source = config.task_section.get_rate_factor(method.kind, base.kind, info.size)
    rates = resolve_rates(method, train, info, factor, source)
    check_schedule(train, rates.base.value, steps, len(data.validation))
    steps_per_epoch = count_steps_per_epoch(train, epoch_rows)
    best = resolve_best_model(
        method, train, task, objective, len(data.validation), steps, steps_per_epoch
    )
    fast = plan_fast(config, meta, base.kind, objective, device, data.train, data.max_length)
    is_quantized = get_quantization_config(base.config) is not None
    run = Run(
        config=config,
        task=task,
        objective=objective,
        loss=loss,
        model=model,
        data=data,
        targets=targets,
        schedule=rates.schedule(steps, steps_per_epoch),
        fast=fast,
        best=best,
        adapter=adapter,
        choices=[
            model_choice(config.model, model.family, model.total_parameters, base.source),
            Choice("task", task.name, why_task),
            *task_choices,
            *([adapter.choice] if adapter else []),
            *data.choices,
            base.device,
            *([select_threads()] if device == "cpu" else []),
            base.dtype,
            *select_tf32(train.tf32, device, dtype),
            *method_choices(method, base.quant, train, is_quantized),
            *fused_lora_choices(method, config.speed, quant, device),
            *targets.choices(getattr(method, "target_modules", None)),
            *([Choice("heads", ", ".join(model.heads), task.head_message)] if model.heads else []),
            *base.choices,
            *layers,
            *loss_choices,
            *rates.choices,
            *([best.choice] if best else []),
            *fast.choices,
        ],
    )
    if not (lenient or is_estimate):
        run = run.hooks.open_run(run)
    if adapter is not None:
        check_adapter_matches(adapter, run)
    return run


def _load_model_info(config: TrainConfig, task: BaseTask, synthetic: SyntheticBatch) -> _BaseModel:
    model = config.model
    source = synthetic.source or resolve_source(
        model.name_or_path, model.revision, model.trust_remote_code
    )
    check_revision(source, model.revision)
    model_config = load_config(source)
    model_kind_name = model_kind(model_config)
    device = synthetic.device or select_device(model.device)
    method, train = config.method, config.train
    quant = resolve_quantization(config.quant, method, model_config, source, device.value)
    try:
        check_method(method, train, task.name, quant, model_config, model_kind_name)
    except ConfigError as error:
        if (stored := get_quantization_config(model_config)) is None:
            raise
        already = f"--model {source.name} is quantized already ({quantization_name(stored)})."
        raise ConfigError([f"{already} {problem}" for problem in error.problems]) from None
    auto_class = task.auto_class(model_kind_name, model_config.model_type)
    quant, experts = resolve_experts(quant, method, model_config, auto_class)
    dtype = resolve_precision(method, model.dtype, device.value, model_config.model_type)
    tokenizer = synthetic.tokenizer or load_tokenizer(source)
    template = set_chat_template(tokenizer, config.data.chat_template)
    padding = ensure_pad_token(tokenizer)
    padding = (separate_pad_from_eos(tokenizer) if task.separates_padding else None) or padding
    tokenizer_choice = task.prepare_tokenizer(tokenizer, model_kind_name)
    choices = [choice for choice in (experts, template, padding, tokenizer_choice) if choice]
    return _BaseModel(
        source, model_config, model_kind_name, auto_class, device, dtype, quant, tokenizer, choices
    )


def _plan_model(
    base: _BaseModel, model_config: Any, meta: Any, task: BaseTask, *, has_adapter: bool
) -> PlannedModel:
    heads, new_modules = task.get_heads(meta, base.source)
    return PlannedModel(
        source=base.source,
        kind=base.kind,
        auto_class=base.auto_class,
        config=model_config,
        tokenizer=base.tokenizer,
        device=base.device.value,
        dtype=base.dtype.value,
        quant=base.quant,
        heads=heads,
        new_modules=new_modules,
        new_heads=[] if has_adapter else get_new_heads(meta, base.source, heads),
        total_parameters=sum(p.numel() for p in meta.parameters()),
        unused=[*task.get_unused_modules(meta), *ModuleTree(meta).uncalled],
    )


def _get_rate_info(model: PlannedModel, meta: Any, objective: Objective, steps: int) -> RateInputs:
    parameters = [p for head in model.new_heads for p in meta.get_submodule(head).parameters()]
    matrices = sum(parameter.dim() > 1 for parameter in parameters)
    return RateInputs(
        model.kind,
        width_of(model.config),
        new_head=matrices > 0,
        steps=steps,
        deep_head=matrices > 1,
        token_head=matrices > 0 and objective.per_token,
    )


def _disable_layerdrop(model_config: Any) -> list[Choice]:
    """Disable LayerDrop in `model_config` (modified): skipped layers give adapters no gradient."""
    names = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    values = {name: getattr(model_config, name, 0.0) for name in names}
    return _set_to_zero(model_config, values, "layers", "none is skipped")


def _disable_dropout(model_config: Any) -> list[Choice]:
    """Disable all dropout in `model_config` (modified), for models trained on their own samples."""
    config = model_config.get_text_config()
    values = {n: v for n, v in config.to_dict().items() if isinstance(v, float) and "drop" in n}
    return _set_to_zero(config, values, "dropout", "off")


def _set_to_zero(config: Any, values: Mapping[str, float], name: str, text: str) -> list[Choice]:
    """Set fields of `config` with positive `values` to 0; returns [Choice(name, text)] if any."""
    positive = {field: value for field, value in values.items() if value and value > 0}
    for field in positive:
        setattr(config, field, 0.0)
    was = ", ".join(f"{field} {value:g}" for field, value in positive.items())
    return [Choice(name, text, f"the model has {was}")] if positive else []


def _check_checkpointing(train: TrainerConfig, model: Any, device: str) -> None:
    if train.offload_activations and device != "cuda":
        raise ConfigError(
            f"--offload-activations needs a GPU, and the device is {device}. Use "
            f"--gradient-checkpointing."
        )
    if train.recomputes and not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"--gradient-checkpointing cannot be used with {model.config.model_type}: transformers "
            "has none for it. Drop it; a smaller --per-device-train-batch-size with "
            "--gradient-accumulation-steps needs less memory too."
        )


def _load_task_config(
    source: ModelSource, data_info: Mapping[str, Any], tokenizer: Any, task: BaseTask
) -> Any:
    overrides: dict[str, Any] = {}
    if data_info["problem_type"]:
        overrides |= {"problem_type": data_info["problem_type"], "num_labels": 1}  # regression
    if data_info["labels"]:
        overrides |= label_overrides(data_info["labels"])
    config = load_config(source, **overrides)
    if (
        task.separates_padding or getattr(config, "pad_token_id", None) is None
    ):  # CodeGen's config has no pad_token_id
        config.pad_token_id = tokenizer.pad_token_id
    return config


_ENCODER_TASKS = ("text-classification", "token-classification", "question-answering", "masked-lm")
"""Encoder tasks, those with the most required columns first. Plain column names are tried before
the user's `--map`, which may rename columns for any task."""


def infer_task(config: TrainConfig) -> tuple[TrainConfig, str]:
    """Returns `config` with the task inferred from model and columns, and an explanation.

    Only for an encoder, if neither task nor built-in data is set; else the explanation is empty.
    ConfigError if the task contradicts other settings, InputError if the columns match no task.
    """
    model, data = config.model, config.data
    if "task" in config.model_fields_set or data.dataset.startswith("builtin:"):
        return config, ""
    source = resolve_source(model.name_or_path, model.revision, model.trust_remote_code)
    if model_kind(load_config(source)) != "encoder":
        return config, ""
    table = read_dataset(data.dataset, data, data.split).train
    by_name = data.model_copy(update={"columns": {}})
    errors: dict[str, InputError] = {}
    for name, section in ((n, s) for s in (by_name, data) for n in _ENCODER_TASKS):
        try:
            format_ = TASKS[name].get_format(table.column_names, section, table.rows[:CHUNK_ROWS])
        except InputError as error:
            errors[name] = error
            continue
        message = (
            f"the model is an encoder, and the columns are {format_.name}; --task names another"
        )
        return config.with_sections(task=name), message
    try:
        TASKS[config.task].get_format(table.column_names, data, table.rows[:CHUNK_ROWS])
    except InputError:
        raise InputError(
            f"--model {model.name_or_path} is an encoder, and the columns match none of its "
            f"tasks. {errors[_ENCODER_TASKS[0]]}"
        ) from None
    return config, ""


def check_packages(model: ModelConfig, output: OutputConfig) -> None:
    """Reject outdated libraries and options whose package is missing. Raises ConfigError."""
    errors = get_outdated_libraries()
    for tracker in output.report_to:
        if not find_spec(tracker):
            errors.append(
                f"--report-to {tracker} needs the package {tracker}, which is not installed. "
                f'pip install "ftlevel[{tracker}]", or drop it.'
            )
    if model.attn_implementation == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            errors.append(
                "model.attn_implementation flash_attention_2 needs a CUDA device and the package "
                "flash-attn. Use sdpa or auto."
            )
    if errors:
        raise ConfigError(errors)
