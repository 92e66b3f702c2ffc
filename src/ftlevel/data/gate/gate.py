"""Run the data checks on a split: find duplicate rows, conflicting answers and swapped roles.

Flagged rows are dropped or reported. Exact duplicates are equal up to case and white space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ftlevel.config import DataConfig, GateConfig
from ftlevel.config.gate import Action
from ftlevel.data.encoding.fit import FittedRows
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.store import select_rows
from ftlevel.data.gate import MAX_SHOWN, Finding, create_finding
from ftlevel.data.gate.checks import (
    TEXT_CHECKS,
    TOKEN_CHECKS,
    Integers,
    Mask,
    TokenCheckContext,
    flat_batches,
    get_example_mask,
    get_examples,
    get_row_mask,
)
from ftlevel.data.gate.near_duplicates import WordSets, match_texts, match_training_texts
from ftlevel.data.gate.similarity import (
    NO_ROWS,
    PART_KEYS,
    Digests,
    distinct,
    mix,
    repeated_keys,
    sort_pairs,
)
from ftlevel.data.sources.table import BadRow, Table, handle_bad_rows
from ftlevel.errors import InputError
from ftlevel.objectives import Checks


def get_repeated_keys(
    keys: NDArray[Any], selected: Mask | None = None
) -> tuple[Integers, Integers]:
    """Returns the indices of keys that occurred before, and of their first occurrences.

    `selected` is a mask of the keys to compare; None compares all.
    """
    return sort_pairs(repeated_keys(keys, selected))


def get_common_keys(keys: NDArray[Any], others: NDArray[Any]) -> Integers:
    """Returns the indices of `keys` that occur in `others`, which may be on disk."""
    mask = np.zeros(len(keys), dtype=bool)
    for start in range(0, len(others), PART_KEYS):
        mask |= np.isin(keys, others[start : start + PART_KEYS])
    return np.flatnonzero(mask)


MAJORITY_TARGET_RATIO = 0.95
_MIN_ROWS = 10
_SAMPLE = 1_000
_BUCKETS = 1 << 16
_WORDS = 200  # examined per side
_MIN_MEDIAN = 10.0  # nats
_SWAP_RATIO = 0.2


def get_conflicts(digests: Digests) -> tuple[Integers, Integers]:
    """Returns the indices of examples that contradict an earlier one, and of the earlier ones.

    An example contradicts the first example of the same prompt if its answer is another one.
    """
    prompts, answers = digests.records["before"], digests.records["last"]
    again, first = get_repeated_keys(prompts, prompts != 0)
    conflict = answers[again] != answers[first]
    return again[conflict], first[conflict]


def get_majority_target(digests: Digests) -> Integers:
    """Returns the indices of examples with the most frequent answer if 95 % have it; else none."""
    records = digests.records
    answers = records["last"]
    if len(answers) < _MIN_ROWS or not records["before"].all():
        return NO_ROWS
    values, counts = np.unique(answers[:: -(-len(answers) // _SAMPLE)], return_counts=True)
    matches = np.flatnonzero(answers == values[np.argmax(counts)])
    return matches if len(matches) >= MAJORITY_TARGET_RATIO * len(answers) else matches[:0]


def get_swapped(digests: Digests) -> Integers:
    """Returns the indices of the examples whose prompt and answer appear to be swapped.

    A naive Bayes model compares the words of each example with those of all other prompts and
    answers. Without a median difference of 10 nats between prompts and answers, none is returned.
    """
    index = WordSets.of(digests)
    vectors = np.zeros((2, _BUCKETS))
    for start, end in index.spans():
        bucket, side, _ = _sides(index, start, end)
        for k in (0, 1):
            vectors[k] += np.bincount(bucket[side == k], minlength=_BUCKETS)
    score = np.zeros(len(index))
    for start, end in index.spans():
        bucket, side, row = _sides(index, start, end)
        prompts = vectors[0][bucket] - (side == 0)
        targets = vectors[1][bucket] - (side == 1)
        log_ratio = np.log(prompts + 0.5) - np.log(targets + 0.5)
        weight = np.where(prompts + targets > 0, np.where(side == 0, log_ratio, -log_ratio), 0)
        score[start:end] = np.bincount(row, weight, minlength=end - start)
    if len(score) < _MIN_ROWS or (median := float(np.median(score))) < _MIN_MEDIAN:
        return NO_ROWS
    return np.flatnonzero((score < -_SWAP_RATIO * median) & (digests.records["before"] != 0))


def _sides(index: WordSets, start: int, end: int) -> tuple[Integers, NDArray[np.int64], Integers]:
    """Returns the hash bucket, side (0 prompt, 1 answer) and example of each distinct word."""
    offsets = index.starts[start : end + 1]
    lengths = np.diff(offsets)
    row = np.repeat(np.arange(end - start), lengths)
    at = np.arange(len(row)) - np.repeat(offsets[:-1] - offsets[0], lengths)
    prompt_sizes = np.repeat(index.digests.records["prompt"][start:end].astype(np.int64), lengths)
    side = (at >= prompt_sizes).astype(np.int64)
    examined = at - side * prompt_sizes < _WORDS
    hashes = mix(np.asarray(index.digests.words[offsets[0] : offsets[-1]])[examined])
    bucket = (hashes & np.uint32(_BUCKETS - 1)).astype(np.int64)
    pairs = distinct((row[examined] * 2 + side[examined]) * _BUCKETS + bucket)
    return pairs % _BUCKETS, pairs // _BUCKETS % 2, pairs // (2 * _BUCKETS)


MAX_COMPARED = 1_000_000
"""Maximum number of examples whose words are compared, at about 60 bytes each."""


class CheckedTask:
    """Base class of tasks: their own data checks; `checks` are those that apply to all rows."""

    # ruff: disable[ARG002] - for subclasses
    checks: ClassVar[Checks] = Checks()

    def check_rows(self, rows: Sequence[Encoded]) -> Mapping[str, Mask]:
        """Returns task-specific data checks of encoded rows: check name -> mask of failing rows."""
        return {}

    def check_training_set(self, training_set: Sequence[Any]) -> Sequence[tuple[str, int, str]]:
        """Returns (check name, number of failing examples, description) per failed check."""
        return ()

    def check_eval_set(
        self, training_set: Sequence[Any], eval_set: Sequence[Any], corpus: Sequence[str] | None
    ) -> Sequence[tuple[str, str, Sequence[int], str]]:
        """Returns (check name, split, row indices, example) per failed check of the splits.

        `corpus` are the documents searched by validation queries; None if not given.
        """
        return ()

    # ruff: enable[ARG002]


@dataclass
class SplitReport:
    """Results of the checks of a split: `keep`, a mask of the rows to keep, and `findings`."""

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
        """Returns a mask of the examples that still have a row to keep."""
        return get_example_mask(self.rows, self.keep, self.total)

    def add(self, check: str, num_flagged: int, places: Sequence[str]) -> Finding | None:
        """Add a finding on `num_flagged` examples, and return it; None if the check is ignored."""
        finding = create_finding(check, self.name, num_flagged, self.total, places, self.policy)
        self.findings += [finding] if finding else []
        return finding

    def report(
        self, check: str, indices: Integers, originals: Integers | None = None
    ) -> Finding | None:
        """Add a finding on examples `indices` (repeats of `originals`, if given); drop no row."""
        places = [self.table.where(int(i)) for i in indices[:MAX_SHOWN]]
        if originals is not None:
            firsts = (self.table.where(int(i)) for i in originals[:MAX_SHOWN])
            places = [f"{a} as {b}" for a, b in zip(places, firsts, strict=True)]
        return self.add(check, len(indices), places)

    def flag(self, check: str, indices: Integers, originals: Integers | None = None) -> None:
        """Add a finding as `report` does; drop the examples if the action is drop."""
        finding = self.report(check, indices, originals)
        if finding and finding.action == "drop":
            self.keep &= ~get_row_mask(self.rows, indices)


@dataclass(frozen=True)
class Gate:
    """The data checks that apply to `task`; `policy` has the action of each check."""

    policy: GateConfig
    task: CheckedTask
    context: TokenCheckContext

    def check_split(
        self, name: str, fitted: FittedRows, examples: Sequence[Any], table: Table
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Returns the rows of `fitted` that are not dropped by the checks, and the findings.

        Checks duplicates and answers of training rows only. Raises `InputError` if no row is left.
        """
        split = self.check_rows(name, fitted, len(examples), table)
        if name == "train":
            self._check_duplicates(split, fitted.digests)
            self._check_answers(split, fitted.digests)
            for check, count, description in self.task.check_training_set(examples):
                split.add(check, count, [description])
        rows = fitted.rows
        rows = rows if split.keep.all() else select_rows(rows, np.flatnonzero(split.keep))
        if not len(rows):
            raise InputError(
                [f"every {name} row was dropped: {line}. Correct them." for line in split.findings]
            )
        return rows, split.findings

    def check_rows(self, name: str, fitted: FittedRows, total: int, table: Table) -> SplitReport:
        """Returns a `SplitReport` of the row checks of split `name`, which has `total` examples."""
        split = SplitReport(name, fitted.rows, table, total, self.policy)
        active = split.present()
        for check, rows in (("long_prompt", fitted.long_prompts), ("answer_cut", fitted.lost)):
            examples = np.array(rows, dtype=np.int64)
            split.report(check, examples[active[examples]])
            finding = split.report(check, examples[~active[examples]])
            if finding is not None and finding.action == "warn":
                split.findings[-1] = replace(finding, action="drop")
        for check, (flagged, examples) in self._check_tokens(fitted.rows).items():
            finding = split.report(check, examples)
            if finding and finding.action == "drop":
                split.keep[flagged] = False
        if self.policy.long_prompt == "drop":
            split.keep &= ~get_row_mask(fitted.rows, np.array(fitted.long_prompts, dtype=np.int64))
        active = split.present()
        for check in TEXT_CHECKS:
            marked = fitted.digests.marked(check)
            split.flag(check, marked[active[marked]])
        return split

    def check_held_out(
        self,
        name: str,
        fitted: FittedRows,
        examples: Sequence[Any],
        table: Table,
        training: Digests,
    ) -> tuple[Sequence[Encoded], list[Finding]]:
        """Run `check_split`; also report, and drop if `policy` says so, examples in `training`."""
        leaked, findings = self.get_leaks(name, fitted.digests, training, table)
        if len(leaked):
            keep = np.flatnonzero(~get_row_mask(fitted.rows, leaked))
            fitted = replace(fitted, rows=select_rows(fitted.rows, keep))
        if not len(fitted.rows):
            return [], findings
        rows, others = self.check_split(name, fitted, examples, table)
        return rows, [*findings, *others]

    def check_eval_set(
        self,
        train: Sequence[Any],
        validation: Sequence[Any],
        corpus: Sequence[str] | None,
        table: Table,
    ) -> list[Finding]:
        """Returns the findings of `task.check_eval_set`; `table` has the validation rows."""
        findings = []
        for check, split, rows, example in self.task.check_eval_set(train, validation, corpus):
            total = len(train) if split == "train" else len(validation)
            location = example if split == "train" else f"{table.where(rows[0])}: {example}"
            finding = create_finding(check, split, len(rows), total, [location], self.policy)
            findings += [finding] if finding else []
        return findings

    def _check_tokens(self, rows: Sequence[Encoded]) -> dict[str, tuple[Integers, Integers]]:
        """Returns check name → indices of the flagged rows, and of the examples they belong to."""
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
            flagged[check] = [(at, get_examples(rows)[at])]
        joined = {
            check: map(np.concatenate, zip(*parts, strict=True)) for check, parts in flagged.items()
        }
        return {check: (at, np.unique(examples)) for check, (at, examples) in joined.items()}

    def _check_duplicates(self, split: SplitReport, digests: Digests) -> None:
        policy, repeated = self.policy, NO_ROWS
        active = split.present()
        if not (policy.exact_duplicates == policy.near_duplicates == "ignore"):
            repeated, first = _select(active, *get_repeated_keys(digests.keys))
            split.flag("exact_duplicates", repeated, first)
        if self.task.checks.near_duplicates and policy.near_duplicates != "ignore":
            compared = digests.first(MAX_COMPARED)
            skip = np.isin(np.arange(len(compared)), repeated)
            split.flag("near_duplicates", *_select(active, *match_texts(compared, skip)))

    def _check_answers(self, split: SplitReport, digests: Digests) -> None:
        policy, active = self.policy, split.present()
        if policy.conflicting_answers != "ignore":
            split.flag("conflicting_answers", *_select(active, *get_conflicts(digests)))
        if not self.task.checks.ends:
            return
        if policy.swapped_roles != "ignore":
            swapped = get_swapped(digests.first(MAX_COMPARED))
            split.flag("swapped_roles", swapped[active[swapped]])
        groups = get_majority_target(digests)
        split.add(
            "one_answer", len(groups), [f"that of {split.table.where(int(i))}" for i in groups[:1]]
        )

    def get_leaks(
        self, name: str, digests: Digests, training: Digests, table: Table
    ) -> tuple[Integers, list[Finding]]:
        """Returns the indices of examples to drop, which `training` has, too, and the findings.

        Findings about the test split only warn, because training does not read that split.
        """
        policy = self.policy
        split = SplitReport(name, [], table, len(digests), policy)
        leaked = excluded = NO_ROWS
        if not (policy.leaked == policy.near_leaked == "ignore"):
            leaked = get_common_keys(digests.keys, training.keys)
            split.report("leaked", leaked)
        if self.task.checks.near_duplicates and policy.near_leaked != "ignore":
            matches, _ = match_training_texts(
                digests.first(MAX_COMPARED), training.first(MAX_COMPARED)
            )
            matches = matches[~np.isin(matches, leaked)]
            split.report("near_leaked", matches)
            excluded = matches if policy.near_leaked == "drop" else excluded
        excluded = np.union1d(excluded, leaked) if policy.leaked == "drop" else excluded
        if name == "test":  # training does not read it, so nothing is dropped
            return excluded, [
                replace(f, action="warn") if f.action == "drop" else f for f in split.findings
            ]
        return excluded, split.findings


def _select(active: Mask, repeated: Integers, first: Integers) -> tuple[Integers, Integers]:
    selected = active[repeated]
    return repeated[selected], first[selected]


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Returns the ids of EOS and all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    return frozenset((special | {*tokenizer.all_special_ids, tokenizer.eos_token_id}) - {None})


def handle_unusable_rows(
    table: Table, errors: Sequence[BadRow], config: DataConfig, split: str, *, lenient: bool
) -> tuple[Table, list[Finding]]:
    """Returns `table` without the rows in `errors`, and the findings.

    Raises `InputError` if a row may not be dropped; if `lenient` (in a preview), all may be.
    """
    findings: list[Finding] = []
    for name in dict.fromkeys(row.finding for row in errors if row.finding):
        rows = [row for row in errors if row.finding == name]
        places = tuple(f"{table.location(row.line)}: {row.message}" for row in rows[:MAX_SHOWN])
        action: Action = "drop" if config.on_bad_row == "skip" else getattr(config.gate, name)
        lines = {row.line for row in rows}
        findings.append(Finding(name, split, len(lines), len(table), places, action))
    skipped = {f.name for f in findings if f.action == "drop" or lenient}
    handle_bad_rows(table, [row for row in errors if row.finding not in skipped], config.on_bad_row)
    return handle_bad_rows(table, errors, "skip"), findings
