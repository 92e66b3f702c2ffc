"""All that models say of the rows before the first step, in the order in which memory allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.config import TrainConfig
from ftlevel.events import Listener
from ftlevel.training.model import Adapted, load_adapted
from ftlevel.training.plan.plan import Plan
from ftlevel.training.reference.another import ask_reference
from ftlevel.training.reference.fill import Reference, describe_first_loss, fill_reference
from ftlevel.training.reference.teacher import Expected, ask_teacher


@dataclass(frozen=True)
class OthersSaid:
    """What was asked.

    Attributes:
        reference: what preferences are held against; None where they are not, or nothing is.
        expected: what a teacher expects; None where there is none.
    """

    reference: Reference | None
    expected: Expected | None

    @property
    def start(self) -> Any:
        """A temporary directory with what is to be kept of the reference; None for nothing."""
        return self.reference.start if self.reference is not None else None

    def describe(
        self, config: TrainConfig, plan: Plan, records: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Return what summary.json says of it, and why the first loss is another than it had to be.

        Args:
            config: the whole configuration.
            plan: of the run.
            records: what was logged.
        """
        facts, notes = dict[str, Any](), list[str]()
        if self.reference is not None:
            facts["reference"], notes = describe_first_loss(self.reference, config, plan, records)
        if self.expected is not None:
            facts["distillation"] = dict(self.expected.facts)
        return facts, notes


def ask_and_load(
    config: TrainConfig, plan: Plan, listener: Listener
) -> tuple[Plan, Adapted, OthersSaid]:
    """Return the plan with rows that know what was asked, the model that is trained, and the facts.

    Other models are asked before it loads, and are gone then.
    """
    plan, reference = ask_reference(config, plan, listener)
    expected = ask_teacher(config, plan, listener)
    listener.stage("load the model")
    adapted = load_adapted(config, plan, listener)
    if reference is None:
        plan, reference = fill_reference(config, plan, adapted, listener)
    plan = expected.put_into(plan) if expected is not None else plan
    return plan, adapted, OthersSaid(reference, expected)
