"""Load the model, adapter, tokenizer and task of a `ModelRef`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config.preference import NO_REFERENCE
from ftlevel.data.encoding.collate import ensure_pad_token, separate_pad_from_eos
from ftlevel.data.encoding.encode import PromptFormat
from ftlevel.models.hardware import DTYPES
from ftlevel.models.integrity import check_missing
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import label_overrides, load_config, load_model
from ftlevel.models.quantization import (
    build_quantization_config,
    check_loadable,
    read_quantization,
    stored_quantization,
)
from ftlevel.models.targets import find_heads
from ftlevel.task import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import load_adapter
from ftlevel.trained.model_ref import (
    PLAIN,
    ModelRef,
    check_trained_head,
    compute_dtype,
    load_own_tokenizer,
)


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model in eval mode, with its tokenizer, task and settings of training.

    `model` is a PeftModel if there is an adapter. `max_length` is that of training rows, in tokens.
    """

    model: Any
    tokenizer: Any
    task: BaseTask
    kind: str
    device: str
    dtype: str
    objective: Objective
    max_length: int
    prompt_format: PromptFormat | None
    labels: list[str] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    method: str = ""

    @property
    def has_adapter(self) -> bool:
        """Whether the base can be used by disabling the adapter."""
        return hasattr(self.model, "peft_config")


def load_ref(found: ModelRef, device: str, name: str = "default") -> LoadedModel:
    """Load the model of `found`; `name` is PEFT's name of the adapter.

    Raises InputError if it is damaged, or has no head for the task.
    """
    card, source, directory = found.card, found.source, found.directory
    prompt = found.prompt_format
    options, about_reference = _own_options(card)
    task = TASKS[card.task].configured(options)
    config = load_config(source, **card_overrides(card))
    if (stored := stored_quantization(config)) is not None:
        check_loadable(stored, source.words, device)
    tokenizer = load_own_tokenizer(source, directory)
    ensure_pad_token(tokenizer)
    if task.pads_apart:
        separate_pad_from_eos(tokenizer)
    if (
        task.pads_apart or getattr(config, "pad_token_id", None) is None
    ):  # CodeGen's config lacks the field
        config.pad_token_id = tokenizer.pad_token_id
    kind = model_kind(config)
    dtype, notes = compute_dtype(card, device), [*found.notes, *about_reference]
    if dtype != card.dtype:
        notes.append("trained in float16; the CPU computes it in float32")
    quant = read_quantization(card.quantization)
    whole = (
        card.method == "full" and not card.merge and card.quantization.get("kind", "none") == "none"
    )
    model, missing = load_model(
        source,
        config,
        task.auto_class(kind, config.model_type),
        dtype=DTYPES["float32" if whole else dtype],
        device=device,
        quantization=build_quantization_config(quant, DTYPES[dtype], card.heads),
    )
    if card.method == PLAIN and task.has_new_head:
        check_trained_head(missing, find_heads(model), source.name, task.name)
    # A new language head has an untrained bias, which stays zero.
    new = [*card.heads, *find_heads(model)] if card.heads and directory else []
    check_missing(missing, new, source.words)
    if directory is not None:
        model = load_adapter(model, directory, name)
    objective = task.build_objective(kind, {"labels": card.labels, **options})
    return LoadedModel(
        model.eval(), tokenizer, task, kind, device, dtype, objective, card.max_length,
        prompt, card.labels, options, notes, card.method,
    )  # fmt: skip


def _own_options(card: AdapterCard) -> tuple[Mapping[str, Any], list[str]]:
    """Return the task's options, without the reference model if merged, and a note about it."""
    known = card.options.get("preference")
    if not card.merge or not known or known.get("reference", NO_REFERENCE) == NO_REFERENCE:
        return card.options, []
    alone = {**card.options, "preference": {**known, "reference": NO_REFERENCE}}
    return alone, [
        "what it was merged from is its reference no more: rewards are not scored, and "
        "the loss compares with nothing"
    ]


def card_overrides(card: AdapterCard) -> dict[str, Any]:
    """Return overrides of the base's config that shape its head as trained."""
    overrides = label_overrides(card.labels) if card.labels else {}
    if problem := card.options.get("problem_type"):
        overrides["problem_type"] = problem
        overrides.setdefault("num_labels", 1)
    return overrides
