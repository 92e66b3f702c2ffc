"""Keep where a stream is beside the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.data.prepare.streamed_rows import StreamedRows


class SaveStreamState(TrainerCallback):
    """Write where a stream is into each checkpoint, before it is certified."""

    def __init__(self, rows: StreamedRows, directory: Path) -> None:
        self.rows = rows
        self.directory = directory

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Add it to the checkpoint that was just written; the first process does, for all."""
        if not state.is_world_process_zero:  # it is the same in each
            return
        self.rows.save(self.directory / f"checkpoint-{state.global_step}", state.global_step)
