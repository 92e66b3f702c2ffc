"""Find and load what was trained: a run, an adapter, a whole model, or a base model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, read_card
from ftlevel.artifacts.fingerprint import base_fingerprint
from ftlevel.artifacts.run_directory import CONFIG
from ftlevel.config import QuantConfig
from ftlevel.data.prompts import PromptFormat, choose_format
from ftlevel.engine.adapt import load_adapter
from ftlevel.engine.pad_token import choose_pad_token
from ftlevel.errors import InputError
from ftlevel.models.hardware import DTYPES, choose_device, choose_dtype
from ftlevel.models.kinds import max_positions, model_kind
from ftlevel.models.loading import (
    check_missing,
    label_overrides,
    load_config,
    load_model,
    load_tokenizer,
)
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.targets import find_heads
from ftlevel.tasks import TASKS, Task
from ftlevel.tasks.objectives import Objective, build_objective


@dataclass(frozen=True)
class Trained:
    """A model that is ready to be asked.

    Attributes:
        model: in eval mode; a PeftModel if there is an adapter.
        tokenizer: its tokenizer.
        task: what it was trained for.
        kind: kind of the model.
        device: torch device type.
        dtype: compute precision's name.
        objective: what it was trained on.
        max_length: of a training row, in tokens.
        prompt_format: as in training; None where there are no prompts.
        labels: names of the classes or tags.
        options: of the task, as in its card.
        notes: what the user should know.
    """

    model: Any
    tokenizer: Any
    task: Task
    kind: str
    device: str
    dtype: str
    objective: Objective
    max_length: int
    prompt_format: PromptFormat | None
    labels: list[str] = field(default_factory=list)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def has_adapter(self) -> bool:
        """Whether the base can be had by switching the adapter off."""
        return hasattr(self.model, "peft_config")


def load_trained(name: str, device_wish: str = "auto") -> Trained:
    """Load the run, adapter or model called `name`, to be used as it was trained.

    Raises:
        InputError: it is not there, its base is not the one it was trained on, or it is damaged.
    """
    directory = _adapter_directory(Path(name).expanduser())
    device = choose_device(device_wish).value
    if directory is None:
        return _load_plain(name, device)
    card = read_card(directory)
    if card.method == "full":
        return _load_with_card(resolve_source(str(directory)), directory, card, device)
    source = resolve_source(card.base["name"], card.base.get("revision"))
    check_base(source, card, directory)
    return _load_with_card(source, directory, card, device)


def _adapter_directory(path: Path) -> Path | None:
    """Return the directory with ftlevel.json that `path` means, or None for a plain model.

    Raises:
        InputError: a run that has not ended, or an adapter that ftlevel did not write.
    """
    if (path / CARD).is_file():
        return path
    if (path / "adapter" / CARD).is_file():
        return path / "adapter"
    if (path / CONFIG).is_file():
        raise InputError(
            f"{path} is a run that has no adapter yet: it did not come to its end. "
            f"Go on with it: ftlevel train --output-dir {path} --resume"
        )
    if (path / "adapter_config.json").is_file():
        raise InputError(
            f"{path} is an adapter without {CARD}, which says how it was trained. "
            "ftlevel generate reads adapters that ftlevel wrote."
        )
    return None


def check_base(source: ModelSource, card: AdapterCard, directory: Path) -> None:
    """Refuse a base whose weights are not those that the adapter was trained on.

    Raises:
        InputError: their fingerprints differ.
    """
    expected = card.base.get("fingerprint")
    if source.path is None or expected is None:
        return
    found = base_fingerprint(source.path)
    if found != expected:
        raise InputError(
            f"{directory} was trained on {card.base['name']} with weights {expected[:12]}…, and "
            f"there are now other weights ({found[:12]}…). On them the adapter would be wrong "
            "without a word. Restore the base model, or train again."
        )


def _load_with_card(
    source: ModelSource, directory: Path, card: AdapterCard, device: str
) -> Trained:
    task = TASKS[card.task]
    config = load_config(source, **card_overrides(card))
    tokenizer = load_tokenizer(ModelSource(str(directory), "directory", str(directory)))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    kind = model_kind(config)
    full = card.method == "full"
    dtype, notes = card.dtype, []
    if dtype == "float16" and device == "cpu":
        dtype, notes = "float32", ["trained in float16; the CPU computes it in float32"]
    quant = QuantConfig.model_validate(card.quantization)
    model, missing = load_model(
        source,
        config,
        task.auto_class(kind, config.model_type),
        dtype=DTYPES["float32" if full and not card.merge else dtype],
        device=device,
        quantization=build_quantization_config(quant, DTYPES[dtype], card.heads),
    )
    # A language head that was new has a bias that is not trained and stays zero.
    new = [*card.heads, *find_heads(model)] if card.heads and not full else []
    check_missing(missing, new, source.name)
    if not full:
        model = load_adapter(model, directory)
    prompt = PromptFormat(**card.prompt) if card.prompt else None
    objective = build_objective(
        task,
        kind,
        problem_type=card.options.get("problem_type"),
        labels=card.labels,
        unanswerable=card.options.get("unanswerable", False),
    )
    return Trained(
        model.eval(), tokenizer, task, kind, device, dtype, objective, card.max_length,
        prompt, card.labels, card.options, notes,
    )  # fmt: skip


def card_overrides(card: AdapterCard) -> dict[str, Any]:
    """Return what the base's config is given so that its head has the trained one's shape."""
    overrides = label_overrides(card.labels) if card.labels else {}
    if problem := card.options.get("problem_type"):
        overrides["problem_type"] = problem
        overrides.setdefault("num_labels", 1)
    return overrides


def _load_plain(name: str, device: str) -> Trained:
    """Load a model that nobody trained here, for text generation."""
    source = resolve_source(name)
    config = load_config(source)
    kind = model_kind(config)
    task = TASKS["text-generation"]
    dtype = choose_dtype("auto", device, "lora", config.model_type).value
    auto_class = task.auto_class(kind, config.model_type)
    tokenizer = load_tokenizer(source)
    choose_pad_token(tokenizer)
    model, missing = load_model(source, config, auto_class, dtype=DTYPES[dtype], device=device)
    check_missing(missing, [], name)
    prompt = choose_format(tokenizer, kind, task.instruction, task.answer_cue)
    objective = build_objective(task, kind)
    longest = max_positions(config) or 0
    return Trained(model.eval(), tokenizer, task, kind, device, dtype, objective, longest, prompt)
