"""Load the splits of a dataset, convert their rows to examples, then encode and check them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.files import rows_fingerprint
from ftlevel.config import DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.fit import FittedRows
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.formats.detect import Format, explain_columns
from ftlevel.data.formats.examples import convert_rows, get_missing_columns, to_examples
from ftlevel.data.formats.labels import (
    LABEL_NORMALIZERS,
    LabelNormalizer,
    LabelSet,
    check_labels,
    create_label_set,
    get_invalid_labels,
    get_label_variants,
    keep_numeric_labels,
)
from ftlevel.data.gate import Finding, create_finding, explain_stop
from ftlevel.data.gate.checks import flat_batches
from ftlevel.data.gate.gate import handle_unusable_rows
from ftlevel.data.prepare.encoder import DataTask, EncodingContext, PreparedData, Progress
from ftlevel.data.sources.lines import CHUNK_ROWS, STDIN
from ftlevel.data.sources.splits import DatasetSplits, hold_out, join_splits, load_splits
from ftlevel.data.sources.streams import refuse_media_columns
from ftlevel.data.sources.table import Table, describe_dropped, handle_bad_rows
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names, quote, reading

BUILTIN_ROWS = 192
"""Default number of training rows of a built-in dataset, for a quick first run."""


@dataclass(frozen=True)
class LoadedData:
    """Examples of all splits, before tokenization.

    `choices` are log lines about the columns, `findings` are about rows without usable content.
    `reason` says why `format` was chosen.
    """

    splits: DatasetSplits
    format: Format
    train: Sequence[Any]
    validation: Sequence[Any] | None
    labels: LabelSet | None
    choices: list[Choice]
    findings: list[Finding]
    reason: str


def load_data(
    config: DataConfig, task: DataTask, seed: int, *, lenient: bool = False
) -> LoadedData:
    """Load the dataset and convert the rows to examples of `task`.

    `seed` selects the validation rows. Rows that would stop the run raise `InputError`, or are
    dropped if `lenient`.
    """
    return convert_splits(read_splits(config, task, seed), config, task, lenient=lenient)


def convert_splits(
    splits: DatasetSplits, config: DataConfig, task: DataTask, *, lenient: bool
) -> LoadedData:
    """Convert the rows of `splits` to examples; arguments as in `load_data`."""
    present = {name for table in splits.tables.values() for name in table.ignored}
    if unknown := [name for name in config.ignore_columns if name not in present]:
        column_names = splits.train.column_names
        raise InputError(
            f"--ignore-columns {unknown[0]}: no such column."
            f"{did_you_mean(unknown[0], column_names)} "
            f"Columns: {join_names(map(quote, column_names))}."
        )
    convert, choices = open_converter(splits.train, config, task, lenient=lenient)
    choices = [*(Choice("note", note) for note in splits.notes), *choices]
    train, examples = convert("train", splits.train, None)
    labels = None
    if convert.label_column is not None:
        examples = convert.merge_label_variants("train", train, examples, config.labels)
        labels = create_label_set(examples, train, convert.label_column, config.labels)
        train, examples = convert.drop_inconsistent_labels(train, examples, labels)
    eval_table, held_out = splits.validation, None
    if eval_table is not None:
        convert_eval = eval_converter(convert, eval_table)
        eval_table, held_out = convert_eval.convert_held_out("validation", eval_table, labels)
    elif splits.corpus is not None:
        raise InputError(
            f"--corpus {config.corpus} is for validation queries, and there are none. Add "
            "--validation-split 0.05, or --qrels FILE."
        )
    splits = replace(splits, train=train, validation=eval_table)
    reason = explain_columns(convert.shape.columns, config.columns, config.format)
    return LoadedData(
        splits, convert.shape, examples, held_out, labels, choices, convert.findings, reason
    )


def eval_converter(convert: Converter, eval_table: Table) -> Converter:
    """Returns the converter for `eval_table`: `convert`, or a new one for rows of `--qrels`."""
    if convert.config.qrels is None:
        return convert
    plain: dict[str, Any] = {"columns": {}, "format": None, "ignore_columns": ()}
    return open_converter(eval_table, convert.config.model_copy(update=plain), convert.task)[0]


def open_converter(
    table: Table, config: DataConfig, task: DataTask, *, lenient: bool = False
) -> tuple[Converter, list[Choice]]:
    """Returns a `Converter` for tables with the same columns as `table`, and log lines."""
    shape = task.get_format(table.column_names, config, table.rows[:CHUNK_ROWS])
    refuse_media_columns(shape.unused, table.rows, table.source)
    shape, choices = task.update_format(shape, table, config)
    return Converter(config, task, shape, shape, lenient), choices


@dataclass
class Converter:
    """Converter of tables to examples in format `shape`, which label corrections may change."""

    config: DataConfig
    task: DataTask
    detected: Format
    shape: Format
    lenient: bool
    findings: list[Finding] = field(default_factory=list)

    @property
    def label_column(self) -> str | None:
        """Column with the class labels, or None."""
        role = self.task.label_role(self.shape)
        return self.shape.columns[role] if role is not None else None

    def __call__(
        self, split: str, table: Table, labels: LabelSet | None
    ) -> tuple[Table, Sequence[Any]]:
        """Returns the usable rows of `table`, and their examples."""
        examples: Sequence[Any]
        table = self._keep_numeric_labels(table, labels)
        examples, bad = convert_rows(table, self.shape)
        column = self.label_column
        if column is not None and (self.lenient or self.config.gate.unknown_label == "drop"):
            bad += get_invalid_labels(labels, examples, table, column)
        if not bad:
            return table, examples
        table, findings = handle_unusable_rows(table, bad, self.config, split, lenient=self.lenient)
        self.findings += findings
        return table, to_examples(table, self.shape)

    def _keep_numeric_labels(self, table: Table, labels: LabelSet | None) -> Table:
        names = self.config.labels if labels is None else labels.names
        return keep_numeric_labels(table, self.label_column, names)

    def convert_held_out(
        self, split: str, table: Table, labels: LabelSet | None
    ) -> tuple[Table, Sequence[Any]]:
        """Convert a split whose classes must be in `labels`; `InputError` for other classes."""
        if labels is not None:
            table = self._keep_numeric_labels(table, labels)
            self.merge_label_variants(
                split, table, convert_rows(table, self.detected)[0], labels.names
            )
        table, examples = self(split, table, labels)
        if labels is None:
            return table, examples
        check_labels(labels, examples, table)
        return self.drop_inconsistent_labels(table, examples, labels)

    def merge_label_variants(
        self, split: str, table: Table, examples: Sequence[Any], names: Sequence[str]
    ) -> Sequence[Any]:
        """Returns `examples`; if the action is fold, with class names for spelling variants.

        `names` are the known classes; without any, the most frequent spelling is the name.
        """
        for check, same in LABEL_NORMALIZERS.items():
            variants = get_label_variants(examples, check, names)
            rows = sorted({row for variant in variants for row in variant.rows})
            locations = [f"{table.where(v.rows[0])}: {v.label!r} is {v.name!r}" for v in variants]
            finding = create_finding(
                check, split, len(rows), len(table), locations, self.config.gate
            )
            if finding is None:
                continue
            self.findings.append(finding)
            if finding.action == "fold":
                names_by_key = {same(name): v.name for v in variants for name in (v.label, v.name)}
                build = LabelNormalizer(self.shape.build, same, names_by_key)
                self.shape = replace(self.shape, build=build)
                examples = convert_rows(table, self.shape)[0]
        return examples

    def drop_inconsistent_labels(
        self, table: Table, examples: Sequence[Any], labels: LabelSet
    ) -> tuple[Table, Sequence[Any]]:
        """Drop rows with invalid BIO tags from table and examples, or raise, as configured."""
        faults = self.task.get_inconsistent_labels(examples, labels, table)
        if not faults:
            return table, examples
        table = handle_bad_rows(table, faults, self.config.on_bad_row)
        return table, to_examples(table, self.shape)


def read_splits(config: DataConfig, task: DataTask, seed: int) -> DatasetSplits:
    """Load and join the datasets, hold out validation rows, and keep the first `max_samples`."""
    parts = [_read_one(name, config, task, config.split) for name in (config.dataset, *config.also)]
    splits = parts[0] if len(parts) == 1 else join_splits(parts, config.mix, seed)
    if config.validation_file is not None:
        table = _read_one(config.validation_file, config, task, None).train
        notes = [*splits.notes, *table.notes, *describe_dropped(table)]
        splits = replace(splits, validation=table, notes=notes)
    if config.qrels is not None or config.corpus is not None:
        splits = task.with_corpus(splits, config)
    splits = hold_out(splits, config.validation_split or 0.0, seed)
    train, eval_table = splits.train, splits.validation
    if config.max_samples:
        train = train.head(config.max_samples)
    if eval_table is not None and config.max_eval_samples:
        eval_table = eval_table.head(config.max_eval_samples)
    return replace(splits, train=train, validation=eval_table)


def read_dataset(
    name: str, config: DataConfig, split: str | None, subset: str = "", limit: int | None = None
) -> DatasetSplits:
    """Load dataset `name` with the settings of `config`; `subset` is used if that has none."""
    with reading(name):
        return load_splits(
            name,
            split=split,
            subset=config.subset or subset or None,
            on_bad_row=config.on_bad_row,
            max_samples=limit,
            input_format=config.input_format,
            ignored=config.ignore_columns,
        )


def _read_one(name: str, config: DataConfig, task: DataTask, split: str | None) -> DatasetSplits:
    if not name.startswith("builtin:"):
        return read_dataset(name, config, split)
    limit = BUILTIN_ROWS if config.max_samples is None else None
    return read_dataset(name, config, split, task.builtin_subset, limit)


def encode_data(
    data: LoadedData,
    config: DataConfig,
    context: EncodingContext,
    cache_dir: Path | None,
    progress: Progress,
) -> PreparedData:
    """Encode the examples, apply the length limit, and run the data checks.

    Rows are written to `cache_dir` if given. Raises `InputError` if a check fails.
    """
    task, lenient = context.task, context.lenient
    prompt_format = task.prompt_format(data.format, context.kind, context.tokenizer)
    prompt_format = _with_system(prompt_format, config.system)
    if prompt_format is not None:
        prompt_format = prompt_format.resolve_separator(data.train)
    options = {"labels": data.labels, "folder": cache_dir, "progress": progress, "lenient": lenient}
    encoder = context.encoder(config, prompt_format, **options)
    gate, splits = context.gate(config.gate), data.splits
    fitted = encoder(data.train, splits.train)
    train, findings = gate.check_split("train", fitted, data.train, splits.train)
    findings = [*data.findings, *findings]
    eval_rows: Sequence[Encoded] = []
    num_dropped = split = unusable = 0
    if data.validation and splits.validation:
        held_out = encoder.for_held_out("validation")(data.validation, splits.validation)
        num_dropped, split = held_out.dropped, held_out.split
        unusable = splits.validation.num_dropped
        eval_rows, more = gate.check_held_out(
            "validation", held_out, data.validation, splits.validation, fitted.digests
        )
        findings += more
        fitted = replace(fitted, max_length=max(fitted.max_length, held_out.max_length))
        findings += gate.check_eval_set(
            data.train, data.validation, splits.corpus, splits.validation
        )
    test, notes = splits.test, list[Choice]()
    if test is not None and (lacking := get_missing_columns(test, data.format)):
        reason = f"has no column {join_names(lacking)}, so its rows are not compared with training"
        notes.append(Choice("note", f"{test.source}: {reason}"))
    elif test is not None:
        examples, bad = convert_rows(test, data.format)
        lines = {row.line for row in bad}
        test = test.take(i for i, line in enumerate(test.lines) if line not in lines)
        findings += gate.get_leaks("test", encoder.digest(examples), fitted.digests, test)[1]
    stops = [explain_stop(finding) for finding in findings if finding.action == "stop"]
    if stops and not lenient:
        raise InputError(stops)
    data_info = _data_info(data, task, fitted, train, eval_rows) | {
        "validation_dropped": num_dropped,
        "validation_split": split,
        "gate": [finding.to_dict() for finding in findings],
    }
    if fitted.stops:  # a preview continues
        data_info["stops"] = fitted.stops
    choices = [*_choices(data, task, fitted, data_info), *notes]
    corpus: Sequence[Encoded] = []
    if splits.corpus is not None:
        corpus, choice = task.encode_corpus(encoder, splits.corpus)
        choices.append(choice)
    if prompt_format is not None:
        choices.append(Choice("prompt", prompt_format.kind, prompt_format.instruction))
        if prompt_format.system:
            choices.append(
                Choice("system", prompt_format.system, "where a row has none of its own")
            )
    counts = {
        "dropped": data_info["dropped"],
        "of validation dropped, unusable": unusable,
        "of validation dropped, beyond the max length": num_dropped,
        f"of validation {task.split_text}": split,
        f"shortened at {fitted.shortened_at}": fitted.shortened,
        task.split_text: fitted.split,
    }
    choices += [
        Choice("rows changed", f"{count:,} {name}") for name, count in counts.items() if count
    ]
    for finding in findings:
        reason = f"{_RESULTS[finding.action]}; {finding.setting}"
        choices.append(Choice("data check", str(finding), reason))
    return PreparedData(
        train,
        eval_rows,
        prompt_format,
        fitted.max_length,
        splits.train,
        data_info,
        choices,
        tuple(findings),
        corpus=corpus,
        validation_table=replace(splits.validation or Table([], [], ""), rows=()),
    )


def _with_system(prompt_format: PromptFormat | None, system: str | None) -> PromptFormat | None:
    if not system:
        return prompt_format
    if prompt_format is None or prompt_format.kind == "seq2seq":
        raise ConfigError("--system needs a model that generates answers. Drop it.")
    return replace(prompt_format, system=system)


_RESULTS = {"drop": "dropped", "warn": "kept", "stop": "stops the run", "fold": "made one"}

_TASK_INFO = {"problem_type": None, "unanswerable": False, "target_language": ""}
"""Default values of entries that only some tasks provide."""


def _data_info(
    data: LoadedData,
    task: DataTask,
    fitted: FittedRows,
    train: Sequence[Encoded],
    eval_rows: Sequence[Encoded],
) -> dict[str, Any]:
    removed = len(fitted.rows) - len(train)
    sizes = [
        (flat.ids.lengths.sum(), flat.supervised().sum(), np.max(flat.ids.lengths))
        for flat in flat_batches(train)
    ]
    tokens, supervised, longest = zip(*sizes, strict=True)
    return {
        "name": data.splits.name,
        "format": data.format.description,
        "train_rows": len(train),
        "validation_rows": len(eval_rows),
        "tokens": int(sum(tokens)),
        "supervised": int(sum(supervised)),
        "longest": int(max(longest)),
        "max_length": fitted.max_length,
        "overlong": fitted.overlong,
        "dropped": fitted.dropped + removed + data.splits.train.num_dropped,
        "shortened": fitted.shortened,
        "split": fitted.split,
        "fingerprint": rows_fingerprint(data.splits.train.rows),
        "validation_fingerprint": data.splits.validation_fingerprint,
        "labels": list(data.labels.names) if data.labels else [],
        **_TASK_INFO,
        **task.data_info(data),
    }


def _choices(
    data: LoadedData, task: DataTask, fitted: FittedRows, data_info: Mapping[str, Any]
) -> list[Choice]:
    held_out = (
        f"{data_info['validation_rows']:,} for validation"
        if data_info["validation_rows"]
        else "every validation row was dropped"
        if data.validation
        else "no validation rows: --validation-split 0.05 holds some out"
    )
    name = "stdin" if data.splits.name == STDIN else data.splits.name
    choices = [
        Choice("data", name, f"{data_info['train_rows']:,} rows; {held_out}"),
        Choice("columns", data.format.description, data.reason),
        *data.choices,
        Choice("max length", f"{fitted.max_length:,} tokens", fitted.reason),
    ]
    if data.labels is not None:
        choices.append(Choice("labels", f"{len(data.labels)}", join_names(data_info["labels"], 8)))
    return [*choices, *task.describe_rows(data, data_info)]
