"""The rows that a trained model is scored on, encoded as training encodes its validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import Bounds
from ftlevel.data.encoding.masking import MaskedRows
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.formats.detect import detect_format
from ftlevel.data.formats.labels import LabelSet, check_labels
from ftlevel.data.gate.duplicates import example_keys
from ftlevel.data.gate.gate import Gate, stop_ids
from ftlevel.data.prepare.encoder import Encoder
from ftlevel.data.prepare.examples import Converter, read_splits
from ftlevel.data.prepare.language_choice import find_languages
from ftlevel.data.sources.splits import Splits
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.tasks import TASKS

_DEFAULT_SPLIT = "validation"


@dataclass(frozen=True)
class HeldOut:
    """Rows to score.

    Attributes:
        table: the rows as they were read.
        rows: encoded.
        split: which split they are.
        dropped: how many rows were too long.
        language: ISO 639-1 code of the target; "" if unknown.
        source: name of the data set.
    """

    table: Table
    rows: Sequence[Encoded]
    split: str
    dropped: int
    language: str
    source: str


def load_held_out(
    config: DataConfig,
    card: AdapterCard,
    split: str | None,
    *,
    kind: str,
    tokenizer: Any,
    positions: int | None,
    seed: int,
) -> HeldOut:
    """Read and encode the rows to score.

    Args:
        config: where the rows are, and how training cut them.
        card: of what is scored: its task, prompt, labels.
        split: as wished; None takes validation, or a file as a whole.
        kind: kind of the model.
        tokenizer: its tokenizer.
        positions: longest sequence that it takes, or None.
        seed: of the training: it held rows out, and masked them.

    Raises:
        InputError: there are no such rows, or they are not of the task.
    """
    task = TASKS[card.task]
    splits = read_splits(config, task, seed)
    table, name = _choose(splits, split)
    if config.max_eval_samples is not None:
        table = table.take(range(min(len(table), config.max_eval_samples)))
    shape = detect_format(table.columns, task.name, config.columns, config.format)
    if task.target == "class":
        shape = replace(shape, problem_type=card.options["problem_type"])
    labels = LabelSet(tuple(card.labels)) if card.labels else None
    convert = Converter(config, shape, labels is not None, task.target == "tags", lenient=False)
    table, examples = convert(name, table, labels)
    if labels is not None:
        check_labels(labels, examples, table)
        if task.target == "tags":
            table, examples = convert.without_orphans(table, examples, labels)
    languages = find_languages(config, shape) if task.name == "translation" else None
    prompt = PromptFormat(**card.prompt) if card.prompt else None
    encoder = Encoder(task, kind, tokenizer, config, Bounds(positions), prompt, labels).dropping(
        name
    )
    fitted = encoder(examples, table)
    rows: Sequence[Encoded] = fitted.rows
    if name == "validation":  # as training let them through
        _, learned = convert("train", splits.train, labels)
        gate = Gate(
            config.gate, task.target, tokenizer.bos_token_id, stop_ids(tokenizer), len(tokenizer)
        )
        rows, _ = gate.check_held_out(name, fitted, examples, table, example_keys(learned))
    if task.target == "mask":
        rows = MaskedRows(rows, tokenizer, share=config.mlm_probability, seed=seed).fixed()
    language = languages[1].code if languages else ""
    return HeldOut(table, rows, name, fitted.dropped, language, splits.name)


def _choose(splits: Splits, split: str | None) -> tuple[Table, str]:
    """Return the table of `split`, and what it is called."""
    tables = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    there = [name for name, table in tables.items() if table is not None]
    if split is None and there == ["train"]:
        return splits.train, "all rows"
    name = split or _DEFAULT_SPLIT
    table = tables[name]
    if table is None:
        raise InputError(
            f"--split {name}: {splits.name} has none. Splits here: {', '.join(there)}. Name "
            "another, or other rows with --dataset."
        )
    return table, name
