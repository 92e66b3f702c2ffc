"""No checkpoint before it is known on which bytes of the base it was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class WaitForBase(TrainerCallback):
    """Let the first checkpoint wait until all bytes of the base were read beside the steps.

    Args:
        wait: for that.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait, where a checkpoint comes."""
        if control.should_save:
            self._wait()

    on_epoch_end = on_evaluate = on_step_end
