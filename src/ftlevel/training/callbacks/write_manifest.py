"""Make checkpoints that can be trusted, and delete old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.best_models import rotate_best
from ftlevel.artifacts.ownership import delete_replaced
from ftlevel.training.processes import Processes


class WriteManifest(TrainerCallback):
    """Give each checkpoint its manifest, and delete old ones, and an old run, only after that."""

    def __init__(self, directory: Path, keep: int, processes: Processes) -> None:
        self.directory = directory
        self.keep = keep
        self._processes = processes

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Certify the checkpoint that was just written."""
        self._processes.wait()  # each writes its random state
        if self._processes.is_first:
            checkpoints.certify(self.directory / f"checkpoint-{state.global_step}")
            checkpoints.rotate(self.directory, self.keep)
            rotate_best(self.directory)
            delete_replaced(self.directory.parent)
