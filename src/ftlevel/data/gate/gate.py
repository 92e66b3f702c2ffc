"""Run the gate over a split: what is wrong with its rows, and which of them are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftlevel.config import DataConfig, GateConfig
from ftlevel.config.gate import Action
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import Fitted
from ftlevel.data.encoding.store import take_rows
from ftlevel.data.gate import Finding, checks, duplicates, judge
from ftlevel.data.gate.duplicates import Keys
from ftlevel.data.gate.flat import Integers, Mask, examples_of, flat_batches, rows_of
from ftlevel.data.sources.table import BadRow, Table, resolve_bad
from ftlevel.errors import InputError
from ftlevel.task import Task

_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Gate:
    """What the checks must know beside the rows.

    Attributes:
        policy: what follows from each finding.
        task: says which checks its rows go through, and has some of its own.
        bos: id of the BOS token, or None.
        ends: ids at which generation stops.
        vocabulary: rows of the model's embedding.
    """

    policy: GateConfig
    task: Task
    bos: int | None
    ends: frozenset[int]
    vocabulary: int

    def check_split(
        self, name: str, fitted: Fitted, examples: Sequence[Any], table: Table
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Return the rows that are kept of a split, and what was found.

        Args:
            name: train or validation.
            fitted: its encoded rows, and what was done to those that were too long.
            examples: what they were encoded from; `Encoded.row` counts these.
            table: where the examples came from.

        Raises:
            InputError: nothing is left.
        """
        rows, total = fitted.rows, len(examples)
        keep, findings = self.check_rows(name, fitted, total, table)
        if name == "train":
            keep &= self._find_duplicates(rows, fitted.keys, table, findings)
            judged = [
                judge(check, name, count, total, [what], self.policy)
                for check, count, what in self.task.judge_examples(examples)
            ]
            findings += filter(None, judged)
        kept = rows if keep.all() else take_rows(rows, np.flatnonzero(keep))
        if not len(kept):
            raise InputError([f"no {name} row is left: {finding}." for finding in findings])
        return kept, findings

    def check_rows(
        self, name: str, fitted: Fitted, total: int, table: Table
    ) -> tuple[Mask, list[Finding]]:
        """Return the rows that are kept, and what is wrong with single rows.

        Args:
            name: as of `check_split`.
            fitted: as of `check_split`.
            total: examples that were encoded.
            table: as of `check_split`.
        """
        rows = fitted.rows
        findings = [
            found
            for check, lost in (("long_prompt", fitted.long_prompts), ("answer_cut", fitted.lost))
            if (found := self._judge(check, name, lost, total, table))
        ]
        keep = np.ones(len(rows), dtype=bool)
        for check, (hit, examples) in self._look(rows).items():
            found = self._judge(check, name, examples, total, table)
            findings += [found] if found else []
            if found and found.action == "drop":
                keep[hit] = False
        if self.policy.long_prompt == "drop":
            keep &= ~rows_of(rows, np.array(fitted.long_prompts, dtype=np.int64))
        return keep, findings

    def check_held_out(
        self,
        name: str,
        fitted: Fitted,
        examples: Sequence[Any],
        table: Table,
        known: Keys,
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Return the rows that are kept of a split that is not trained on, and what was found.

        Args:
            name: of the split.
            fitted: as for `check_split`.
            examples: as for `check_split`.
            table: as for `check_split`.
            known: the keys of the training examples, which may not be among them.
        """
        leaked, findings = self.find_leaks(name, fitted.keys, known, table)
        if findings and findings[0].action == "drop":
            stay = np.flatnonzero(~rows_of(fitted.rows, leaked))
            fitted = replace(fitted, rows=take_rows(fitted.rows, stay))
        if not len(fitted.rows):
            return [], findings
        kept, found = self.check_split(name, fitted, examples, table)
        return kept, [*findings, *found]

    def _look(self, rows: Sequence[Encoded]) -> dict[str, tuple[Integers, Integers]]:
        """Return for each check of tokens the rows with a finding, and their examples."""
        found: dict[str, list[tuple[Integers, Integers]]] = {}
        known = checks.Known(self.task.checks, self.bos, self.ends, self.vocabulary)
        begin = 0
        for flat in flat_batches(rows):
            for check, find in checks.TOKEN_CHECKS.items():
                mask = find(flat, known)
                if mask is None:
                    continue
                hit = np.flatnonzero(mask)
                found.setdefault(check, []).append((begin + hit, flat.example[hit]))
            begin += len(flat.example)
        for check, mask in self.task.look(rows).items():
            hit = np.flatnonzero(mask)
            found[check] = [(hit, examples_of(rows, hit))]
        joined = {
            check: map(np.concatenate, zip(*hits, strict=True)) for check, hits in found.items()
        }
        return {check: (hit, np.unique(examples)) for check, (hit, examples) in joined.items()}

    def _find_duplicates(
        self,
        rows: Sequence[Encoded],
        keys: Keys,
        table: Table,
        findings: list[Finding],
    ) -> Mask:
        """Add what is there twice to `findings` (mutated); return the rows that are kept."""
        keep = np.ones(len(rows), dtype=bool)
        policy, again = self.policy, _NO_ROWS
        if not (policy.exact_duplicates == policy.near_duplicates == "ignore"):
            again, first = duplicates.find_repeated(keys)
            pairs = _pairs(again, first, table)
            found = judge("exact_duplicates", "train", len(again), len(keys), pairs, policy)
            keep &= self._add(found, findings, rows, again)
        if self.task.checks.near_duplicates and policy.near_duplicates != "ignore":
            near_rows, others = duplicates.find_near(rows, rows_of(rows, again))
            near, index = np.unique(examples_of(rows, near_rows), return_index=True)
            pairs = _pairs(near, examples_of(rows, others[index]), table)
            found = judge("near_duplicates", "train", len(near), len(keys), pairs, policy)
            keep &= self._add(found, findings, rows, near)
        return keep

    def find_leaks(
        self, name: str, keys: Keys, known: Keys, table: Table
    ) -> tuple[Integers, list[Finding]]:
        """Return which examples of another split are training examples too, and the finding.

        Args:
            name: of the split.
            keys: of its examples.
            known: of the training examples.
            table: where the examples of the split came from.
        """
        if self.policy.leaked == "ignore":
            return _NO_ROWS, []
        leaked = duplicates.find_members(keys, known)
        found = self._judge("leaked", name, leaked, len(keys), table)
        if found and name == "test" and found.action == "drop":
            found = replace(
                found, action="warn"
            )  # no run reads it, so that there is nothing to drop
        return leaked, [found] if found else []

    def _judge(
        self, check: str, split: str, hit: Sequence[int] | Integers, total: int, table: Table
    ) -> Finding | None:
        places = [table.where(int(i)) for i in hit[:3]]
        return judge(check, split, len(hit), total, places, self.policy)

    @staticmethod
    def _add(
        found: Finding | None, into: list[Finding], rows: Sequence[Encoded], hit: Integers
    ) -> Any:
        if found is None:
            return True
        into.append(found)
        return ~rows_of(rows, hit) if found.action == "drop" else True


def _pairs(again: Integers, first: Integers, table: Table) -> list[str]:
    """Return the first places of rows that are there twice, each with the earlier one."""
    return [
        f"{table.where(int(a))} as {table.where(int(b))}"
        for a, b in zip(again[:3], first[:3], strict=True)
    ]


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that can end an answer: EOS, and the special tokens of the vocabulary."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    eos = tokenizer.eos_token_id
    return frozenset(
        special | set(tokenizer.all_special_ids) | ({eos} if eos is not None else set())
    )


def resolve_faults(
    table: Table, bad: Sequence[BadRow], config: DataConfig, split: str, *, lenient: bool
) -> tuple[Table, list[Finding]]:
    """Return `table` without the rows that nothing can be learned from, and what was found.

    Args:
        table: the rows of a split.
        bad: the rows that can't be an example, each with the field of the gate it falls under.
        config: the data section: its gate, and `on_bad_row`.
        split: its name.
        lenient: leave out rows that ought to stop the run, as a preview does.

    Raises:
        InputError: a row is to stop the run.
    """
    if not bad:
        return table, []
    findings: list[Finding] = []
    grouped: dict[str, list[BadRow]] = {}
    for row in bad:
        grouped.setdefault(row.finding, []).append(row)
    for name, rows in grouped.items():
        if name:
            places = [f"{table.place(row.line)}: {row.reason}" for row in rows[:3]]
            action: Action = "drop" if config.on_bad_row == "skip" else getattr(config.gate, name)
            lines = {row.line for row in rows}
            findings.append(Finding(name, split, len(lines), len(table), tuple(places), action))
    drops = {f.name for f in findings if f.action == "drop" or lenient}
    rest = [row for row in bad if row.finding not in drops]
    if rest:
        resolve_bad(table, rest, config.on_bad_row)
    return resolve_bad(table, bad, "skip"), findings
