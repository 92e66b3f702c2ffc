"""From examples to encoded rows of the right length, one function a kind of target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.config import DataConfig
from ftlevel.data.encoding.encode import (
    Encoded,
    RowError,
    encode_causal,
    encode_labelled,
    encode_seq2seq,
)
from ftlevel.data.encoding.fit import Bounds, Fitted, check_some_left, fit_rows, fit_targets
from ftlevel.data.encoding.masking import encode_masked
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.encoding.tags import encode_tagged
from ftlevel.data.encoding.windows import USUAL_LENGTH, encode_questions
from ftlevel.data.formats.examples import Labelled
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.gate.duplicates import Keys, example_keys
from ftlevel.data.prepare.parallel import Encode, Progress, be_silent, encode_to_store, keys_path
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.tasks import Task


@dataclass(frozen=True)
class Encoder:
    """What encoding needs beside the examples.

    Attributes:
        task: the task.
        kind: kind of the model.
        tokenizer: the model's.
        config: the data section.
        bounds: what the model and the machine allow a row.
        prompt_format: how prompts are laid out; None where there are none.
        labels: the classes or tags, or None.
        folder: where the rows of many examples are written; None keeps them in memory.
        progress: told how many examples are encoded.
        partly: whether the examples are some of many, of which none need be left.
        lenient: whether rows that ought to stop the run are dropped, and this is said.
        split: names the file, so that no split writes over another.
    """

    task: Task
    kind: str
    tokenizer: Any
    config: DataConfig
    bounds: Bounds
    prompt_format: PromptFormat | None = None
    labels: LabelSet | None = None
    folder: Path | None = None
    progress: Progress = be_silent
    partly: bool = False
    lenient: bool = False
    split: str = "train"

    def __call__(self, examples: Sequence[Any], table: Table) -> Fitted:
        """Encode `examples` of `table` and make them fit.

        Raises:
            InputError: rows do not fit and may not be dropped, or cannot be encoded.
        """
        if not self.tokenizer.is_fast and self.task.target in ("tags", "span", "mask"):
            raise InputError(
                f"the tokenizer of {self.tokenizer.name_or_path} does not tell which characters "
                f"a token covers, which --task {self.task.name} needs. Use a model with a "
                "tokenizer.json."
            )
        try:
            fitted = _ENCODERS[self.task.target](self, examples, table)
        except RowError as error:
            raise InputError(f"{table.where(error.row)}: {error.reason}") from error
        return fitted if self.partly else replace(fitted, keys=self._keys(examples))

    def dropping(self, split: str) -> Encoder:
        """Return an encoder of `split` that drops rows which do not fit."""
        config = self.config.model_copy(update={"overlong": "drop"})
        return replace(self, config=config, split=split)

    def collect(self, encode: Encode, examples: Sequence[Any]) -> Sequence[Encoded]:
        """Return the rows that `encode` makes of all examples, in a file if there is a folder."""
        if self.folder is None:
            return encode(examples)
        path = self.folder / f"{self.split}.arrow"
        return encode_to_store(path, encode, examples, self.config.num_proc, self.progress)

    def _keys(self, examples: Sequence[Any]) -> Keys:
        """Return the keys of `examples`, which `collect` has written if it was called."""
        path = self.folder and keys_path(self.folder / f"{self.split}.arrow")
        return np.memmap(path, np.uint64, "r") if path and path.exists() else example_keys(examples)

    def fit(self, rows: Sequence[Encoded], table: Table) -> Fitted:
        """Make `rows` fit as the data section says."""
        config = self.config
        fit = partial(fit_rows, rows, config.max_length, self.bounds)
        try:
            fitted = fit(config.overlong, table.where)
        except InputError as error:
            if not self.lenient:
                raise
            fitted = replace(fit("drop", table.where), stops=str(error))
        if not self.partly:
            check_some_left(fitted, rows)
        return fitted

    def limit(self, usual: int | None) -> int | None:
        """Return the longest row in tokens that the user or the model allows.

        Args:
            usual: what it is at most where the user gives no number.

        Raises:
            InputError: the user's number is beyond the model's positions.
        """
        if isinstance(wish := self.config.max_length, int):
            self.bounds.check(wish)
            return wish
        known = [length for length in (usual, self.bounds.tightest[0]) if length is not None]
        return min(known, default=None)


def _encode_some(
    encode: Callable[..., list[Encoded]], tokenizer: Any, prompt: PromptFormat, some: Sequence[Any]
) -> list[Encoded]:
    return encode(tokenizer, some, prompt)


def _encode_texts(encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
    if encoder.prompt_format is None:
        raise TypeError("a task that writes text has a prompt format")
    seq2seq = encoder.kind == "encoder-decoder"
    encode = encode_seq2seq if seq2seq else encode_causal
    encode_some = partial(_encode_some, encode, encoder.tokenizer, encoder.prompt_format)
    fitted = encoder.fit(encoder.collect(encode_some, examples), table)
    if not seq2seq:
        return fitted
    longest = encoder.config.max_target_length
    fit, stops = partial(fit_targets, fitted.rows, longest), fitted.stops
    try:
        kept, dropped = fit(encoder.config.overlong, table.where)
    except InputError as error:
        if not encoder.lenient:
            raise
        stops = stops or str(error)
        kept, dropped = fit("drop", table.where)
    if not len(kept) and not encoder.partly:
        raise InputError(f"no target is within {longest:,} tokens.")
    return replace(fitted, rows=kept, dropped=fitted.dropped + dropped, stops=stops)


def _encode_classes(encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
    def target_of(example: Labelled) -> int | float | tuple[float, ...]:
        label = example.label
        if isinstance(label, float):
            return label
        if encoder.labels is None:
            raise TypeError("a class has a label set")
        if isinstance(label, tuple):
            true = {encoder.labels.id_of(name) for name in label}
            return tuple(float(i in true) for i in range(len(encoder.labels)))
        return encoder.labels.id_of(label)

    def encode(some: Sequence[Any]) -> list[Encoded]:
        return encode_labelled(encoder.tokenizer, some, target_of)

    return encoder.fit(encoder.collect(encode, examples), table)


def _encode_tags(encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
    if encoder.labels is None:
        raise TypeError("tags have a label set")
    labels = encoder.labels

    def encode(some: Sequence[Any]) -> list[Encoded]:
        return encode_tagged(encoder.tokenizer, some, labels)

    return encoder.fit(encoder.collect(encode, examples), table)


def _encode_questions(encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
    length = encoder.limit(USUAL_LENGTH) or USUAL_LENGTH
    windows, dropped = encode_questions(
        encoder.tokenizer,
        examples,
        length=length,
        stride=encoder.config.doc_stride,
        separator=question_separator(encoder.kind),
        where=table.where,
        drop=encoder.lenient or encoder.config.overlong == "drop",
    )
    asked = len({window.row for window in windows})
    given = isinstance(encoder.config.max_length, int)
    return Fitted(
        windows,
        length,
        "" if given else "auto: windows as in SQuAD's baselines, within the model's positions",
        dropped=dropped,
        split=len(windows) - asked,
        overlong=encoder.config.overlong,
    )


def _encode_blocks(encoder: Encoder, examples: Sequence[Any], table: Table) -> Fitted:
    limit = encoder.limit(None)
    rows = encode_masked(encoder.tokenizer, examples, limit)
    if not rows:
        raise InputError(f"{table.source}: no text has a token to hide.")
    longest = max(len(row.input_ids) for row in rows)
    pieces: dict[int, int] = {}
    for row in rows:
        pieces[row.row] = pieces.get(row.row, 0) + 1
    split = sum(count > 1 for count in pieces.values())
    reason = f"auto: {encoder.bounds.tightest[1]}" if split else "auto: the longest row"
    given = isinstance(encoder.config.max_length, int)
    length = limit if given and limit else longest
    overlong = encoder.config.overlong
    return Fitted(rows, length, "" if given else reason, split=split, overlong=overlong)


_ENCODERS: dict[str, Callable[[Encoder, Sequence[Any], Table], Fitted]] = {
    "text": _encode_texts,
    "class": _encode_classes,
    "tags": _encode_tags,
    "span": _encode_questions,
    "mask": _encode_blocks,
}


def question_separator(kind: str) -> str:
    """Return what ends a question for a model of `kind`: a decoder has no token for it."""
    return "\n" if kind == "decoder" else ""
