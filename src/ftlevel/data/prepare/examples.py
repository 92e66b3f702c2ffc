"""From the data section of the configuration to encoded rows, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.fingerprint import rows_fingerprint
from ftlevel.config import DataConfig
from ftlevel.config.choices import Choice
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import Bounds, Fitted
from ftlevel.data.encoding.prompts import PromptFormat, choose_format
from ftlevel.data.encoding.tags import find_orphans
from ftlevel.data.formats.detect import Format, detect_format
from ftlevel.data.formats.examples import convert_rows, to_examples
from ftlevel.data.formats.labels import LabelSet, build_label_set, check_labels, find_unlabelled
from ftlevel.data.formats.languages import Language
from ftlevel.data.formats.problems import choose_problem_type
from ftlevel.data.gate import Finding, explain_stop
from ftlevel.data.gate.duplicates import example_keys
from ftlevel.data.gate.flat import flat_batches
from ftlevel.data.gate.gate import Gate, settle_faults, stop_ids
from ftlevel.data.prepare.encoder import Encoder
from ftlevel.data.prepare.language_choice import find_languages, language_choice
from ftlevel.data.prepare.parallel import Progress
from ftlevel.data.sources.splits import Splits, hold_out, join_splits, load_splits
from ftlevel.data.sources.table import BadRow, Table, settle
from ftlevel.errors import InputError
from ftlevel.tasks import Task
from ftlevel.tasks.translation import name_languages

_BUILTIN_KIND = {"summarization": "summarization"}
BUILTIN_ROWS = 192
"""Training rows taken from the built-in set where the user gives no number: a quick first run."""


@dataclass(frozen=True)
class Loaded:
    """The rows as read, before a tokenizer sees them.

    Attributes:
        splits: tables of the splits.
        format: what the columns are.
        train: examples of the training split.
        validation: examples of the validation split, or None.
        labels: the classes or tags, or None.
        languages: of source and target, where they are known.
        choices: lines for the screen about the labels and languages.
        findings: rows that nothing could be learned from.
    """

    splits: Splits
    format: Format
    train: Sequence[Any]
    validation: Sequence[Any] | None
    labels: LabelSet | None
    languages: tuple[Language, Language] | None = None
    choices: list[Choice] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def unanswerable(self) -> bool:
        """Whether there are questions without an answer among the training rows."""
        return self.format.produces == "question" and any(not q.answers for q in self.train)

    @property
    def target_language(self) -> str:
        """ISO 639-1 code of the target; "" if unknown."""
        return self.languages[1].code if self.languages else ""


@dataclass(frozen=True)
class Prepared:
    """Rows that are ready for the model.

    Attributes:
        train: encoded training rows.
        validation: encoded validation rows; empty if there are none.
        prompt_format: how prompts are laid out; None where there are none.
        max_length: in tokens.
        facts: what summary.json says of the data.
        choices: lines for the screen.
        findings: what the gate found.
        table: the training rows as they were read; `Encoded.row` counts these.
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


def load_examples(config: DataConfig, task: Task, seed: int, *, lenient: bool = False) -> Loaded:
    """Read the data set and turn its rows into examples of `task`.

    Args:
        config: the data section.
        task: the task.
        seed: of the rows that are held out.
        lenient: leave out and report rows that ought to stop the run, as a preview does.

    Raises:
        InputError: with `path:line`, for whatever cannot be read or learned from.
    """
    return convert_splits(read_splits(config, task, seed), config, task, lenient=lenient)


def convert_splits(splits: Splits, config: DataConfig, task: Task, *, lenient: bool) -> Loaded:
    """Turn the rows of `splits` into examples of `task`; else as `load_examples`."""
    shape = detect_format(splits.train.columns, task.name, config.columns, config.format)
    choices = [Choice("note", note) for note in splits.notes]
    if task.target == "class":
        problem, reason = choose_problem_type(
            splits.train, shape.columns["label"], config.problem_type
        )
        shape = replace(shape, problem_type=problem)
        choices.append(Choice("problem", problem, reason))
    labelled = task.target == "tags" or (
        task.target == "class" and shape.problem_type != "regression"
    )
    convert = Converter(config, shape, labelled, task.target == "tags", lenient)
    train, examples = convert("train", splits.train, None)
    labels = build_label_set(examples, train, shape.columns[convert.label]) if labelled else None
    if labels is not None and task.target == "tags":
        train, examples = convert.without_orphans(train, examples, labels)
    validation, held_out = splits.validation, None
    if validation is not None:
        validation, held_out = convert("validation", validation, labels)
        if labels is not None:
            check_labels(labels, held_out, validation)
            if task.target == "tags":
                validation, held_out = convert.without_orphans(validation, held_out, labels)
    languages = find_languages(config, shape) if task.name == "translation" else None
    if task.name == "translation":
        choices.append(language_choice(languages))
    kept = Splits(train, validation, splits.test, splits.name, splits.notes)
    return Loaded(kept, shape, examples, held_out, labels, languages, choices, convert.findings)


@dataclass
class Converter:
    """Turns tables into examples; what has to be left out is collected in `findings`."""

    config: DataConfig
    shape: Format
    labelled: bool
    tags: bool
    lenient: bool
    findings: list[Finding] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The column of what is learned."""
        return "tags" if self.tags else "label"

    def __call__(
        self, split: str, table: Table, labels: LabelSet | None
    ) -> tuple[Table, Sequence[Any]]:
        """Return the rows that can be learned from, and their examples."""
        examples, bad = convert_rows(table, self.shape)
        if self.labelled and (self.lenient or self.config.gate.unknown_label == "drop"):
            bad += find_unlabelled(labels, examples, table, self.shape.columns[self.label])
        if not bad:
            return table, examples
        return self._settled(split, table, bad)

    def without_orphans(
        self, table: Table, examples: Sequence[Any], labels: LabelSet
    ) -> tuple[Table, Sequence[Any]]:
        """Refuse rows whose tags break BIO, or drop them if the configuration says so."""
        orphans = find_orphans(examples, labels.names, table)
        if not orphans:
            return table, examples
        table = settle(table, orphans, self.config.on_bad_row)
        return table, to_examples(table, self.shape)

    def _settled(self, split: str, table: Table, bad: list[BadRow]) -> tuple[Table, Sequence[Any]]:
        table, found = settle_faults(table, bad, self.config, split, lenient=self.lenient)
        self.findings += found
        return table, to_examples(table, self.shape)


def read_splits(config: DataConfig, task: Task, seed: int) -> Splits:
    """Return the splits as far as the configuration wants them."""
    parts = [_read_one(name, config, task) for name in (config.dataset, *config.also)]
    splits = parts[0] if len(parts) == 1 else join_splits(parts, config.mix, seed)
    if config.validation_split:
        splits = hold_out(splits, config.validation_split, seed)
    train, validation = splits.train, splits.validation
    if config.max_samples and config.max_samples < len(train):
        train = replace(train.take(range(config.max_samples)), dropped=train.dropped)
    if validation is not None and config.max_eval_samples:
        validation = validation.take(range(min(len(validation), config.max_eval_samples)))
    return Splits(train, validation, splits.test, splits.name, splits.notes)


def _read_one(name: str, config: DataConfig, task: Task) -> Splits:
    builtin = name.startswith("builtin:")
    return load_splits(
        name,
        split=config.split,
        subset=_BUILTIN_KIND.get(task.name) if builtin and not config.subset else config.subset,
        on_bad_row=config.on_bad_row,
        max_samples=BUILTIN_ROWS if builtin and config.max_samples is None else None,
    )


@dataclass(frozen=True)
class Asked:
    """What decides the rows beside the data section.

    Attributes:
        task: the task.
        kind: kind of the model.
        tokenizer: the model's tokenizer.
        vocabulary: rows of the model's embedding.
        bounds: of a row's length: what the model and its method leave to the text, and the memory.
        seed: of rows that are held out, of samples and of masks.
        lenient: leave out and report rows that ought to stop the run, as a preview does.
    """

    task: Task
    kind: str
    tokenizer: Any
    vocabulary: int
    bounds: Bounds
    seed: int
    lenient: bool = False


def prepare_examples(
    loaded: Loaded, config: DataConfig, asked: Asked, folder: Path | None, progress: Progress
) -> Prepared:
    """Encode the examples, make them fit, and let them through the gate.

    Args:
        loaded: what `load_examples` returned.
        config: the data section.
        asked: what else decides the rows.
        folder: where the rows are written; None keeps them in memory.
        progress: told how many examples are encoded.

    Raises:
        InputError: rows do not fit, or the gate found what is to stop the run.
    """
    task, tokenizer, lenient = asked.task, asked.tokenizer, asked.lenient
    prompt_format = _prompt_format(loaded, task, asked.kind, tokenizer)
    encoder = Encoder(
        task, asked.kind, tokenizer, config, asked.bounds, prompt_format, loaded.labels,
        folder, progress, lenient=lenient,
    )  # fmt: skip
    gate = Gate(
        config.gate, task.target, tokenizer.bos_token_id, stop_ids(tokenizer), asked.vocabulary
    )
    tables = loaded.splits
    fitted = encoder(loaded.train, tables.train)
    kept, found = gate.check_split("train", fitted, loaded.train, tables.train)
    findings = [*loaded.findings, *found]
    validation: Sequence[Encoded] = []
    dropped = 0
    if loaded.validation and tables.validation:
        held_out = encoder.dropping("validation")(loaded.validation, tables.validation)
        dropped = held_out.dropped
        validation, found = gate.check_held_out(
            "validation", held_out, loaded.validation, tables.validation, fitted.keys
        )
        findings += found
        fitted = replace(fitted, max_length=max(fitted.max_length, held_out.max_length))
    if tables.test is not None:
        examples, _ = convert_rows(tables.test, loaded.format)
        findings += gate.find_leaks("test", example_keys(examples), fitted.keys, tables.test)[1]
    stops = [explain_stop(finding) for finding in findings if finding.action == "stop"]
    if stops and not lenient:
        raise InputError(stops)
    facts = _facts(loaded, fitted, kept, validation) | {
        "validation_dropped": dropped,
        "gate": [finding.to_dict() for finding in findings],
    }
    if fitted.stops:  # of a preview, which goes on
        facts["stops"] = fitted.stops
    choices = _choices(loaded, fitted, validation, facts, prompt_format)
    choices += [_gate_choice(finding) for finding in findings]
    return Prepared(
        kept, validation, prompt_format, fitted.max_length, tables.train, facts, choices,
        tuple(findings),
    )  # fmt: skip


_DONE = {"drop": "dropped", "warn": "kept", "stop": "stops the run"}


def _gate_choice(finding: Finding) -> Choice:
    """Return the line for what the gate found, with the flag that would change what is done."""
    other = f"--set data.gate.{finding.name}=…"
    return Choice("data check", str(finding), f"{_DONE[finding.action]}; {other}")


def _prompt_format(loaded: Loaded, task: Task, kind: str, tokenizer: Any) -> PromptFormat | None:
    if task.target != "text":
        return None
    instruction, cue = task.instruction, task.answer_cue
    if task.name == "translation" and "source" not in loaded.format.columns:
        instruction = cue = ""  # the rows' own prompts say what to do
    elif loaded.languages is not None:
        instruction = name_languages(kind, *(language.name for language in loaded.languages))
    return choose_format(tokenizer, kind, instruction, cue)


def _facts(
    loaded: Loaded, fitted: Fitted, kept: Sequence[Encoded], validation: Sequence[Encoded]
) -> dict[str, Any]:
    produces = loaded.format.produces
    refused = len(fitted.rows) - len(kept)
    sizes = [
        (flat.ids.lengths.sum(), flat.supervised().sum(), flat.ids.lengths.max())
        for flat in flat_batches(kept)
    ]
    tokens, supervised, longest = zip(*sizes, strict=True)
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
        "labels": list(loaded.labels.names) if loaded.labels else [],
        "problem_type": loaded.format.problem_type if produces == "labelled" else None,
        "unanswerable": loaded.unanswerable,
        "target_language": loaded.target_language,
    }


def _choices(
    loaded: Loaded,
    fitted: Fitted,
    validation: Sequence[Encoded],
    facts: dict[str, Any],
    prompt_format: PromptFormat | None,
) -> list[Choice]:
    held = (
        f"{len(validation):,} for validation"
        if validation
        else ("no validation rows: --validation-split 0.05 would hold some out")
    )
    tokens, supervised = facts["tokens"], facts["supervised"]
    produces = loaded.format.produces
    choices = [
        Choice("data", loaded.splits.name, f"{facts['train_rows']:,} rows; {held}"),
        Choice("columns", loaded.format.description),
        *loaded.choices,
        Choice("max length", f"{fitted.max_length:,} tokens", fitted.reason),
    ]
    if loaded.labels is not None:
        choices.append(Choice("labels", f"{len(loaded.labels)}", ", ".join(facts["labels"][:8])))
    if produces == "question":
        none = sum(not question.answers for question in loaded.train)
        aside = f"{none:,} without an answer" if none else "each has an answer"
        choices.append(Choice("questions", f"{len(loaded.train):,}", aside))
    elif produces != "labelled":
        share = f"{supervised:,} supervised, {supervised / tokens:.0%}"
        choices.append(Choice("tokens", f"{tokens:,} an epoch", share))
    if prompt_format is not None:
        choices.append(Choice("prompt", prompt_format.kind, prompt_format.instruction))
    splits = "more windows than questions" if produces == "question" else "split into several"
    for count, what in (
        (facts["dropped"], "dropped"),
        (facts["validation_dropped"], "of validation dropped, beyond the max length"),
        (fitted.shortened, f"shortened at {fitted.shortened_at}"),
        (fitted.split, splits),
    ):
        if count:
            choices.append(Choice("rows changed", f"{count:,} {what}"))
    return choices
