"""Convert loaded examples to encoded rows: encode, limit the length, run the data checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.files import rows_fingerprint
from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.encode import Encoded, PromptFormat
from ftlevel.data.encoding.fit import FittedRows
from ftlevel.data.formats.convert import convert_rows
from ftlevel.data.gate import Finding, explain_stop
from ftlevel.data.gate.checks import flat_batches
from ftlevel.data.prepare.encoder import Encoder, EncodingContext, PreparedData, Progress
from ftlevel.data.prepare.loading import LoadedExamples
from ftlevel.data.sources.lines import STDIN
from ftlevel.errors import ConfigError, InputError
from ftlevel.task import Task


def prepare_examples(
    loaded: LoadedExamples,
    config: DataConfig,
    context: EncodingContext,
    folder: Path | None,
    progress: Progress,
) -> PreparedData:
    """Encode the examples, apply the length limit, and run the data checks.

    Rows are written to `folder`; None stores them in memory. Raises `InputError` if a check stops
    the run.
    """
    task, tokenizer, lenient = context.task, context.tokenizer, context.lenient
    prompt_format = _with_system(
        task.prompt_format(loaded.format, context.kind, tokenizer), config.system
    )
    if prompt_format is not None:
        prompt_format = prompt_format.resolve_separator(loaded.train, context.prompt_version)
    encoder = Encoder(
        task,
        context.kind,
        tokenizer,
        config,
        context.bounds,
        prompt_format,
        loaded.labels,
        folder,
        progress,
        lenient=lenient,
    )
    gate = context.gate(config.gate)
    tables = loaded.splits
    fitted = encoder(loaded.train, tables.train)
    kept, found = gate.check_split("train", fitted, loaded.train, tables.train)
    findings = [*loaded.findings, *found]
    validation: Sequence[Encoded] = []
    dropped = split = 0
    if loaded.validation and tables.validation:
        held_out = encoder.for_held_out("validation")(loaded.validation, tables.validation)
        dropped, split = held_out.dropped, held_out.split
        validation, found = gate.check_held_out(
            "validation", held_out, loaded.validation, tables.validation, fitted.digests
        )
        findings += found
        fitted = replace(fitted, max_length=max(fitted.max_length, held_out.max_length))
    if tables.test is not None:
        examples, _ = convert_rows(tables.test, loaded.format)
        findings += gate.find_leaks("test", encoder.digest(examples), fitted.digests, tables.test)[
            1
        ]
    stops = [explain_stop(finding) for finding in findings if finding.action == "stop"]
    if stops and not lenient:
        raise InputError(stops)
    facts = _facts(loaded, task, fitted, kept, validation) | {
        "validation_dropped": dropped,
        "validation_split": split,
        "gate": [finding.to_dict() for finding in findings],
    }
    if fitted.stops:  # a preview continues
        facts["stops"] = fitted.stops
    choices = _choices(loaded, task, fitted, validation, facts)
    if prompt_format is not None:
        choices.append(Choice("prompt", prompt_format.kind, prompt_format.instruction))
        if prompt_format.system:
            choices.append(
                Choice("system", prompt_format.system, "where a row has none of its own")
            )
    choices += _changes(task, fitted, facts)
    choices += [_gate_choice(finding) for finding in findings]
    return PreparedData(
        kept,
        validation,
        prompt_format,
        fitted.max_length,
        tables.train,
        facts,
        choices,
        tuple(findings),
    )


def _with_system(prompt_format: PromptFormat | None, system: str | None) -> PromptFormat | None:
    """Set the system prompt; raise `ConfigError` if the format has no turns."""
    if not system:
        return prompt_format
    if prompt_format is None or prompt_format.kind == "seq2seq":
        raise ConfigError("--system needs a model that generates answers. Drop it.")
    return replace(prompt_format, system=system)


_DONE = {"drop": "dropped", "warn": "kept", "stop": "stops the run", "fold": "made one"}


def _gate_choice(finding: Finding) -> Choice:
    """Return the log line of a finding, with the flag that changes its action."""
    other = f"--set data.gate.{finding.name}=…"
    return Choice("data check", str(finding), f"{_DONE[finding.action]}; {other}")


_OF_NO_TASK = {"problem_type": None, "unanswerable": False, "target_language": ""}
"""Default values of facts that only some tasks provide."""


def _facts(
    loaded: LoadedExamples,
    task: Task,
    fitted: FittedRows,
    kept: Sequence[Encoded],
    validation: Sequence[Encoded],
) -> dict[str, Any]:
    refused = len(fitted.rows) - len(kept)
    sizes = [
        (flat.ids.lengths.sum(), flat.supervised().sum(), np.max(flat.ids.lengths))
        for flat in flat_batches(kept)
    ]
    tokens, supervised, longest = zip(*sizes, strict=True)
    held = loaded.splits.validation
    return {
        "name": loaded.splits.name,
        "format": loaded.format.description,
        "train_rows": len(kept),
        "validation_rows": len(validation),
        "tokens": int(sum(tokens)),
        "supervised": int(sum(supervised)),
        "longest": int(max(longest)),
        "max_length": fitted.max_length,
        "overlong": fitted.overlong,
        "dropped": fitted.dropped + refused + len(loaded.splits.train.dropped),
        "shortened": fitted.shortened,
        "split": fitted.split,
        "fingerprint": rows_fingerprint(loaded.splits.train.rows),
        "validation_fingerprint": rows_fingerprint(held.rows) if held is not None else None,
        "labels": list(loaded.labels.names) if loaded.labels else [],
        **_OF_NO_TASK,
        **task.facts(loaded),
    }


def _choices(
    loaded: LoadedExamples,
    task: Task,
    fitted: FittedRows,
    validation: Sequence[Encoded],
    facts: Mapping[str, Any],
) -> list[Choice]:
    held = (
        f"{len(validation):,} for validation"
        if validation
        else ("no validation rows: --validation-split 0.05 would hold some out")
    )
    name = "stdin" if loaded.splits.name == STDIN else loaded.splits.name
    choices = [
        Choice("data", name, f"{facts['train_rows']:,} rows; {held}"),
        Choice("columns", loaded.format.description, loaded.why),
        *loaded.choices,
        Choice("max length", f"{fitted.max_length:,} tokens", fitted.reason),
    ]
    if loaded.labels is not None:
        choices.append(Choice("labels", f"{len(loaded.labels)}", ", ".join(facts["labels"][:8])))
    return [*choices, *task.describe_rows(loaded, facts)]


def _changes(task: Task, fitted: FittedRows, facts: Mapping[str, Any]) -> list[Choice]:
    """Return the log lines about rows that were dropped, truncated or split."""
    counts = {
        "dropped": facts["dropped"],
        "of validation dropped, beyond the max length": facts["validation_dropped"],
        f"of validation {task.split_text}": facts["validation_split"],
        f"shortened at {fitted.shortened_at}": fitted.shortened,
        task.split_text: fitted.split,
    }
    return [Choice("rows changed", f"{count:,} {what}") for what, count in counts.items() if count]
