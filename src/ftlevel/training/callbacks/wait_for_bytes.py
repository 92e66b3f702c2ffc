"""No checkpoint before it is known on which bytes of the base, and of a stream, it was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class WaitForBytes(TrainerCallback):
    """Let the first checkpoint wait until all files were read beside the steps.

    Args:
        waits: wait for one of them.
    """

    def __init__(self, waits: Iterable[Callable[[], None]]) -> None:
        self._waits = list(waits)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait, where a checkpoint comes."""
        if control.should_save:
            for wait in self._waits:
                wait()

    on_epoch_end = on_evaluate = on_step_end
