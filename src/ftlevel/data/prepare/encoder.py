"""What a task encodes its examples with: the model's tokenizer, the lengths, and where rows go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ftlevel.config import DataConfig
from ftlevel.data.encoding.chat import special_texts
from ftlevel.data.encoding.encode import Encoded, RowError
from ftlevel.data.encoding.fit import Bounds, Fitted, check_some_left, fit_rows, fit_targets
from ftlevel.data.encoding.prompts import PromptFormat
from ftlevel.data.formats.labels import LabelSet
from ftlevel.data.gate.digests import Digests
from ftlevel.data.gate.texts import TextsKnown
from ftlevel.data.prepare.parallel import (
    Encode,
    Progress,
    be_silent,
    digests_path,
    encode_to_store,
)
from ftlevel.data.sources.table import Table
from ftlevel.errors import InputError
from ftlevel.task import Task

_LONG = 1_000_000  # characters of an example that take seconds


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
        whole: whether rows are bound by `bounds` alone, whatever length training had.
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
    whole: bool = False

    def __call__(self, examples: Sequence[Any], table: Table) -> Fitted:
        """Encode `examples` of `table` and make them fit.

        Raises:
            InputError: rows do not fit and may not be dropped, or cannot be encoded.
        """
        if not self.tokenizer.is_fast and self.task.needs_offsets:
            raise InputError(
                f"the tokenizer of {self.tokenizer.name_or_path} does not tell which characters "
                f"a token covers, which --task {self.task.name} needs. Use a model with a "
                "tokenizer.json."
            )
        try:
            fitted = self.task.encode(self, examples, table)
        except RowError as error:
            raise InputError(f"{table.where(error.row)}: {error.reason}") from error
        return replace(fitted, digests=self._digests(examples))

    def holding_out(self, split: str) -> Encoder:
        """Return an encoder of `split`, of whose rows the answers count.

        Rows that do not fit are dropped, or split.
        """
        overlong = "split" if self.config.overlong == "split" else "drop"
        config = self.config.model_copy(update={"overlong": overlong, "train_on_inputs": False})
        return replace(self, config=config, split=split)

    def digest(self, examples: Sequence[Any]) -> Digests:
        """Return what the gate keeps of the texts of `examples`."""
        return Digests.of(examples, self._texts_known)

    @property
    def _texts_known(self) -> TextsKnown:
        bos = self.tokenizer.bos_token
        return TextsKnown((*special_texts(self.tokenizer), *([bos] if bos else [])))

    def collect(self, encode: Encode, examples: Sequence[Any]) -> Sequence[Encoded]:
        """Return the rows that `encode` makes of all examples, in a file if there is a folder."""
        if self.folder is None:
            long = any(len(example.key_text) > _LONG for example in examples)
            if long:  # nothing else says for seconds that it is at work
                self.progress(0, len(examples))
            rows = encode(examples)
            if long:
                self.progress(len(examples), len(examples))
            return rows
        path = self.folder / f"{self.split}.arrow"
        return encode_to_store(
            path, encode, examples, self._texts_known, self.config.num_proc, self.progress
        )

    def _digests(self, examples: Sequence[Any]) -> Digests:
        """Return the digests of `examples`, which `collect` has written if it was called."""
        path = self.folder and digests_path(self.folder / f"{self.split}.arrow")
        return Digests.at(path) if path and path.exists() else self.digest(examples)

    def fit(self, rows: Sequence[Encoded], table: Table) -> Fitted:
        """Make `rows` fit as the data section says."""
        config = self.config
        fit = partial(fit_rows, rows, "auto" if self.whole else config.max_length, self.bounds)
        try:
            fitted = fit(config.overlong, table.where)
        except InputError as error:
            if not self.lenient:
                raise
            fitted = replace(fit("drop", table.where), stops=str(error))
        if not self.partly:
            check_some_left(fitted, rows)
        return fitted

    def fit_targets(self, fitted: Fitted, table: Table) -> Fitted:
        """Make the targets of an encoder-decoder fit, whose sources do."""
        longest = self.config.max_target_length
        fit, stops = partial(fit_targets, fitted.rows, longest), fitted.stops
        try:
            kept, dropped = fit(self.config.overlong, table.where)
        except InputError as error:
            if not self.lenient:
                raise
            stops = stops or str(error)
            kept, dropped = fit("drop", table.where)
        if not len(kept) and not self.partly:
            raise InputError(f"no target is within {longest:,} tokens.")
        return replace(fitted, rows=kept, dropped=fitted.dropped + dropped, stops=stops)

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
