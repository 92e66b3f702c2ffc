"""`ModelRef` describes a model before its weights load; `LoadedModel` is the model with weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.paths import load_run_config
from ftlevel.artifacts.run_directory import CHECKPOINTS
from ftlevel.config import DataConfig, TrainConfig, build_config
from ftlevel.data.encoding.collate import ensure_pad_token, separate_pad_from_eos
from ftlevel.data.encoding.prompts import PromptFormat, load_prompt_format
from ftlevel.data.formats.labels import are_default_names
from ftlevel.errors import InputError, join_names
from ftlevel.models.hardware import DTYPES, evaluating
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import (
    build_task_model,
    check_missing,
    get_new_heads,
    label_overrides,
    load_config,
    load_model,
    load_tokenizer,
)
from ftlevel.models.module_tree import get_heads
from ftlevel.models.quantization import (
    build_quantization_config,
    check_loadable,
    get_quant_config,
    get_quantization_config,
)
from ftlevel.models.sources import ModelSource
from ftlevel.objectives import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import check_runs_on_cpu, load_adapter
from ftlevel.trained.generation import GenerationOptions, generate_texts

PLAIN = "none"
"""Method name of a model without an adapter."""


@dataclass(frozen=True)
class ModelRef:
    """A run, checkpoint, adapter or model, before weights are loaded.

    Attributes:
        source: the base model of an adapter, or the model itself.
        directory: directory of the adapter; None for a model without one.
        card: training settings, derived from the files if ftlevel did not train it. Its
            quantization is that of the loaded weights.
        is_ours: whether ftlevel wrote the model, so that it has an ftlevel.json.
    """

    source: ModelSource
    directory: Path | None
    card: AdapterCard
    run: Path | None = None
    notes: list[str] = field(default_factory=list)
    is_prequantized: bool = False
    is_ours: bool = True

    @property
    def kind(self) -> str:
        """One of run, checkpoint, adapter (ftlevel's), peft, model, quantized, hub, gguf."""
        if self.run is not None:
            path = self.directory or Path(self.source.name)
            return "checkpoint" if path.absolute().parent.name == CHECKPOINTS else "run"
        if self.directory is not None:
            return "adapter" if self.is_ours else "peft"
        if self.source.kind in ("hub", "gguf"):
            return self.source.kind
        return "quantized" if self.is_prequantized else "model"

    @property
    def task(self) -> str:
        """Name of the task, as for `--task`."""
        return self.card.task

    @property
    def base(self) -> str:
        """Name of the base model; for a model without an adapter, its own name."""
        return self.source.name

    @property
    def quantization(self) -> Mapping[str, Any]:
        """Quantization of the loaded weights: a dict of `kind` and its settings."""
        return self.card.quantization

    @property
    def labels(self) -> list[str]:
        """Class or tag names by index; empty if there are none."""
        return self.card.labels

    @property
    def prompt_format(self) -> PromptFormat | None:
        """Format of the prompts; None if the task has no prompts."""
        return load_prompt_format(self.card)

    @property
    def adapter_path(self) -> Path:
        """Directory of the adapter; raises TypeError for a model without one."""
        if self.directory is None:
            raise TypeError("an adapter has a directory")
        return self.directory

    @property
    def options(self) -> Mapping[str, Any]:
        """Task options of the card; of a merged model, without those that need its base."""
        return self._options[0]

    @property
    def _options(self) -> tuple[Mapping[str, Any], str]:
        task, options = TASKS.get(self.task), self.card.options
        return task.merged_options(options) if task and self.card.merge else (options, "")

    @cached_property
    def configured_task(self) -> BaseTask:
        """The task, configured with the options of training; raises InputError if it is unknown."""
        if (task := TASKS.get(self.task)) is None:
            raise InputError(
                f"{self.directory or self.base}: its task {self.task!r} is not installed. Expected "
                f"{join_names(TASKS)}. Install the package that adds it."
            )
        return task.configured(self.options)

    @cached_property
    def run_config(self) -> TrainConfig:
        """The run's configuration; without a run, defaults with the card's columns and overlong."""
        if self.run is not None:
            return build_config([load_run_config(self.run)], runs=False)
        card = self.card.data
        data = DataConfig(columns=card.get("columns", {}), overlong=card.get("overlong", "error"))
        return TrainConfig().model_copy(update={"data": data})

    @cached_property
    def model_config(self) -> Any:
        """Config of the base, with the head and the padding token of training."""
        overrides = label_overrides(self.labels) if self.labels else {}
        if problem := self.card.options.get("problem_type"):
            overrides["problem_type"] = problem
            overrides.setdefault("num_labels", 1)
        config = load_config(self.source, **overrides)
        task = self.configured_task
        has_none = getattr(config, "pad_token_id", None) is None  # CodeGen's config lacks the field
        if task.separates_padding or (has_none and task.finds_ends_by_padding):
            config.pad_token_id = self.load_tokenizer().pad_token_id
        return config

    @property
    def model_kind(self) -> str:
        """`encoder`, `decoder` or `encoder-decoder`."""
        return model_kind(self.model_config)

    @property
    def auto_class(self) -> str:
        """Name of the transformers auto class for the task, such as `AutoModelForCausalLM`."""
        return self.configured_task.auto_class(self.model_kind, self.model_config.model_type)

    @cached_property
    def objective(self) -> Objective:
        """Training objective of the task."""
        labels = {"labels": self.labels, **self.options}
        return self.configured_task.create_objective(self.model_kind, labels)

    @property
    def tokenizer_source(self) -> ModelSource:
        """Source of the tokenizer: the adapter's directory, or the base."""
        return get_tokenizer_source(self.source, self.directory)

    def load_tokenizer(self) -> Any:
        """Load the tokenizer as saved."""
        return load_tokenizer(self.tokenizer_source)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer with a padding token, changed as the task requires."""
        tokenizer = self.load_tokenizer()
        ensure_pad_token(tokenizer)
        if self.configured_task.separates_padding:
            separate_pad_from_eos(tokenizer)
        self.configured_task.prepare_tokenizer(tokenizer, self.model_kind)
        return tokenizer

    def check_head(self) -> None:
        """Raise InputError if a local checkpoint without adapter has no trained head."""
        is_remote = self.source.kind == "hub" and not self.source.local_files_only
        if self.card.method == PLAIN and self.configured_task.has_new_head and not is_remote:
            meta = build_task_model(self.model_config, self.auto_class)
            heads = get_heads(meta)
            missing = get_new_heads(meta, self.source, heads)
            _check_trained_head(missing, heads, self.source.name, self.task)

    def compute_dtype(self, device: str) -> str:
        """Returns the compute dtype of training; on the CPU, float32 instead of float16."""
        return "float32" if self.card.dtype == "float16" and device == "cpu" else self.card.dtype

    def with_card(self, **changes: Any) -> ModelRef:
        """Returns a copy with the card's fields in `changes` replaced."""
        return replace(self, card=replace(self.card, **changes))

    def with_labels(self, names: Sequence[str]) -> ModelRef:
        """Returns a copy whose classes are called `names`, for a model without names.

        Without `names`, returns the model itself. Raises InputError if it has names already, or
        another number of classes.
        """
        if not names or self.labels == list(names):
            return self
        message = f"--labels {','.join(names)}: {self.directory or self.base}"
        if not are_default_names(self.labels):
            has = f"has the classes {join_names(self.labels)}" if self.labels else "has no classes"
            raise InputError(f"{message} {has}. Drop --labels.")
        if len(names) != len(self.labels):
            raise InputError(f"{message} has {len(self.labels)} classes. Name all in order.")
        return self.with_card(labels=list(names))

    def load(
        self,
        device: str,
        dtype: str | None = None,
        *,
        adapter_name: str = "default",
        dequantize: bool = False,
    ) -> LoadedModel:
        """Load weights, adapter and tokenizer.

        `dtype` is the compute precision, by default that of training; `adapter_name` is the name in
        PEFT. With `dequantize`, matrix products of a quantized base run in floating point. Raises
        InputError if files are corrupted or do not belong together, or there is no trained head.
        """
        card, task, source = self.card, self.configured_task, self.source
        config, notes = copy.deepcopy(self.model_config), list(self.notes)
        notes += filter(None, [self._options[1]])
        if (stored := get_quantization_config(config)) is not None:
            check_loadable(stored, source.label, device)
        if self.directory is not None and device == "cpu":
            check_runs_on_cpu(self.directory)
        tokenizer = self.tokenizer
        if task.separates_padding or getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        if dtype is None:
            dtype = self.compute_dtype(device)
            if dtype != card.dtype:
                notes.append("trained in float16; the CPU computes it in float32")
        is_quantized = card.quantization.get("kind", "none") != "none"
        is_full = card.method == "full" and not card.merge and not is_quantized
        model, missing = load_model(
            source,
            config,
            self.auto_class,
            dtype=DTYPES["float32" if is_full else dtype],
            device=device,
            quantization=build_quantization_config(
                get_quant_config(card.quantization), DTYPES[dtype], card.heads
            ),
        )
        if card.method == PLAIN and task.has_new_head:
            _check_trained_head(missing, get_heads(model), source.name, task.name)
        # A new language head has an untrained bias, which stays zero.
        new = [*card.heads, *get_heads(model)] if card.heads and self.directory else []
        check_missing(missing, [*new, *task.get_unused_modules(model)], source.label)
        if dequantize:
            model = model.dequantize()
        if self.directory is not None:
            model = load_adapter(model, self.directory, adapter_name)
        return LoadedModel(self, model.eval(), tokenizer, device, dtype, notes, adapter_name)


def get_tokenizer_source(source: ModelSource, adapter_dir: Path | None) -> ModelSource:
    """Returns the source of the tokenizer: `adapter_dir` if it has one, else the base `source`."""
    if adapter_dir is None or not (adapter_dir / "tokenizer_config.json").is_file():
        return source
    return ModelSource(str(adapter_dir), "directory", str(adapter_dir))


def _check_trained_head(missing: Sequence[str], heads: Sequence[str], name: str, task: str) -> None:
    untrained = [key for key in missing if any(f"{key}.".startswith(f"{head}.") for head in heads)]
    if untrained:
        raise InputError(
            f"{name} has no trained head for --task {task} ({untrained[0]} is missing). Name a "
            f"model or a run that was trained for it: ftlevel train --task {task} --model {name} …"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A `ModelRef` with its weights, in eval mode, and a tokenizer with a padding token.

    `model` is a PeftModel if there is an adapter, whose name in PEFT is `adapter_name`.
    """

    ref: ModelRef
    model: Any
    tokenizer: Any
    device: str
    dtype: str
    notes: list[str]
    adapter_name: str

    @property
    def task(self) -> BaseTask:
        """The task, configured with the options of training."""
        return self.ref.configured_task

    @property
    def kind(self) -> str:
        """`encoder`, `decoder` or `encoder-decoder`."""
        return self.ref.model_kind

    @property
    def objective(self) -> Objective:
        """Training objective of the task."""
        return self.ref.objective

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter that can be disabled to use the base."""
        return hasattr(self.model, "peft_config")

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Disable the adapter inside the `with` block, so that the model is the base."""
        with self.model.disable_adapter():
            yield

    def inference(self) -> AbstractContextManager[None]:
        """Disable gradients and use the compute precision inside the `with` block."""
        return evaluating(self.model, self.device, self.dtype)

    def logits(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the objective's logits of a padded batch on `device`; call it in `inference`."""
        inputs, _ = self.objective.split(batch)
        return self.objective.logits(self.model(**inputs))

    def generate(
        self, prompts: Sequence[list[int]], options: GenerationOptions, batch_size: int
    ) -> list[str]:
        """Returns the generated text for each prompt; call it in `inference`."""
        return generate_texts(self.model, self.tokenizer, prompts, self.device, batch_size, options)
