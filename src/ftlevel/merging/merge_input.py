"""Resolve the inputs of a merge: adapter, base, training settings, and rows for comparison."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, load_card
from ftlevel.artifacts.places import DATA_PATHS, check_paths, load_run_config
from ftlevel.config import DataConfig, MergeConfig, QuantConfig, build_config
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.data.encoding.encode import PROMPT_VERSION, Encoded, load_prompt_format
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, ignore_progress
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.evaluation.two_models import ComparisonSet, load_eval_text, split_into_windows
from ftlevel.methods.merging import get_merge_error, load_peft_config
from ftlevel.models.hardware import DTYPES, choose_device
from ftlevel.models.kinds import max_positions
from ftlevel.models.quantization import quantization_name, read_quantization, stored_quantization
from ftlevel.models.sources import ModelSource
from ftlevel.trained.adapt import get_adapter_reader
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import (
    ADAPTER_CONFIG,
    check_adapter_checkpoint,
    check_cached_base,
    get_model_dir,
    is_model,
    resolve_model,
)

_MADE_UP_LENGTH = 32
_TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class MergeInput:
    """Inputs of a merge before weights are loaded; `ref` names adapter and base.

    `dtype` is the compute precision in which models are compared.
    """

    ref: ModelRef
    dtype: str
    device: str

    @property
    def source(self) -> ModelSource:
        """The base model."""
        return self.ref.source

    @property
    def card(self) -> AdapterCard:
        """Model card of the adapter, with its training settings."""
        return self.ref.card

    @property
    def quant(self) -> QuantConfig:
        """Quantization of the base in training."""
        return read_quantization(self.card.quantization)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first access because loading is slow."""
        return self.ref.load_tokenizer()

    @functools.cached_property
    def ignores_token_types(self) -> bool:
        """Whether the model did not receive `token_type_ids` in training.

        PEFT 0.21's class for question answering does not pass them to the model. A model that was
        trained in full has no adapter.
        """
        if self.ref.directory is None:
            return False
        return bool(_read_config(self.ref.directory).get("task_type") == "QUESTION_ANS")

    def probe(self, rows: Sequence[Encoded]) -> ComparisonSet:
        """Returns a probe that compares models on `rows`."""
        pad_id = self.tokenizer.pad_token_id or 0
        return ComparisonSet(rows, self.ref.objective, pad_id, self.device)


def find_adapter(name: str) -> Path:
    """Find the directory of the adapter `name`; raise InputError if it cannot be merged."""
    path = Path(name).expanduser()
    directory = get_model_dir(name)
    is_full = (directory / CARD).is_file() and load_card(directory).method == "full"
    if is_full or is_model(name):
        raise InputError(
            f"{name} has no adapter to merge: {directory} is a whole model already. Use it as it "
            "is, or name a run or an adapter."
        )
    if not path.exists():
        raise InputError(f"{name} does not exist. Expected a run or an adapter directory.")
    if not (directory / ADAPTER_CONFIG).is_file():
        files = sorted(p.name for p in path.iterdir()) if path.is_dir() else ["a file"]
        raise InputError(
            f"{name} is neither a run nor an adapter "
            f"(it contains {join_names(files, 6) or 'nothing'})"
            f". Expected a directory with {ADAPTER_CONFIG}."
        )
    check_adapter_checkpoint(directory)
    error = get_merge_error(_read_config(directory))
    if error is not None:
        raise InputError(f"{name} cannot be merged. {error}")
    return directory


def _read_config(directory: Path) -> dict[str, Any]:
    """Load the adapter's PEFT config; adapters of other formats get a minimal one."""
    if (reader := get_adapter_reader(directory)) is not None:
        return {"peft_type": reader.peft_type}
    return load_peft_config(directory)


def resolve_merge_input(config: MergeConfig) -> MergeInput:
    """Resolve the first adapter of `config` and its base; load no weights.

    Raises InputError if the adapter cannot be merged, or the base is missing or has other weights.
    """
    find_adapter(config.adapters[0])
    device = choose_device(config.device).value
    ref = resolve_model(config.adapters[0], base=config.base_model, device=device)
    check_cached_base(ref)
    if not ref.is_ours:
        dtype = str(ref.model_config.dtype or "float32").removeprefix("torch.")
        ref = ref.with_card(dtype=dtype if dtype in DTYPES else "float32")
    stored = stored_quantization(ref.model_config)
    if stored is not None and ref.source.kind != "gguf":
        raise InputError(
            f"{ref.base} is stored quantized ({quantization_name(stored)}), and weights of a "
            "few bits cannot hold the update: rounding it to their grid erases most of what was "
            "trained. Keep the adapter separate, or train on the model in floating point with "
            "--quant 4bit and merge that."
        )
    return MergeInput(ref, ref.compute_dtype(device), device)


@dataclass(frozen=True)
class CheckRows:
    """Rows to compare models on, and calibration rows to choose quantization codes on.

    The two are disjoint if there are enough rows. `choices` are lines to print.
    """

    compared: list[Encoded]
    calibration: list[Encoded]
    choices: list[Choice]


def choose_rows(inputs: MergeInput, count: int, calibration: int = 0) -> CheckRows:
    """Choose up to `count` rows to compare models on, and `calibration` rows for choosing codes."""
    if inputs.ref.run is None:
        return _made_up(inputs, count, calibration, "the adapter has no run")
    try:
        settings = build_config([load_run_config(inputs.ref.run)])
        check_paths(inputs.ref.run, settings.model_dump(mode="json"), DATA_PATHS)
        data = _prepare_rows(inputs, settings.data, settings.train.seed)
    except ConfigError as error:
        reason = str(error).split("\n")[0]
        return _made_up(inputs, count, calibration, f"the run's data cannot be read: {reason}")
    samples = [data.train[i] for i in range(min(count + calibration, len(data.train)))]
    validation = list(data.validation[:count])
    if inputs.ignores_token_types:
        samples, validation = map(_without_token_types, (samples, validation))
    rows = validation or samples[:count]
    split = "validation" if data.validation else "training"
    remaining = samples if data.validation else samples[len(rows) :] or samples
    calibration_rows, name = remaining[:calibration], data.info["name"]
    choices = [Choice("compared on", f"{len(rows)} {split} rows", name)] if rows else []
    if calibration_rows:
        choices.append(Choice("codes chosen on", f"{len(calibration_rows)} training rows", name))
    return CheckRows(rows, calibration_rows, choices)


def _without_token_types(rows: Sequence[Encoded]) -> list[Encoded]:
    return [
        replace(row, extras={k: v for k, v in row.extras.items() if k != _TOKEN_TYPES})
        for row in rows
    ]


def _prepare_rows(inputs: MergeInput, data: DataConfig, seed: int) -> PreparedData:
    tokenizer = inputs.tokenizer
    set_chat_template(tokenizer, data.chat_template)
    ensure_pad_token(tokenizer)
    vocabulary = inputs.ref.model_config.get_text_config().vocab_size
    bounds = LengthBounds(max_positions(inputs.ref.model_config))
    prompt = load_prompt_format(inputs.card)
    context = EncodingContext(
        inputs.ref.configured_task,
        inputs.ref.model_kind,
        tokenizer,
        vocabulary,
        bounds,
        seed,
        prompt_version=prompt.version if prompt else PROMPT_VERSION,
    )
    return prepare_data(data, context, ignore_progress)


def _made_up(inputs: MergeInput, count: int, calibration: int, reason: str) -> CheckRows:
    """Returns `count` rows of random tokens, or of text if `calibration` rows are needed, too.

    The inputs of layers on random tokens are not typical, so codes cannot be chosen on them.
    `reason`, why there are no data rows, is for the log.
    """
    if calibration:
        tokens = (count + calibration) * _MADE_UP_LENGTH
        text = load_eval_text(None, tokens)
        windows = split_into_windows(inputs.tokenizer, text.content, tokens, _MADE_UP_LENGTH)
        rows = _rows_of(inputs, windows)
        compared = len(rows) * count // max(count + calibration, 1)
        description = f"{compared} and {len(rows) - compared} rows of {text.name}"
        return CheckRows(
            rows[:compared],
            rows[compared:],
            [Choice("compared, and codes chosen, on", description, reason)],
        )
    rng = random.Random(0)
    size = min(len(inputs.tokenizer), inputs.ref.model_config.get_text_config().vocab_size)
    ids = [[rng.randrange(size) for _ in range(_MADE_UP_LENGTH)] for _ in range(count)]
    choice = Choice("compared on", f"{count} rows of random tokens", reason)
    return CheckRows(_rows_of(inputs, ids), [], [choice])


def _rows_of(inputs: MergeInput, rows: Sequence[list[int]]) -> list[Encoded]:
    card = inputs.card
    return [
        Encoded(ids, inputs.ref.configured_task.dummy_labels(ids, card.labels, card.options), index)
        for index, ids in enumerate(rows)
    ]
