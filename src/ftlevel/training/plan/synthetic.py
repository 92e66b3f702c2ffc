"""Substitutes for parts of a run that an estimate of its memory does not need."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.prepare.encoder import PreparedData
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.models.kinds import max_positions
from ftlevel.models.loading import load_tokenizer
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import BaseTask

_SOURCE = "synthetic rows"
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
            "name": _SOURCE,
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
        return PreparedData(rows, [], None, length, Table([], [], _SOURCE, "row"), info, choices)
