"""Tell the rows and their order which epoch it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.masking import MaskedRows
from ftlevel.data.prepare.sampling import LengthGroups
from ftlevel.models.upstream.data import shared_order


class SetEpoch(TrainerCallback):
    """Tell rows, and their order, which epoch begins, also after a resumption."""

    def __init__(self, rows: Sequence[Encoded], order: Any) -> None:
        self.rows = rows
        self.order = order

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Set the epoch; Trainer takes the first row of it after this."""
        if isinstance(self.rows, MaskedRows):
            self.rows.epoch = int(state.epoch or 0)
        if isinstance(self.order, LengthGroups):
            self.order.epoch = int(state.epoch or 0)
        elif isinstance(self.order, shared_order()):
            self.order.set_epoch(int(state.epoch or 0))
