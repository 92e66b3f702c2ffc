"""Run the data checks on a split, and drop or report the rows they flag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ftlevel.config import DataConfig, GateConfig
from ftlevel.config.gate import Action
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import FittedRows
from ftlevel.data.encoding.store import select_rows
from ftlevel.data.gate import MAX_SHOWN, Finding, build_finding, duplicates, wordings
from ftlevel.data.gate.checks import (
    TEXT_CHECKS,
    TOKEN_CHECKS,
    Integers,
    Mask,
    TokenCheckContext,
    examples_in,
    examples_of,
    flat_batches,
    rows_of_examples,
)
from ftlevel.data.gate.similarity import Digests
from ftlevel.data.sources.table import BadRow, Table, handle_bad_rows
from ftlevel.errors import InputError
from ftlevel.task import Checks

MAX_COMPARED = 250_000
"""Maximum number of examples whose words are compared, at up to 150 bytes each."""

_NO_ROWS = np.zeros(0, dtype=np.int64)


class CheckedTask(Protocol):
    """What the data checks use of a task; `tasks.base.BaseTask` documents the members."""

    # ruff: disable[D102]
    @property
    def checks(self) -> Checks: ...

    def check_rows(self, rows: Sequence[Encoded]) -> Mapping[str, Mask]: ...

    def check_examples(self, examples: Sequence[Any]) -> Sequence[tuple[str, int, str]]: ...

    # ruff: enable[D102]


@dataclass
class SplitReport:
    """Result of the checks of a split: a mask of the rows to keep, and the findings."""

    name: str
    rows: Sequence[Encoded]
    table: Table
    total: int  # examples
    policy: GateConfig
    findings: list[Finding] = field(default_factory=list)
    keep: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.keep = np.ones(len(self.rows), dtype=bool)

    def present(self) -> Mask:
        """Return a mask of the examples that have a row to keep."""
        return examples_in(self.rows, self.keep, self.total)

    def add(self, check: str, count: int, places: Sequence[str]) -> Finding | None:
        """Add the finding of `check` on `count` examples."""
        finding = build_finding(check, self.name, count, self.total, places, self.policy)
        self.findings += [finding] if finding else []
        return finding

    def report(
        self, check: str, examples: Integers, originals: Integers | None = None
    ) -> Finding | None:
        """Add the finding of `check` on `examples`, which repeat `originals`; drop no row."""
        places = [self.table.where(int(i)) for i in examples[:MAX_SHOWN]]
        if originals is not None:
            firsts = (self.table.where(int(i)) for i in originals[:MAX_SHOWN])
            places = [f"{a} as {b}" for a, b in zip(places, firsts, strict=True)]
        return self.add(check, len(examples), places)

    def flag(self, check: str, examples: Integers, originals: Integers | None = None) -> None:
        """Add a finding as `report` does, and drop the rows if that is its action."""
        finding = self.report(check, examples, originals)
        if finding and finding.action == "drop":
            self.keep &= ~rows_of_examples(self.rows, examples)


@dataclass(frozen=True)
class Gate:
    """The data checks: `policy` has the action of each, `task` and `context` select them."""

    policy: GateConfig
    task: CheckedTask
    context: TokenCheckContext

    def check_split(
        self, name: str, fitted: FittedRows, examples: Sequence[Any], table: Table
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Return the remaining rows of a split, and the findings.

        `Encoded.row` indexes `examples`. Duplicates and answers are checked only if `name` is
        train. Raises `InputError` if no row remains.
        """
        split = self.check_rows(name, fitted, len(examples), table)
        if name == "train":
            self._check_duplicates(split, fitted.digests)
            self._check_answers(split, fitted.digests)
            for check, count, description in self.task.check_examples(examples):
                split.add(check, count, [description])
        rows = fitted.rows
        rows = rows if split.keep.all() else select_rows(rows, np.flatnonzero(split.keep))
        if not len(rows):
            raise InputError([f"no {name} row is left: {finding}." for finding in split.findings])
        return rows, split.findings

    def check_rows(self, name: str, fitted: FittedRows, total: int, table: Table) -> SplitReport:
        """Run the checks of single rows of a split with `total` examples."""
        split = SplitReport(name, fitted.rows, table, total, self.policy)
        present = split.present()
        for check, rows in (("long_prompt", fitted.long_prompts), ("answer_cut", fitted.lost)):
            examples = np.array(rows, dtype=np.int64)
            split.report(check, examples[present[examples]])
            finding = split.report(check, examples[~present[examples]])
            if finding is not None and finding.action == "warn":
                split.findings[-1] = replace(finding, action="drop")
        for check, (flagged, examples) in self._check_tokens(fitted.rows).items():
            finding = split.report(check, examples)
            if finding and finding.action == "drop":
                split.keep[flagged] = False
        if self.policy.long_prompt == "drop":
            long_prompts = np.array(fitted.long_prompts, dtype=np.int64)
            split.keep &= ~rows_of_examples(fitted.rows, long_prompts)
        present = split.present()
        for check in TEXT_CHECKS:
            marked = fitted.digests.marked(check)
            split.flag(check, marked[present[marked]])
        return split

    def check_held_out(
        self,
        name: str,
        fitted: FittedRows,
        examples: Sequence[Any],
        table: Table,
        training: Digests,
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Apply `find_leaks` and then `check_split` to a held-out split.

        `training` are the digests of the training examples.
        """
        leaked, findings = self.find_leaks(name, fitted.digests, training, table)
        if len(leaked):
            keep = np.flatnonzero(~rows_of_examples(fitted.rows, leaked))
            fitted = replace(fitted, rows=select_rows(fitted.rows, keep))
        if not len(fitted.rows):
            return [], findings
        rows, others = self.check_split(name, fitted, examples, table)
        return rows, [*findings, *others]

    def _check_tokens(self, rows: Sequence[Encoded]) -> dict[str, tuple[Integers, Integers]]:
        """Run the token checks; return the flagged rows of each, and their examples."""
        flagged: dict[str, list[tuple[Integers, Integers]]] = {}
        start = 0
        for flat in flat_batches(rows):
            for check, find in TOKEN_CHECKS.items():
                mask = find(flat, self.context)
                if mask is not None:
                    at = np.flatnonzero(mask)
                    flagged.setdefault(check, []).append((start + at, flat.example[at]))
            start += len(flat.example)
        for check, mask in self.task.check_rows(rows).items():
            at = np.flatnonzero(mask)
            flagged[check] = [(at, examples_of(rows, at))]
        joined = {
            check: map(np.concatenate, zip(*parts, strict=True)) for check, parts in flagged.items()
        }
        return {check: (at, np.unique(examples)) for check, (at, examples) in joined.items()}

    def _check_duplicates(self, split: SplitReport, digests: Digests) -> None:
        policy, repeated = self.policy, _NO_ROWS
        present = split.present()
        if not (policy.exact_duplicates == policy.near_duplicates == "ignore"):
            repeated, first = _select(present, *duplicates.find_repeated(digests.keys))
            split.flag("exact_duplicates", repeated, first)
        if self.task.checks.near_duplicates and policy.near_duplicates != "ignore":
            near = _find_near(split.rows, digests, repeated)
            split.flag("near_duplicates", *_select(present, *near))

    def _check_answers(self, split: SplitReport, digests: Digests) -> None:
        """Compare prompts with answers: conflicts, swapped roles, and one answer to all."""
        policy, present = self.policy, split.present()
        if policy.conflicting_answers != "ignore":
            conflicts = _select(present, *duplicates.find_conflicts(digests))
            split.flag("conflicting_answers", *conflicts)
        if not self.task.checks.ends:
            return
        if policy.swapped_roles != "ignore":
            swapped = duplicates.find_swapped(digests.first(MAX_COMPARED))
            split.flag("swapped_roles", swapped[present[swapped]])
        same = duplicates.find_one_answer(digests)
        split.add(
            "one_answer", len(same), [f"that of {split.table.where(int(i))}" for i in same[:1]]
        )

    def find_leaks(
        self, name: str, digests: Digests, training: Digests, table: Table
    ) -> tuple[Integers, list[Finding]]:
        """Find examples of another split to drop because training has them, and the findings.

        Findings of the test split only warn, as training does not read it.
        """
        policy = self.policy
        split = SplitReport(name, [], table, len(digests), policy)
        leaked = dropped = _NO_ROWS
        if not (policy.leaked == policy.near_leaked == "ignore"):
            leaked = duplicates.find_members(digests.keys, training.keys)
            split.report("leaked", leaked)
        if self.task.checks.near_duplicates and policy.near_leaked != "ignore":
            near, _ = wordings.find_near_leaks(
                digests.first(MAX_COMPARED), training.first(MAX_COMPARED)
            )
            near = near[~np.isin(near, leaked)]
            split.report("near_leaked", near)
            dropped = near if policy.near_leaked == "drop" else dropped
        dropped = np.union1d(dropped, leaked) if policy.leaked == "drop" else dropped
        if name == "test":  # training does not read it, so nothing is dropped
            return dropped, [
                replace(f, action="warn") if f.action == "drop" else f for f in split.findings
            ]
        return dropped, split.findings


def _find_near(
    rows: Sequence[Encoded], digests: Digests, repeated: Integers
) -> tuple[Integers, Integers]:
    """Find near duplicates by tokens or words, except `repeated`, and the earlier examples."""
    near, first = duplicates.find_near_duplicates(rows, rows_of_examples(rows, repeated))
    compared = digests.first(MAX_COMPARED)
    skip = np.zeros(len(digests), dtype=bool)
    skip[repeated] = True
    by_words = wordings.find_near_texts(compared, skip[: len(compared)])
    near = np.concatenate((examples_of(rows, near), by_words[0]))
    first = np.concatenate((examples_of(rows, first), by_words[1]))
    near, index = np.unique(near, return_index=True)
    return near, first[index]


def _select(present: Mask, repeated: Integers, first: Integers) -> tuple[Integers, Integers]:
    selected = present[repeated]
    return repeated[selected], first[selected]


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of EOS and all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    return frozenset((special | {*tokenizer.all_special_ids, tokenizer.eos_token_id}) - {None})


def handle_unusable_rows(
    table: Table, bad: Sequence[BadRow], config: DataConfig, split: str, *, lenient: bool
) -> tuple[Table, list[Finding]]:
    """Return `table` without unusable rows, and the findings.

    Raises `InputError` if a row stops the run, unless `lenient` drops it, as in a preview.
    """
    findings: list[Finding] = []
    for name in dict.fromkeys(row.finding for row in bad if row.finding):
        rows = [row for row in bad if row.finding == name]
        places = tuple(f"{table.place(row.line)}: {row.reason}" for row in rows[:MAX_SHOWN])
        action: Action = "drop" if config.on_bad_row == "skip" else getattr(config.gate, name)
        lines = {row.line for row in rows}
        findings.append(Finding(name, split, len(lines), len(table), places, action))
    dropped = {f.name for f in findings if f.action == "drop" or lenient}
    handle_bad_rows(table, [row for row in bad if row.finding not in dropped], config.on_bad_row)
    return handle_bad_rows(table, bad, "skip"), findings
