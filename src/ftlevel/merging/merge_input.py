"""Resolve the inputs of a merge: adapter, base, training settings, and rows for comparison."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, read_card
from ftlevel.artifacts.places import DATA_PLACES, check_places, read_run
from ftlevel.config import DataConfig, MergeConfig, QuantConfig, build_config
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.data.encoding.encode import PROMPT_VERSION, Encoded, read_format
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, ignore_progress
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.evaluation.two_models import cut_windows, read_eval_text
from ftlevel.methods.merging import read_peft_config, why_not_mergeable
from ftlevel.models.hardware import DTYPES, choose_device
from ftlevel.models.integrity import check_missing
from ftlevel.models.kinds import max_positions, model_kind
from ftlevel.models.loading import load_config, load_model, load_tokenizer
from ftlevel.models.quantization import (
    build_quantization_config,
    quantization_name,
    read_quantization,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource
from ftlevel.models.targets import find_heads
from ftlevel.task import Objective
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import load_adapter
from ftlevel.trained.adapter_formats import find_reader
from ftlevel.trained.load import LoadedModel, card_overrides
from ftlevel.trained.model_ref import (
    ADAPTER_CONFIG,
    ModelRef,
    check_cached_base,
    check_whole_adapter,
    compute_dtype,
    find_directory,
    is_model,
    resolve_model,
)

_MADE_UP_LENGTH = 32
_TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class MergeInput:
    """An adapter that can be merged, before any weights are loaded.

    Attributes:
        card: training settings; derived from the PEFT config if ftlevel did not train the
            adapter.
        config: config of the base, with the trained head.
        tokens: location of the tokenizer.
        quant: quantization of the base in training.
    """

    directory: Path
    card: AdapterCard
    run: Path | None
    source: ModelSource
    config: Any
    task: BaseTask
    kind: str
    auto_class: str
    tokens: ModelSource
    objective: Objective
    quant: QuantConfig
    dtype: str
    device: str

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first access because loading is slow."""
        return load_tokenizer(self.tokens)

    @functools.cached_property
    def ignores_token_types(self) -> bool:
        """Whether the adapter was trained without `token_type_ids`.

        PEFT 0.21's class for question answering does not pass them to the model. A model that was
        trained in full has no adapter.
        """
        if not (self.directory / ADAPTER_CONFIG).is_file():
            return False
        return bool(_read_config(self.directory).get("task_type") == "QUESTION_ANS")


def find_adapter(name: str) -> Path:
    """Return the directory of the adapter `name`; raise InputError if it cannot be merged."""
    path = Path(name).expanduser()
    directory = find_directory(name)
    is_full = (directory / CARD).is_file() and read_card(directory).method == "full"
    if is_full or is_model(name):
        raise InputError(
            f"{name} has no adapter to merge: {directory} is a whole model already. Use it as it "
            "is, or name a run or an adapter."
        )
    if not path.exists():
        raise InputError(f"{name} does not exist. Expected a run or an adapter directory.")
    if not (directory / ADAPTER_CONFIG).is_file():
        held = join_names(sorted(p.name for p in path.iterdir()), 6) if path.is_dir() else "a file"
        held = held or "nothing"
        raise InputError(
            f"{name} is neither a run nor an adapter (it holds {held}). Expected a directory with "
            f"{ADAPTER_CONFIG}."
        )
    check_whole_adapter(directory)
    reason = why_not_mergeable(_read_config(directory))
    if reason is not None:
        raise InputError(f"{name} cannot be merged. {reason}")
    return directory


def _read_config(directory: Path) -> dict[str, Any]:
    """Return the adapter's PEFT config, or a stand-in for one in another format."""
    if (reader := find_reader(directory)) is not None:
        return {"peft_type": reader.peft_type}
    return read_peft_config(directory)


def resolve_merge_input(config: MergeConfig) -> MergeInput:
    """Resolve the first adapter of `config` and its base; load no weights.

    Raises:
        InputError: It cannot be merged, or its base is missing or has different weights.
    """
    directory = find_adapter(config.adapters[0])
    device = choose_device(config.device).value
    ref = resolve_model(config.adapters[0], base=config.base_model, device=device)
    card, source = ref.card, ref.source
    check_cached_base(source, card, directory)
    task = TASKS[card.task].configured(card.options)
    model_config = load_config(source, **card_overrides(card))
    if not ref.is_ours:
        own_dtype = str(model_config.dtype or "float32").removeprefix("torch.")
        card = replace(card, dtype=own_dtype if own_dtype in DTYPES else "float32")
    stored = stored_quantization(model_config)
    if stored is not None and source.kind != "gguf":
        raise InputError(
            f"{source.name} is stored quantized ({quantization_name(stored)}), and weights of a "
            "few bits cannot hold the update: rounding it to their grid erases most of what was "
            "trained. Keep the adapter separate, or train on the model in floating point with "
            "--quant 4bit and merge that."
        )
    own = (directory / "tokenizer_config.json").is_file()
    tokens = ModelSource(str(directory), "directory", str(directory)) if own else source
    has_none = getattr(model_config, "pad_token_id", None) is None
    if task.separates_padding or (has_none and task.finds_ends_by_padding):
        model_config.pad_token_id = load_tokenizer(tokens).pad_token_id
    kind = model_kind(model_config)
    objective = task.build_objective(kind, {"labels": card.labels, **card.options})
    dtype = compute_dtype(card, device)
    return MergeInput(
        directory,
        card,
        ref.run,
        source,
        model_config,
        task,
        kind,
        task.auto_class(kind, model_config.model_type),
        tokens,
        objective,
        read_quantization(card.quantization),
        dtype,
        device,
    )


def whole_model_input(found: ModelRef, trained: LoadedModel) -> MergeInput:
    """Return inputs for a model without an adapter that is written without a merge."""
    source, card = found.source, found.card
    return MergeInput(
        Path(source.location),
        card,
        found.run,
        source,
        trained.model.config,
        trained.task,
        trained.kind,
        trained.task.auto_class(trained.kind, trained.model.config.model_type),
        source,
        trained.objective,
        QuantConfig(),
        trained.dtype,
        trained.device,
    )


def load_trained_model(inputs: MergeInput, quant: QuantConfig, *, dequantized: bool = False) -> Any:
    """Load the base, quantized as in `quant`, with the adapter, in eval mode.

    With `dequantized`, its weights are dequantized, so that matrix products run in floating point.
    """
    dtype = DTYPES[inputs.dtype]
    model, missing = load_model(
        inputs.source,
        inputs.config,
        inputs.auto_class,
        dtype=dtype,
        device=inputs.device,
        quantization=build_quantization_config(quant, dtype, inputs.card.heads),
    )
    heads = inputs.card.heads
    new = [*heads, *find_heads(model)] if heads else []
    unused = inputs.task.find_unused(model)
    check_missing(missing, [*new, *unused], inputs.source.words)
    return load_adapter(model.dequantize() if dequantized else model, inputs.directory)


@dataclass(frozen=True)
class CheckRows:
    """Rows to compare models on, and calibration rows to choose codes on.

    The two are disjoint if there are enough rows. `choices` are lines for the console.
    """

    compared: list[Encoded]
    calibration: list[Encoded]
    choices: list[Choice]


def choose_rows(inputs: MergeInput, count: int, calibration: int = 0) -> CheckRows:
    """Return at most `count` rows to compare models on, and `calibration` to choose codes on."""
    if inputs.run is None:
        return _made_up(inputs, count, calibration, "the adapter has no run")
    try:
        own = build_config([read_run(inputs.run)])
        check_places(inputs.run, own.model_dump(mode="json"), DATA_PLACES)
        data = _prepare_rows(inputs, own.data, own.train.seed)
    except ConfigError as error:
        reason = str(error).split("\n")[0]
        return _made_up(inputs, count, calibration, f"the run's data cannot be read: {reason}")
    train = [data.train[i] for i in range(min(count + calibration, len(data.train)))]
    validation = list(data.validation[:count])
    if inputs.ignores_token_types:
        train, validation = map(_without_token_types, (train, validation))
    rows = validation or train[:count]
    kind = "validation" if data.validation else "training"
    others = train if data.validation else train[len(rows) :] or train
    chosen, name = others[:calibration], data.facts["name"]
    choices = [Choice("compared on", f"{len(rows)} {kind} rows", name)] if rows else []
    if chosen:
        choices.append(Choice("codes chosen on", f"{len(chosen)} training rows", name))
    return CheckRows(rows, chosen, choices)


def _without_token_types(rows: Sequence[Encoded]) -> list[Encoded]:
    return [
        replace(row, extras={k: v for k, v in row.extras.items() if k != _TOKEN_TYPES})
        for row in rows
    ]


def _prepare_rows(inputs: MergeInput, data: DataConfig, seed: int) -> PreparedData:
    tokenizer = inputs.tokenizer
    set_chat_template(tokenizer, data.chat_template)
    ensure_pad_token(tokenizer)
    vocabulary = inputs.config.get_text_config().vocab_size
    bounds = LengthBounds(max_positions(inputs.config))
    prompt = read_format(inputs.card)
    context = EncodingContext(
        inputs.task,
        inputs.kind,
        tokenizer,
        vocabulary,
        bounds,
        seed,
        prompt_version=prompt.version if prompt else PROMPT_VERSION,
    )
    return prepare_data(data, context, ignore_progress)


def _made_up(inputs: MergeInput, count: int, calibration: int, reason: str) -> CheckRows:
    """Return rows of random tokens, or windows of text if codes must be chosen.

    Random tokens do not show which inputs the layers receive.
    """
    if calibration:
        tokens = (count + calibration) * _MADE_UP_LENGTH
        text = read_eval_text(None, tokens)
        windows = cut_windows(inputs.tokenizer, text.content, tokens, _MADE_UP_LENGTH)
        made = _rows_of(inputs, windows)
        part = len(made) * count // max(count + calibration, 1)
        words = f"{part} and {len(made) - part} rows of {text.name}"
        return CheckRows(
            made[:part], made[part:], [Choice("compared, and codes chosen, on", words, reason)]
        )
    rng = random.Random(0)
    size = min(len(inputs.tokenizer), inputs.config.get_text_config().vocab_size)
    drawn = [[rng.randrange(size) for _ in range(_MADE_UP_LENGTH)] for _ in range(count)]
    choice = Choice("compared on", f"{count} rows of random tokens", reason)
    return CheckRows(_rows_of(inputs, drawn), [], [choice])


def _rows_of(inputs: MergeInput, rows: Sequence[list[int]]) -> list[Encoded]:
    card = inputs.card
    return [
        Encoded(ids, inputs.task.probe_labels(ids, card.labels, card.options), index)
        for index, ids in enumerate(rows)
    ]
