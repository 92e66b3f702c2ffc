"""No checkpoint before it is known on which bytes of the base it was trained."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.going_on.identity import BaseDigest


class WaitForBase(TrainerCallback):
    """Let the first checkpoint wait until all bytes of the base were read beside the steps."""

    def __init__(self, digest: BaseDigest) -> None:
        self._digest = digest

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Wait, where a checkpoint comes."""
        if control.should_save:
            self._digest.wait()

    on_epoch_end = on_step_end
