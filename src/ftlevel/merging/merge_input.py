"""Resolve the inputs of a merge: adapter, base, training settings, and rows for comparison."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, load_card
from ftlevel.artifacts.paths import DATA_PATHS, check_paths
from ftlevel.config import DataConfig, MergeConfig, QuantConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.data.encoding.fit import LengthBounds
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.prepare.dataset import prepare_data
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, ignore_progress
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.evaluation.two_models import EvalSet, load_eval_text, split_into_windows
from ftlevel.methods.merging import get_merge_error, load_peft_config
from ftlevel.models.hardware import DTYPES, select_device
from ftlevel.models.kinds import max_positions
from ftlevel.models.quantization import get_quant_config, get_quantization_config, quantization_name
from ftlevel.models.sources import ModelSource
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import (
    ADAPTER_CONFIG,
    check_adapter_checkpoint,
    check_cached_base,
    get_model_dir,
    is_model,
    resolve_model,
)

_ROW_LENGTH = 32
_TOKEN_TYPES = "token_type_ids"


@dataclass(frozen=True)
class MergeInput:
    """Base and adapter to merge, before weights load; `dtype` and `device` are for comparisons."""

    ref: ModelRef
    dtype: str
    device: str

    @property
    def source(self) -> ModelSource:
        """The base model."""
        return self.ref.source

    @property
    def card(self) -> AdapterCard:
        """Content of the adapter's ftlevel.json: its training settings."""
        return self.ref.card

    @property
    def quant(self) -> QuantConfig:
        """Quantization of the base in training."""
        return get_quant_config(self.card.quantization)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first access because loading is slow."""
        return self.ref.load_tokenizer()

    @functools.cached_property
    def ignores_token_types(self) -> bool:
        """Whether training passed no `token_type_ids`, as PEFT 0.21 does for question answering."""
        if self.ref.directory is None:
            return False
        return bool(load_peft_config(self.ref.directory).get("task_type") == "QUESTION_ANS")

    def eval_set(self, rows: Sequence[Encoded]) -> EvalSet:
        """Returns `rows` as an `EvalSet`, with objective, padding token and device."""
        return EvalSet(rows, self.ref.objective, self.tokenizer.pad_token_id or 0, self.device)


def get_adapter_dir(name: str) -> Path:
    """Returns the directory of the adapter `name`; raise InputError if it cannot be merged."""
    path = Path(name).expanduser()
    adapter_dir = get_model_dir(name)
    is_full = (adapter_dir / CARD).is_file() and load_card(adapter_dir).method == "full"
    if is_full or is_model(name):
        raise InputError(
            f"{name} has no adapter to merge: {adapter_dir} is a whole model already. Use it as it "
            "is, or name a run or an adapter."
        )
    if not path.exists():
        raise InputError(f"{name} does not exist. Expected a run or an adapter directory.")
    if not (adapter_dir / ADAPTER_CONFIG).is_file():
        files = sorted(p.name for p in path.iterdir()) if path.is_dir() else ["a file"]
        raise InputError(
            f"{name} is neither a run nor an adapter (it contains "
            f"{join_names(files, 6) or 'nothing'}). Expected a directory with {ADAPTER_CONFIG}."
        )
    check_adapter_checkpoint(adapter_dir)
    error = get_merge_error(load_peft_config(adapter_dir))
    if error is not None:
        raise InputError(f"{name} cannot be merged. {error}")
    return adapter_dir


def resolve_merge_input(config: MergeConfig) -> MergeInput:
    """Resolve adapter and base; InputError if they cannot be merged or the base has changed."""
    get_adapter_dir(config.adapters[0])
    device = select_device(config.device).value
    ref = resolve_model(config.adapters[0], base=config.base_model, device=device)
    check_cached_base(ref)
    if not ref.is_ours:
        dtype = str(ref.model_config.dtype or "float32").removeprefix("torch.")
        ref = ref.with_card(dtype=dtype if dtype in DTYPES else "float32")
    check_base_precision(ref)
    return MergeInput(ref, ref.compute_dtype(device), device)


def check_base_precision(ref: ModelRef) -> None:
    """Raise InputError if the base of an adapter is stored quantized."""
    quantization_config = get_quantization_config(ref.model_config)
    if quantization_config is not None and ref.source.kind != "gguf":
        raise InputError(
            f"{ref.base} is stored quantized ({quantization_name(quantization_config)}), and "
            "weights of a few bits cannot hold the update: rounding it to their grid erases most "
            "of what was trained. Keep the adapter separate, or train on the model in floating "
            "point with --quant 4bit and merge that."
        )


SelectedRows = tuple[list[Encoded], list[Encoded], list[Choice]]
"""Rows to compare logits on, rows to select quantization codes on, and lines to print."""


def select_rows(inputs: MergeInput, count: int, calibration: int = 0) -> SelectedRows:
    """Select up to `count` rows to compare logits on, and `calibration` rows for quantization."""
    if inputs.ref.run is None:
        return _create_rows(inputs, count, calibration, "the adapter has no run")
    try:
        run_config = inputs.ref.run_config
        check_paths(inputs.ref.run, run_config.model_dump(mode="json"), DATA_PATHS)
        data = _prepare_rows(inputs, run_config.data, run_config.train.seed)
    except ConfigError as error:
        message = str(error).split("\n")[0]
        return _create_rows(inputs, count, calibration, f"the run's data cannot be read: {message}")
    samples = [data.train[i] for i in range(min(count + calibration, len(data.train)))]
    validation = list(data.validation[:count])
    if inputs.ignores_token_types:
        samples, validation = map(_drop_token_types, (samples, validation))
    share = len(samples) * count // max(count + calibration, 1)
    rows = validation or samples[: max(share, min(count, 1))]
    split = "validation" if data.validation else "training"
    remaining = samples if data.validation else samples[len(rows) :]
    calibration_rows, name = remaining[:calibration], data.info["name"]
    choices = [Choice("compared on", f"{len(rows)} {split} rows", name)] if rows else []
    if calibration_rows:
        choices.append(Choice("calibrated on", f"{len(calibration_rows)} training rows", name))
    return rows, calibration_rows, choices


def _drop_token_types(rows: Sequence[Encoded]) -> list[Encoded]:
    return [
        replace(row, extras={k: v for k, v in row.extras.items() if k != _TOKEN_TYPES})
        for row in rows
    ]


def _prepare_rows(inputs: MergeInput, data: DataConfig, seed: int) -> PreparedData:
    tokenizer = inputs.tokenizer
    set_chat_template(tokenizer, data.chat_template)
    ensure_pad_token(tokenizer)
    vocab_size = inputs.ref.model_config.get_text_config().vocab_size
    bounds = LengthBounds(max_positions(inputs.ref.model_config))
    task, kind = inputs.ref.configured_task, inputs.ref.model_kind
    context = EncodingContext(task, kind, tokenizer, vocab_size, bounds, seed)
    return prepare_data(data, context, ignore_progress)


def _create_rows(inputs: MergeInput, count: int, calibration: int, message: str) -> SelectedRows:
    """Returns rows of random tokens; with `calibration`, of docstrings. `message` is displayed."""
    if calibration:
        tokens = (count + calibration) * _ROW_LENGTH
        text = load_eval_text(None, tokens)
        windows = split_into_windows(inputs.tokenizer, text.content, tokens, _ROW_LENGTH)
        rows = _to_encoded(inputs, windows)
        compared = len(rows) * count // max(count + calibration, 1)
        description = f"{compared} and {len(rows) - compared} rows of {text.name}"
        choice = Choice("compared, and calibrated, on", description, message)
        return rows[:compared], rows[compared:], [choice]
    rng = random.Random(0)
    size = min(len(inputs.tokenizer), inputs.ref.model_config.get_text_config().vocab_size)
    ids = [[rng.randrange(size) for _ in range(_ROW_LENGTH)] for _ in range(count)]
    choice = Choice("compared on", f"{count} rows of random tokens", message)
    return _to_encoded(inputs, ids), [], [choice]


def _to_encoded(inputs: MergeInput, rows: Sequence[list[int]]) -> list[Encoded]:
    card = inputs.card
    return [
        Encoded(ids, inputs.ref.configured_task.dummy_labels(ids, card.labels, card.options), index)
        for index, ids in enumerate(rows)
    ]
