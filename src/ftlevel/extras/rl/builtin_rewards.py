"""Built-in rewards of `--task rl`, from 0 to 1, computed in a worker process.

Imports little of ftlevel, so that the process starts at once. Except for `regex`, `format`,
`length` and `repetition`, rewards score the text after `</think>`; with an unclosed `<think>`, this
text is empty.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ftlevel.rouge import compute_rouge, rouge_scorer

Reward = Callable[[str, Sequence[int], Mapping[str, Any]], float]
"""(completion, its token ids, columns of its row) → score."""
_AnswerReward = Callable[[str, Sequence[int], Any], float]
"""(completion, its token ids, value of the answer column or None) → score."""
MAX_CHARACTERS = 200_000
"""Maximum length of a completion that is scored; longer ones score 0."""


def create_reward(spec: Any, *, opens_think: bool = False) -> Reward:
    """Returns the function that computes the built-in reward `spec`.

    `opens_think`: whether prompts end with `<think>`. Raises `ValueError` for a missing package or
    an invalid JSON schema.
    """
    value = spec.argument
    prefix = "<think>" if opens_think and spec.name not in _WHOLE_TEXT else ""
    if spec.name == "json":
        score_json = _json_reward(spec)
        return lambda text, ids, row: score_json(prefix + text, ids, row)
    builders: dict[str, Callable[[], _AnswerReward]] = {
        "exact": lambda: (
            lambda text, _, reference: float(_visible(text).strip() == _final(reference))
        ),
        "contains": lambda: lambda text, _, reference: float(_final(reference) in _visible(text)),
        "number": lambda: _number_reward(Decimal(value or "0")),
        "math": _math_reward,
        "choice": lambda: _choice_reward(split_labels(value)),
        "regex": lambda: lambda text, _, __: float(re.search(value, text) is not None),
        "rouge": lambda: _rouge_reward(value or "rougeL"),
        "length": lambda: _length_reward(value),
        "format": lambda: _score_think,
        "repetition": lambda: _repetition_reward(int(value or "3")),
    }
    reward = builders[spec.name]()
    return lambda text, ids, row: reward(prefix + text, ids, row.get("answer"))


_WHOLE_TEXT = ("regex", "length", "repetition")
REFERENCE_REWARDS = ("exact", "contains", "number", "math", "choice", "rouge")
"""Rewards that compare with the answer column."""


def get_schema_column(spec: Any) -> str:
    """Returns the column with JSON schemas of the reward `json:COLUMN`; "" for other rewards."""
    is_column = spec.name == "json" and not spec.argument.endswith(".json")
    return spec.argument if is_column else ""


def get_columns(spec: Any) -> list[str]:
    """Returns the columns that the built-in reward `spec` requires."""
    column = get_schema_column(spec)
    return ["answer"] if spec.name in REFERENCE_REWARDS else [column] if column else []


def check_row(spec: Any, row: Mapping[str, Any]) -> str:
    """Returns why the reward `spec` cannot score completions of `row`; "" if it can."""
    if column := get_schema_column(spec):
        try:
            _validator(row.get(column))
        except ValueError as error:
            return f"the column {column!r} has {_shown(row.get(column))}: {error}"
    return check_reference(spec, row.get("answer"))


def check_reference(spec: Any, reference: Any) -> str:
    """Returns why the reward `spec` cannot score against `reference`; "" if it can."""
    if spec.name not in REFERENCE_REWARDS:
        return ""
    if reference is None or isinstance(reference, dict | list):
        return f"the answer is {_shown(reference)}, and a text or number is expected"
    final = _final(reference)
    if not final:
        return "the answer is empty"
    if spec.name == "number" and last_number(final) is None:
        return f"the answer {_shown(reference)} has no number"
    if spec.name == "choice":
        labels = split_labels(spec.argument)
        if _label_of(reference, labels) is None:
            return f"the answer {_shown(reference)} is not one of {', '.join(labels)}"
    if spec.name == "math":
        if _UNSAFE.fullmatch(final):
            return (
                f"the answer {_shown(reference)} is a time, a date or a power of ten, which "
                "math-verify misreads; use --reward exact or number"
            )
        if not _parse_math(final, gold=True):
            return f"the answer {_shown(reference)} is not a math expression; use --reward exact"
    return ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _visible(text: str) -> str:
    """Returns the text after the last `</think>`, or all if none; "" for an open `<think>`."""
    after = text.rpartition("</think>")[2]
    return "" if "<think>" in after else after


def _final(reference: Any) -> str:
    """Returns the reference answer as text; for GSM8K's answers, only what follows `####`."""
    return str(reference).rpartition("####")[2].strip()


_NUMBER = re.compile(
    r"(?<![\w.])([-−+]?)[$€£]?"
    r"((?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?)"
)
_MOST_DIGITS = 400


def last_number(text: str) -> Decimal | None:
    """Returns the last number of `text`, or None; commas separate thousands."""
    result = None
    for result in _NUMBER.finditer(text):  # noqa: B007 - the last one
        pass
    if result is None or len(result[2]) > _MOST_DIGITS:
        return None
    try:
        value = Decimal(result[2].replace(",", ""))
    except InvalidOperation:
        return None
    return -value if result[1] in ("-", "−") else value


def _number_reward(tolerance: Decimal) -> _AnswerReward:
    def score(text: str, _: Sequence[int], reference: Any) -> float:
        pred, expected = last_number(_visible(text)), last_number(_final(reference))
        return float(
            pred is not None and expected is not None and abs(pred - expected) <= tolerance
        )

    return score


_UNSAFE = re.compile(r"\d+:\d+(:\d+)?|\d{4}-\d\d?-\d\d?|\d{1,2}/\d{1,2}/\d{2,4}|\d+[eE]\d+")
"""Times, dates and powers of ten, which math-verify reads as ratios, sums and products."""


_WORD = re.compile(r"(?<!\\)\b[^\W\d_]{2,}")
"""A word, of which LaTeX makes a product of letters."""


def _parse_math(text: str, *, gold: bool = False) -> list[Any]:
    from math_verify import parse  # type: ignore[import-untyped]

    result: list[Any] = parse(text, parsing_timeout=None)
    if not result and gold and not _WORD.search(text):
        result = parse(f"${text}$", parsing_timeout=None)
    return result


def _math_reward() -> _AnswerReward:
    try:
        from math_verify import verify
    except ImportError:
        raise ValueError(
            "math needs the package math-verify, which is not installed. "
            "Install it: pip install 'ftlevel[math]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timer is off

    def score(text: str, _: Sequence[int], reference: Any) -> float:
        gold, pred = _parse_math(_final(reference), gold=True), _parse_math(_visible(text))
        return float(bool(pred) and verify(gold, pred, timeout_seconds=None))

    return score


def split_labels(value: str) -> list[str]:
    """Returns the comma-separated labels of the reward `choice`; A to E by default."""
    return [label.strip() for label in value.split(",") if label.strip()] or list("ABCDE")


def _label_of(reference: Any, labels: Sequence[str]) -> str | None:
    """Returns the label that is the answer, or whose index (from 0) is the answer; or None."""
    final = _final(reference).strip("().").casefold()
    if type(reference) is int and not any(label.isdecimal() for label in labels):
        return labels[reference] if 0 <= reference < len(labels) else None
    return next((label for label in labels if label.casefold() == final), None)


def _choice_reward(labels: Sequence[str]) -> _AnswerReward:
    letters = all(len(label) == 1 for label in labels)
    flags = 0 if letters else re.IGNORECASE  # "a" is a word
    any_of = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    named = re.compile(rf"(?<!\w)(?:{any_of})(?!\w)", flags)
    announced = re.compile(
        rf"(?:[Aa]nswer|ANSWER)(?:\s+is)?[\s:*]*\(?(?<!\w)({any_of})(?!\w)"
        rf"|\\boxed\{{\s*({any_of})\s*\}}",
        flags,
    )

    def score(text: str, _: Sequence[int], reference: Any) -> float:
        visible = _visible(text)
        result = [one or two for one, two in announced.findall(visible)] or named.findall(visible)
        expected = _label_of(reference, labels)
        return float({label.casefold() for label in result} == {(expected or "").casefold()})

    return score


_FENCE = re.compile(r"```(?:json|JSON)?\s*\n(.*?)```", re.DOTALL)


def parse_strict_json(text: str) -> Any:
    """Returns the value of JSON text, alone or in one fenced block.

    Raises `ValueError` for invalid or deeply nested JSON, and for NaN, infinity and equal keys.
    """
    fenced = _FENCE.findall(text)
    body = fenced[0] if len(fenced) == 1 else text

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            raise ValueError("a key is given twice")
        return result

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body.strip(), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _same(one: Any, two: Any) -> bool:
    """Returns whether two JSON values are equal; 1 equals 1.0, but not true."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


def _json_reward(spec: Any) -> Reward:
    """Returns the reward `json`: share of keys with the answer's values; 0 for invalid JSON."""
    column, validator = get_schema_column(spec), None
    if column:
        _validator({})  # fails if jsonschema is not installed
    elif spec.argument:
        try:
            validator = _validator(parse_strict_json(Path(spec.argument).read_text("utf-8")))
        except OSError as error:
            raise ValueError(f"{spec.argument} cannot be read ({error.strerror})") from None

    def score(text: str, _: Sequence[int], row: Mapping[str, Any]) -> float:
        try:
            own = _validator(row.get(column)) if column else validator
        except ValueError:
            return 0.0
        return _score_json(text, row.get("answer"), own)

    return score


def _score_json(text: str, reference: Any, validator: Any) -> float:
    try:
        pred = parse_strict_json(_visible(text))
    except ValueError:
        return 0.0
    if validator is not None and not _is_valid(pred, validator):
        return 0.0
    return 1.0 if reference is None else _compute_match_ratio(pred, reference)


def _is_valid(value: Any, validator: Any) -> bool:
    """Returns whether `value` fits a schema; False if a `$ref` or a pattern of it is invalid."""
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(value))
    except (Unresolvable, re.error, ValueError, TypeError, LookupError, RecursionError):
        return False


def _compute_match_ratio(pred: Any, reference: Any) -> float:
    if isinstance(reference, str):
        try:
            reference = parse_strict_json(reference)
        except ValueError:
            return float(pred == reference)
    if not isinstance(reference, dict) or not isinstance(pred, dict):
        return float(_same(pred, reference))
    keys = pred.keys() | reference.keys()
    equal = [key in pred and key in reference and _same(pred[key], reference[key]) for key in keys]
    return sum(equal) / len(equal) if equal else 1.0


def _validator(schema: Any) -> Any:
    schema = parse_strict_json(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, Mapping | bool):
        raise ValueError("not a JSON schema (expected an object)")
    try:
        from jsonschema import SchemaError  # type: ignore[import-untyped]
        from jsonschema.validators import validator_for  # type: ignore[import-untyped]
        from referencing import Registry
    except ImportError:
        raise ValueError(
            "a JSON schema needs the package jsonschema, which is not installed. "
            "Install it: pip install 'ftlevel[jsonschema]'"
        ) from None
    try:
        kind = validator_for(schema)
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON schema ({error.message})") from None
    except (RecursionError, re.error, TypeError, AttributeError) as error:  # "$schema": 1
        raise ValueError(f"not a JSON schema ({type(error).__name__})") from None
    return kind(schema, registry=Registry())  # a $ref is not fetched


def _rouge_reward(name: str) -> _AnswerReward:
    rouge_scorer(name, is_ascii=True)  # raises if the package is missing
    return lambda text, _, reference: compute_rouge(_final(reference), _visible(text), [name])[name]


def _length_reward(argument: str) -> _AnswerReward:
    low, high = map(int, argument.split("-"))

    def score(_text: str, ids: Sequence[int], _reference: Any) -> float:
        beyond = max(low - len(ids), len(ids) - high, 0)
        return max(0.0, 1 - beyond / max(high - low, 1))

    return score


def _score_think(text: str, _ids: Sequence[int], _reference: Any) -> float:
    thought, closed, after = text.partition("</think>")
    one = text.count("<think>") == 1 and text.count("</think>") == 1
    return float(bool(closed) and one and thought.startswith("<think>") and bool(after.strip()))


def _repetition_reward(size: int) -> _AnswerReward:
    def score(text: str, _ids: Sequence[int], _reference: Any) -> float:
        tokens = text.split()
        grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    return score
