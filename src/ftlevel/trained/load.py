"""Find and load what was trained: a run, an adapter, a whole model, or a base model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, read_card
from ftlevel.artifacts.run_directory import CONFIG, run_of
from ftlevel.config.options.preference import NO_REFERENCE
from ftlevel.data.encoding.pad_token import choose_pad_token, pad_apart_from_eos
from ftlevel.data.encoding.prompts import PromptFormat, read_format
from ftlevel.errors import InputError
from ftlevel.models.hardware import DTYPES
from ftlevel.models.integrity import check_missing
from ftlevel.models.kinds import model_kind
from ftlevel.models.loading import (
    label_overrides,
    load_config,
    load_model,
    load_tokenizer,
)
from ftlevel.models.quantization import build_quantization_config
from ftlevel.models.quantized import (
    check_loadable,
    quantization_facts,
    read_quantization,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.targets import find_heads
from ftlevel.task import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import load_adapter
from ftlevel.trained.adapterhub import hub_task, is_adapterhub, read_hub_adapter, with_head
from ftlevel.trained.base import find_base
from ftlevel.trained.checkpoint import check_whole_adapter, whole_model
from ftlevel.trained.plain_peft import (
    ADAPTER_CONFIG,
    PLAIN,
    check_trained_head,
    read_plain_adapter,
    resolve_plain_base,
    stand_in_card,
)


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
        method: which the adapter was trained by, as in its card.
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
        """Whether the base can be had by switching the adapter off."""
        return hasattr(self.model, "peft_config")


@dataclass(frozen=True)
class Found:
    """What a name means, before weights load.

    Attributes:
        source: the base model, or the whole model.
        directory: of the adapter; None for a whole model.
        card: how it was trained, or what stands in for that; its quantization is that of the
            weights as they will load.
        run: the run directory that it lies in, if it lies in one.
        notes: what the user should know.
        is_stored_quantized: whether the weights lie on the disk as they are quantized.
    """

    source: ModelSource
    directory: Path | None
    card: AdapterCard
    run: Path | None = None
    notes: list[str] = field(default_factory=list)
    is_stored_quantized: bool = False


def find_trained(
    name: str, device: str, task: str | None = None, said: str = "", place: str | None = None
) -> Found:
    """Find the run, adapter or model called `name`, and its card.

    Args:
        name: a run directory, an adapter directory, or a model.
        device: torch device type.
        task: what a plain PEFT adapter or a model is for; the default is text generation. What
            ftlevel trained knows its task.
        said: how errors call a model; the default is its `name`, as a command's argument.
        place: where the base of an adapter is now, if it has moved.

    Raises:
        InputError: it is not there, its base is not the one it was trained on, or another `task`
            is asked of it.
    """
    found = _find(name, device, task, said or name, place)
    if place is not None and found.directory is None:
        raise InputError(
            f"--model {place}: it names the base of an adapter, and {name} is a whole model. Drop "
            "it."
        )
    return resolve_stored(found)


def resolve_stored(found: Found) -> Found:
    """Return `found` with a card that says how its weights are stored, whoever quantized them."""
    stored = None if found.source.kind == "gguf" else stored_quantization(load_config(found.source))
    if stored is None:
        return replace(found, is_stored_quantized=False)
    card = replace(found.card, quantization=quantization_facts(stored))
    return replace(found, card=card, is_stored_quantized=True)


def _find(name: str, device: str, task: str | None, said: str, place: str | None) -> Found:
    path = Path(name).expanduser()
    directory = card_directory(path)
    if directory is not None:
        card = read_card(directory)
        if task not in (None, card.task):
            raise InputError(f"{name} was trained for {card.task}, not for {task}. Drop --task.")
        run = run_of(directory)
        if card.method == "full":
            source = resolve_source(str(whole_model(directory)), said=str(directory))
            return Found(replace(source, name=str(directory)), None, card, run)
        return Found(find_base(card, directory, place), directory, card, run)
    if is_adapterhub(path):
        return _find_hub(path, device, task, place)
    check_whole_adapter(path)
    wished = TASKS[task or "text-generation"]
    if (path / ADAPTER_CONFIG).is_file():
        source, settings = read_plain_adapter(path, place)
        card = stand_in_card(source, wished, device, path, settings)
        return Found(source, path, card, None, [
            f"{name} was not made by ftlevel: its base, {source.name}, is taken on trust"
        ])  # fmt: skip
    source = resolve_source(name, said=said)
    return Found(source, None, stand_in_card(source, wished, device))


def _find_hub(directory: Path, device: str, task: str | None, place: str | None) -> Found:
    """Find the base of an adapter of AdapterHub's, and what stands in for its card."""
    hub = read_hub_adapter(directory)
    wished = TASKS[hub_task(hub, task)]
    source = resolve_plain_base(hub.base, directory, None, place)
    settings = {"peft_type": "BOTTLENECK", "modules_to_save": hub.heads}
    card = with_head(stand_in_card(source, wished, device, directory, settings), hub)
    return Found(source, directory, card, None, [
        f"{directory} was made by AdapterHub's adapters: its base, {source.name}, is taken on trust"
    ])  # fmt: skip


def card_directory(path: Path) -> Path | None:
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
            f"Go on with it: ftlevel train --output-dir {quote(str(path))} --resume"
        )
    return None


def load_found(found: Found, device: str, name: str = "default") -> Trained:
    """Load what `find_trained` found; its adapter is called `name`.

    Raises:
        InputError: it is damaged, or has no head for the task.
    """
    card, source, directory = found.card, found.source, found.directory
    prompt = read_format(card)
    options, about_reference = _own_options(card)
    task = TASKS[card.task].configured(options)
    config = load_config(source, **card_overrides(card))
    if (stored := stored_quantization(config)) is not None:
        check_loadable(stored, source.words, device)
    tokenizer = load_own_tokenizer(source, directory)
    choose_pad_token(tokenizer)
    if task.pads_apart:
        pad_apart_from_eos(tokenizer)
    if (
        task.pads_apart or getattr(config, "pad_token_id", None) is None
    ):  # CodeGen's has no such field at all
        config.pad_token_id = tokenizer.pad_token_id
    kind = model_kind(config)
    dtype, notes = card.dtype, [*found.notes, *about_reference]
    if dtype == "float16" and device == "cpu":
        dtype = "float32"
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
    # A language head that was new has a bias that is not trained and stays zero.
    new = [*card.heads, *find_heads(model)] if card.heads and directory else []
    check_missing(missing, new, source.words)
    if directory is not None:
        model = load_adapter(model, directory, name)
    objective = task.build_objective(kind, {"labels": card.labels, **options})
    return Trained(
        model.eval(), tokenizer, task, kind, device, dtype, objective, card.max_length,
        prompt, card.labels, options, notes, card.method,
    )  # fmt: skip


def _own_options(card: AdapterCard) -> tuple[Mapping[str, Any], list[str]]:
    """Return the options of the task, and a note where a merge left out the reference of rewards.

    What it was merged from is not there to be asked.
    """
    known = card.options.get("preference")
    if not card.merge or not known or known.get("reference", NO_REFERENCE) == NO_REFERENCE:
        return card.options, []
    alone = {**card.options, "preference": {**known, "reference": NO_REFERENCE}}
    return alone, ["what it was merged from is its reference no more: rewards are not scored, and "
                   "the loss compares with nothing"]  # fmt: skip


def load_own_tokenizer(source: ModelSource, directory: Path | None) -> Any:
    """Return the tokenizer beside the adapter, or the base's where none was saved."""
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return load_tokenizer(source)
    return load_tokenizer(ModelSource(str(directory), "directory", str(directory)))


def card_overrides(card: AdapterCard) -> dict[str, Any]:
    """Return what the base's config is given so that its head has the trained one's shape."""
    overrides = label_overrides(card.labels) if card.labels else {}
    if problem := card.options.get("problem_type"):
        overrides["problem_type"] = problem
        overrides.setdefault("num_labels", 1)
    return overrides
