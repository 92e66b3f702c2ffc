"""What a run does about a step whose numbers are not finite, or whose loss leaps.

It stops, or leaves the step out, or goes back to the weights and the optimizer's state of the
newest whole checkpoint and leaves out what came since, as PaLM's training did (Chowdhery et al.,
2022, section 5.1). The schedule and the order of the rows go on.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts.files import write_json
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.config.trainer import TrainerConfig
from ftlevel.errors import RunError, listing
from ftlevel.events import Listener
from ftlevel.training.processes import Processes
from ftlevel.training.trainer import FtlevelTrainer

_MEMORY = 20  # steps whose losses say what is usual
_KNOWN = 5  # of them are needed before anything is unusual
_PATIENCE = 10  # steps in a row that may be left out
_SHOWN = 8  # rows of a step that are named
_LOSSES = "losses.json"  # in a checkpoint


class Recovery(TrainerCallback):
    """Decide about a step that went wrong, and remember what was decided.

    Args:
        trainer: of the run.
        train: its settings.
        run: its directory.
        processes: those of the run, which decide alike.
        listener: is told.
        checkpoint: that the run goes on from, if it does.
    """

    def __init__(
        self,
        trainer: FtlevelTrainer,
        train: TrainerConfig,
        run: RunDirectory,
        processes: Processes,
        listener: Listener,
        checkpoint: Path | None,
    ) -> None:
        self._trainer = trainer
        self._how = train.on_nonfinite
        self._factor = train.spike_factor
        self._run = run
        self._processes = processes
        self._listener = listener
        self._losses: deque[float] = deque(maxlen=_MEMORY)
        self._in_a_row, self._last = 0, 0
        known = checkpoint / _LOSSES if checkpoint is not None else None
        # A run that began without a factor has none, and learns from here on what is usual.
        if self._factor is not None and known is not None and known.exists():
            self._losses.extend(json.loads(known.read_text(encoding="utf-8")))

    @property
    def stops(self) -> bool:
        """Whether a step that is not finite ends the run."""
        return self._how == "stop"

    @property
    def only_stops(self) -> bool:
        """Whether nothing is ever left out, so that it may be found some steps later."""
        return self.stops and self._factor is None

    def agree(self, is_wrong: bool) -> bool:
        """Return whether the step is wrong in one of the processes."""
        return self._processes.any(is_wrong)

    def decide(self, step: int, what: str, advice: str, *, in_weights: bool = False) -> None:
        """Leave out what went wrong, so that the optimizer's step changes nothing, or stop.

        Args:
            step: from 1.
            what: is not finite, as a sentence begins.
            advice: what may help, as sentences.
            in_weights: the optimizer has made its step, so that leaving it out is too late.

        Raises:
            RunError: the run is to stop, or can do nothing else.
        """
        how = self._how
        if how == "stop" or (how == "skip" and in_weights):
            raise RunError(f"{what}.{self._rows()} {advice} {self._kept()}")
        if how == "rollback":
            self._go_back(step, what)
        else:
            self._leave_out(step, what, "skipped")

    def look_for_spike(self, step: int, loss: float) -> None:
        """Compare the finite `loss` of a step with the usual one of the steps before.

        Raises:
            RunError: it is unusual once more, after `_PATIENCE` times.
        """
        if self._factor is None:
            return
        loss = self._processes.mean(loss)
        usual = statistics.median(self._losses) if len(self._losses) >= _KNOWN else None
        if usual is None or loss <= self._factor * usual:
            self._losses.append(loss)
            return
        what = (
            f"the loss is {loss:.4g} at step {step}, more than {self._factor:g} times the usual "
            f"{usual:.4g}"
        )
        if self._newest() is None:
            self._leave_out(step, what, "skipped")
        else:
            self._go_back(step, what)

    def _go_back(self, step: int, what: str) -> None:
        checkpoint = self._newest()
        if checkpoint is None:
            raise RunError(
                f"{what}.{self._rows()} --on-nonfinite rollback has no checkpoint to go back to "
                "yet. Save more often (--save-steps), or use --on-nonfinite skip."
            )
        self._trainer.restore(checkpoint)
        self._leave_out(step, what, f"rolled back to {checkpoint.name}")

    def _leave_out(self, step: int, what: str, how: str) -> None:
        self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
        self._last = step
        if self._in_a_row > _PATIENCE:
            raise RunError(
                f"{what}, and so it was in the {_PATIENCE} steps before, which were left out. "
                f"Lower --learning-rate, or use --dtype float32. {self._kept()}"
            )
        self._trainer.drop_gradient()
        note = {"step": step, "what": what, "how": how, "rows": self._trainer.step_rows}
        if self._processes.is_first:
            self._run.note(note)
        self._listener.warn(f"{what}: {how}.{self._rows()}")

    def _newest(self) -> Path | None:
        return self._processes.from_first(
            lambda: checkpoints.newest_whole(self._run.checkpoints)[0]
        )

    def _rows(self) -> str:
        """Name the rows of the step, as they are numbered among the training rows, from 1."""
        numbers = sorted(row + 1 for row in self._trainer.step_rows)
        return f" It had the rows {listing(map(str, numbers), _SHOWN)}." if numbers else ""

    def _kept(self) -> str:
        newest = self._newest()
        return f"{newest} is whole." if newest else "There is no checkpoint yet."

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Write which losses are usual into the checkpoint, before it is certified."""
        if self._factor is not None and self._processes.is_first:
            path = self._run.checkpoints / f"checkpoint-{state.global_step}" / _LOSSES
            write_json(path, list(self._losses))


def describe_left_out(notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return those of a run's notes that tell of steps that were left out."""
    return [note for note in notes if "how" in note]
