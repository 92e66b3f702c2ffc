"""Run the data checks on a split, and drop or report the rows they flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftlevel.config import DataConfig, GateConfig
from ftlevel.config.gate import Action
from ftlevel.data import gate as findings_
from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.fit import FittedRows
from ftlevel.data.encoding.store import select_rows
from ftlevel.data.gate import Finding, build_finding, checks, duplicates, wordings
from ftlevel.data.gate import similarity as digests_
from ftlevel.data.gate.checks import (
    TEXT_CHECKS,
    Integers,
    Mask,
    examples_in,
    examples_of,
    flat_batches,
    rows_of_examples,
)
from ftlevel.data.gate.similarity import Digests
from ftlevel.data.sources.table import BadRow, Table, handle_bad_rows
from ftlevel.errors import InputError
from ftlevel.task import Task

_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Gate:
    """The data checks: `policy` has the action of each, `task` and `known` select them."""

    policy: GateConfig
    task: Task
    known: checks.TokenCheckContext

    def check_split(
        self, name: str, fitted: FittedRows, examples: Sequence[Any], table: Table
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Return the remaining rows of a split, and the findings.

        `Encoded.row` indexes `examples`. Duplicates and answers are checked only if `name` is
        train.

        Raises:
            InputError: no row remains.
        """
        rows, total = fitted.rows, len(examples)
        keep, findings = self.check_rows(name, fitted, total, table)
        if name == "train":
            for look in (self._check_duplicates, self._look_at_sides):
                keep &= look(rows, keep, fitted.digests, table, findings)
            judged = [
                build_finding(check, name, count, total, [what], self.policy)
                for check, count, what in self.task.judge_examples(examples)
            ]
            findings += filter(None, judged)
        kept = rows if keep.all() else select_rows(rows, np.flatnonzero(keep))
        if not len(kept):
            raise InputError([f"no {name} row is left: {finding}." for finding in findings])
        return kept, findings

    def check_rows(
        self, name: str, fitted: FittedRows, total: int, table: Table
    ) -> tuple[Mask, list[Finding]]:
        """Run the checks of single rows; return a mask of rows to keep, and the findings."""
        rows = fitted.rows
        keep = np.ones(len(rows), dtype=bool)
        present = examples_in(rows, keep, total)
        findings: list[Finding] = []
        for check, lost in (("long_prompt", fitted.long_prompts), ("answer_cut", fitted.lost)):
            at = np.array(lost, dtype=np.int64)
            there = self._judge(check, name, at[present[at]], total, table)
            gone = self._judge(check, name, at[~present[at]], total, table)
            if gone is not None and gone.action == "warn":
                gone = replace(gone, action="drop")
            findings += filter(None, (there, gone))
        for check, (hit, examples) in self._look(rows).items():
            found = self._judge(check, name, examples, total, table)
            findings += [found] if found else []
            if found and found.action == "drop":
                keep[hit] = False
        if self.policy.long_prompt == "drop":
            keep &= ~rows_of_examples(rows, np.array(fitted.long_prompts, dtype=np.int64))
        present = examples_in(rows, keep, total)
        for check in TEXT_CHECKS:
            marked = fitted.digests.marked(check)
            marked = marked[present[marked]]
            found = self._judge(check, name, marked, total, table)
            keep &= self._add(found, findings, rows, marked)
        return keep, findings

    def check_held_out(
        self,
        name: str,
        fitted: FittedRows,
        examples: Sequence[Any],
        table: Table,
        known: Digests,
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Apply `find_leaks` and then `check_split` to a held-out split.

        `known` are the digests of the training examples.
        """
        gone, findings = self.find_leaks(name, fitted.digests, known, table)
        if len(gone):
            stay = np.flatnonzero(~rows_of_examples(fitted.rows, gone))
            fitted = replace(fitted, rows=select_rows(fitted.rows, stay))
        if not len(fitted.rows):
            return [], findings
        kept, found = self.check_split(name, fitted, examples, table)
        return kept, [*findings, *found]

    def _look(self, rows: Sequence[Encoded]) -> dict[str, tuple[Integers, Integers]]:
        """Run the token checks; return the flagged rows of each, and their examples."""
        found: dict[str, list[tuple[Integers, Integers]]] = {}
        begin = 0
        for flat in flat_batches(rows):
            for check, find in checks.TOKEN_CHECKS.items():
                mask = find(flat, self.known)
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

    def _check_duplicates(
        self,
        rows: Sequence[Encoded],
        kept: Mask,
        digests: Digests,
        table: Table,
        findings: list[Finding],
    ) -> Mask:
        """Append duplicates in `kept` to `findings` (mutated); return a mask of rows to keep."""
        keep = np.ones(len(rows), dtype=bool)
        policy, again = self.policy, _NO_ROWS
        present = examples_in(rows, kept, len(digests))
        if not (policy.exact_duplicates == policy.near_duplicates == "ignore"):
            again, first = _of(present, *duplicates.find_repeated(digests.keys))
            pairs = _pairs(again, first, table)
            found = build_finding(
                "exact_duplicates", "train", len(again), len(digests), pairs, policy
            )
            keep &= self._add(found, findings, rows, again)
        if self.task.checks.near_duplicates and policy.near_duplicates != "ignore":
            near, others = _of(present, *self._find_near(rows, digests, again))
            pairs = _pairs(near, others, table)
            found = build_finding(
                "near_duplicates", "train", len(near), len(digests), pairs, policy
            )
            keep &= self._add(found, findings, rows, near)
        return keep

    @staticmethod
    def _find_near(
        rows: Sequence[Encoded], digests: Digests, known: Integers
    ) -> tuple[Integers, Integers]:
        """Return near duplicates by tokens or words, except `known`, and the earlier examples."""
        near_rows, others = duplicates.find_near_duplicates(rows, rows_of_examples(rows, known))
        skip = np.zeros(len(digests), dtype=bool)
        skip[known] = True
        some = digests.first(digests_.MOST_COMPARED)
        by_words = wordings.find_near_texts(some, skip[: len(some)])
        near = np.concatenate((examples_of(rows, near_rows), by_words[0]))
        first = np.concatenate((examples_of(rows, others), by_words[1]))
        near, index = np.unique(near, return_index=True)
        return near, first[index]

    def _look_at_sides(
        self,
        rows: Sequence[Encoded],
        kept: Mask,
        digests: Digests,
        table: Table,
        findings: list[Finding],
    ) -> Mask:
        """Check prompts against answers; arguments as in `_check_duplicates`."""
        keep = np.ones(len(rows), dtype=bool)
        total, policy = len(digests), self.policy
        present = examples_in(rows, kept, total)
        if policy.conflicting_answers != "ignore":
            again, first = _of(present, *duplicates.find_conflicts(digests))
            pairs = _pairs(again, first, table)
            found = build_finding("conflicting_answers", "train", len(again), total, pairs, policy)
            keep &= self._add(found, findings, rows, again)
        if self.task.checks.ends and policy.swapped_roles != "ignore":
            hit = duplicates.find_swapped(digests.first(digests_.MOST_COMPARED))
            hit = hit[present[hit]]
            found = self._judge("swapped_roles", "train", hit, total, table)
            keep &= self._add(found, findings, rows, hit)
        if self.task.checks.ends:
            hit = duplicates.find_one_answer(digests)
            places = [f"that of {table.where(int(i))}" for i in hit[:1]]
            found = build_finding("one_answer", "train", len(hit), total, places, policy)
            findings += [found] if found else []
        return keep

    def find_leaks(
        self, name: str, digests: Digests, known: Digests, table: Table
    ) -> tuple[Integers, list[Finding]]:
        """Return examples of another split to drop because training has them, and the findings.

        Findings of the test split only warn, as training does not read it.
        """
        policy, findings = self.policy, []
        leaked = gone = _NO_ROWS
        if not (policy.leaked == policy.near_leaked == "ignore"):
            leaked = duplicates.find_members(digests.keys, known.keys)
            findings.append(self._judge("leaked", name, leaked, len(digests), table))
        if self.task.checks.near_duplicates and policy.near_leaked != "ignore":
            most = digests_.MOST_COMPARED
            near, _ = wordings.find_near_leaks(digests.first(most), known.first(most))
            near = near[~np.isin(near, leaked)]
            findings.append(self._judge("near_leaked", name, near, len(digests), table))
            gone = near if policy.near_leaked == "drop" else gone
        gone = np.union1d(gone, leaked) if policy.leaked == "drop" else gone
        found = [finding for finding in findings if finding is not None]
        if name == "test":  # training does not read it, so nothing is dropped
            found = [replace(f, action="warn") if f.action == "drop" else f for f in found]
        return gone, found

    def _judge(
        self, check: str, split: str, hit: Sequence[int] | Integers, total: int, table: Table
    ) -> Finding | None:
        places = [table.where(int(i)) for i in hit[: findings_.MOST_SHOWN]]
        return build_finding(check, split, len(hit), total, places, self.policy)

    @staticmethod
    def _add(
        found: Finding | None, into: list[Finding], rows: Sequence[Encoded], hit: Integers
    ) -> Any:
        if found is None:
            return True
        into.append(found)
        return ~rows_of_examples(rows, hit) if found.action == "drop" else True


def _of(present: Mask, again: Integers, first: Integers) -> tuple[Integers, Integers]:
    there = present[again]
    return again[there], first[there]


def _pairs(again: Integers, first: Integers, table: Table) -> list[str]:
    most = findings_.MOST_SHOWN
    return [
        f"{table.where(int(a))} as {table.where(int(b))}"
        for a, b in zip(again[:most], first[:most], strict=True)
    ]


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of EOS and all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    eos = tokenizer.eos_token_id
    return frozenset(
        special | set(tokenizer.all_special_ids) | ({eos} if eos is not None else set())
    )


def handle_unusable_rows(
    table: Table, bad: Sequence[BadRow], config: DataConfig, split: str, *, lenient: bool
) -> tuple[Table, list[Finding]]:
    """Return `table` without unusable rows, and the findings.

    If `lenient` is true, as in a preview, drop rows that would stop the run.

    Raises:
        InputError: the configuration requires a row to stop the run.
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
        handle_bad_rows(table, rest, config.on_bad_row)
    return handle_bad_rows(table, bad, "skip"), findings
