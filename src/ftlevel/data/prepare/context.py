"""What decides the rows beside the data section, and what they are once they are ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config import GateConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import Bounds
from ftlevel.data.encoding.prompts import PROMPT_VERSION, PromptFormat
from ftlevel.data.gate import Finding
from ftlevel.data.gate.checks import Known, find_empty_thinks
from ftlevel.data.gate.gate import Gate, stop_ids
from ftlevel.data.sources.table import Table
from ftlevel.task import Task


@dataclass(frozen=True)
class EncodingContext:
    """What decides the rows beside the data section.

    Attributes:
        task: the task.
        kind: kind of the model.
        tokenizer: the model's tokenizer.
        vocabulary: rows of the model's embedding.
        bounds: of a row's length: what the model and its method leave to the text, and the memory.
        seed: of rows that are held out, of samples and of masks.
        lenient: leave out and report rows that ought to stop the run, as a preview does.
        prompt_version: of plain prompts, see `PROMPT_VERSION`.
    """

    task: Task
    kind: str
    tokenizer: Any
    vocabulary: int
    bounds: Bounds
    seed: int
    lenient: bool = False
    prompt_version: int = PROMPT_VERSION

    def gate(self, policy: GateConfig) -> Gate:
        """Return the gate that the rows go through, by the `policy` of the configuration."""
        tokenizer = self.tokenizer
        known = Known(
            self.task.checks, tokenizer.bos_token_id, stop_ids(tokenizer), self.vocabulary,
            find_empty_thinks(tokenizer),
        )  # fmt: skip
        return Gate(policy, self.task, known)


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready for the model.

    Attributes:
        train: encoded training rows.
        validation: encoded validation rows; empty if there are none.
        prompt_format: how prompts are laid out; None where there are none.
        max_length: in tokens.
        table: the training rows as they were read; `Encoded.row` counts these.
        facts: what summary.json says of the data.
        choices: lines for the screen.
        findings: what the gate found.
        workspace: the temporary directory of rows that are not kept; it goes with this object.
        stream: the `RowStream` that is trained on, of which `train` are the first rows; or None.
    """

    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    prompt_format: PromptFormat | None
    max_length: int
    table: Table
    facts: dict[str, Any] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    findings: tuple[Finding, ...] = ()
    workspace: Any = None
    stream: Any = None
