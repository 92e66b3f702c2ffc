"""EVA (Paischer et al., 2024): LoRA's A begins in the directions in which training rows vary most.

One pass over batches of training rows gives each linear's inputs; ranks go where they explain most.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.models.hardware import autocast


def start_from_data(
    model: Any,
    rows: Sequence[Encoded],
    *,
    pad_id: int,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
) -> None:
    """Set A, ranks and scales of every LoRA of `model` (mutated) from the inputs on `rows`.

    Afterwards its config says the default start, as whoever loads the adapter has nothing to redo.
    """
    from peft import initialize_lora_eva_weights

    training = model.training
    model.eval()
    with autocast(device, dtype):
        initialize_lora_eva_weights(
            model,
            _Batches(rows, pad_id, batch_size, seed, device),
            forward_fn=_forward,
            prepare_model_inputs_fn=_supervised_positions,
            show_progress_bar=False,
        )
    config = model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None
    model.train(training)


class _Batches:
    """The rows in one random order, collated; begins anew whenever it is gone through."""

    def __init__(
        self, rows: Sequence[Encoded], pad_id: int, size: int, seed: int, device: str
    ) -> None:
        self.rows = list(rows)
        random.Random(seed).shuffle(self.rows)
        self.size, self.device = size, device
        self.collate = Collator(pad_id)

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.rows), self.size):
            batch = self.collate(self.rows[start : start + self.size])
            yield {name: value.to(self.device) for name, value in batch.items()}


def _forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask")})


def _supervised_positions(batch: dict[str, torch.Tensor], _: Any) -> torch.Tensor:
    """Return (n, 2) positions of tokens that are real and, in generation, supervised."""
    mask = batch["attention_mask"].bool()
    labels = batch.get("labels")
    if labels is not None and labels.shape == mask.shape:
        mask &= labels != IGNORED
    return mask.nonzero()
