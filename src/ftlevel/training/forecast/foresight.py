"""The verdict of the plan at the beginning of a run, and beside what was measured at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.errors import FtlevelError
from ftlevel.models.hardware import peak_memory_bytes, reserved_memory_bytes
from ftlevel.training.forecast.memory import count_computed_layers
from ftlevel.training.forecast.need import CONTEXT_BYTES, Device, Need, find_need
from ftlevel.training.plan.plan import Plan

MOST_BLOCKS = 16
"""That are computed for a verdict: each takes about a twentieth of a second."""

LEAST_PARAMETERS = 4_000_000
"""Of a model whose memory is worth a word: weights, gradients and states of fewer are less than a
tenth of what Python takes with its libraries."""

_HOW = {
    "cpu": "resident, above what the process held before the model: with copies that reading and "
    "products make",
    "cuda": "reserved by torch's allocator",
    "mps": "resident in this process",
}


@dataclass(frozen=True)
class Foresight:
    """What a run was said to need before it began.

    Attributes:
        need: what it needs; None where that was not computed.
        reason: why it was not.
    """

    need: Need | None
    reason: str = ""

    def choice(self) -> Choice:
        """Return the line of the screen."""
        if self.need is None:
            known = f"not estimated{'' if self.reason else '; run `ftlevel plan`'}"
            return Choice("memory", known, self.reason)
        return Choice("memory", self.need.verdict(), "the plan; its parts: ftlevel plan")

    def compare(self, before: int) -> dict[str, Any]:
        """Return the plan beside what was measured, for summary.json; bytes.

        Args:
            before: that this process had resident before the model was loaded.
        """
        if self.need is None:
            return {"peak_bytes": None, "reason": self.reason}
        need, kind = self.need, self.need.device.kind
        if kind == "cuda":
            planned, measured = need.peak - CONTEXT_BYTES, reserved_memory_bytes()
        else:
            planned, measured = need.peak, peak_memory_bytes(kind) - before
        return {
            "peak_bytes": planned,
            "process_bytes": need.process,
            "parts": need.parts,
            "at": need.at,
            "memory_bytes": need.device.memory,
            "fits_in_memory": need.does_fit,
            "verdict": need.verdict(),
            "measured_bytes": measured,
            "measured_process_bytes": None if need.process is None else peak_memory_bytes(kind),
            "measured": _HOW.get(kind, _HOW["mps"]),
            "off": planned / max(1, measured) - 1
            if kind == "cuda"
            else None,  # elsewhere more is counted
        }


def foresee(config: TrainConfig, plan: Plan, processes: int) -> Foresight:
    """Return what the run needs of its device, where that is soon known.

    Args:
        config: the whole configuration.
        plan: its plan.
        processes: that train together.
    """
    if processes > 1:
        return Foresight(None, f"{processes} processes; run `ftlevel plan`")
    if plan.model.total_parameters < LEAST_PARAMETERS:
        return Foresight(None, "a small model: Python and its libraries take more")
    if count_computed_layers(plan) > MOST_BLOCKS:
        return Foresight(None)
    try:
        return Foresight(find_need(config, plan, Device.of(plan.model.device)))
    except FtlevelError as error:
        return Foresight(None, str(error))
