"""Tests of built-in rewards, with edge cases of regular expressions, JSON and numbers.

The examples of docs/rl.md are included.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ftlevel.extras.rl import reward_worker as worker
from ftlevel.extras.rl.builtin_rewards import check_reference, create_reward
from ftlevel.extras.rl.config import RewardSpec, parse_reward

SCORES: list[tuple[str, str, Any, float]] = [
    ("exact", " 42\n", "42", 1),
    ("exact", "42", "2 · 21 is #### 42", 1),
    ("exact", "42.", "42", 0),
    ("exact", "<think>41</think>\n42", "42", 1),
    ("exact", "<think>42", "42", 0),
    ("contains", "it is 42.", "42", 1),
    ("contains", "<think>42</think> no", "42", 0),
    ("number", "The answer is 42.", "42", 1),
    ("number", "6 · 7 = 42 = 42.0", "42", 1),
    ("number", "$1,234.50", "1234.5", 1),
    ("number", "-3", "3", 0),
    ("number", "5-3", "3", 1),
    ("number", "the factors are 2,3", "3", 1),
    ("number", "x = (1,000,-.5)", "-0.5", 1),
    ("number", "2,345,678.", "2345678", 1),
    ("number", "42 or 43", "42", 0),
    ("number", "v42", "42", 0),
    ("number", "none", "42", 0),
    ("number", "9" * 5_000, "42", 0),
    ("number:0.01", "3.14", "3.1416", 1),
    ("number:0.01", "3.1", "3.1416", 0),
    ("math", r"\boxed{\frac{1}{2}}", "0.5", 1),
    ("math", "The answer is 72", "#### 72", 1),
    ("math", r"\boxed{x}", "72", 0),
    ("choice", "The answer is (B).", "B", 1),
    ("choice", "B", "B", 1),
    ("choice", "B", 1, 1),
    ("choice:1,2,3,4,5", "3", 3, 1),  # a label, not an index
    ("choice:1,2,3,4,5", "4", 3, 0),
    ("choice", "A or B", "B", 0),
    ("choice", "A is wrong. Answer: B", "B", 1),
    ("choice", r"\boxed{B}", "B", 1),
    ("choice", "Bananas", "B", 0),
    ("choice:positive,negative", "Clearly Positive!", "positive", 1),
    ("choice:positive,negative", "not positive but negative", "positive", 0),
    (r"regex:^\d{4}-\d\d$", "2024-05", None, 1),
    (r"regex:^\d{4}-\d\d$", "May 2024", None, 0),
    ("json", '{"a": 1}', None, 1),
    ("json", '```json\n{"a": 1}\n```', None, 1),
    ("json", '{"a": 1, "a": 2}', None, 0),
    ("json", '{"a": NaN}', None, 0),
    ("json", "[" * 100_000, None, 0),
    ("json", "1" * 5_000, None, 0),
    ("json", '{"a": 1, "b": 2}', {"a": 1, "b": 3}, 0.5),
    ("json", '{"a": 1, "c": 2}', '{"a": 1}', 0.5),
    ("json", '{"a": true}', {"a": 1}, 0),
    ("json", '{"a": 1.0}', {"a": 1}, 1),
    ("rouge", "the cat sat", "the cat sat", 1),
    ("rouge", "кошка спит", "кошка ест", 0.5),
    ("rouge", "dogs bark", "the cat sat", 0),
    ("rouge:rouge1", "sat cat the", "the cat sat", 1),
    ("format:think", "<think>so</think>42", None, 1),
    ("format:think", "<think>so</think>", None, 0),
    ("format:think", "42", None, 0),
    ("format:think", "<think>a</think>b</think>c", None, 0),
    ("repetition", "a b c d", None, 1),
    ("repetition", "a b c a b c a b c", None, 3 / 7),
    ("repetition:1", "a a a a", None, 0.25),
]


def score(text: str, completion: str, answer: Any, ids: int = 4, **options: bool) -> float:
    return create_reward(parse_reward(text), **options)(completion, range(ids), {"answer": answer})


@pytest.mark.parametrize(("reward", "completion", "answer", "expected"), SCORES)
def test_builtin_reward_scores(reward: str, completion: str, answer: Any, expected: float) -> None:
    assert score(reward, completion, answer) == pytest.approx(expected)


def test_math_reward_logs_no_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("math_verify.parser.TIMEOUT_WARNING_SHOWN", False)
    assert score("math", "$1/2$", "0.5") == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("tokens", "expected"), [(20, 1), (80, 1), (50, 1), (0, 2 / 3), (110, 0.5), (200, 0)]
)
def test_length_reward_decreases_linearly_outside_range(tokens: int, expected: float) -> None:
    assert score("length:20-80", "x", None, tokens) == pytest.approx(expected)


def test_format_reward_when_prompt_opens_think() -> None:
    assert score("format:think", "so</think>42", None, opens_think=True) == 1
    assert score("format:think", "<think>so</think>42", None, opens_think=True) == 0
    assert score("format:think", "so</think>42", None) == 0
    assert score("number", "so 42", "42", opens_think=True) == 0
    assert score("json", "so</think>42", 42, opens_think=True) == 1
    assert score("regex:^so", "so", None, opens_think=True) == 1


def test_json_reward_with_schema(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    file.write_text(json.dumps(schema))
    assert score(f"json:{file}", '{"a": 1}', None) == 1
    assert score(f"json:{file}", '{"a": "x"}', None) == 0
    assert score(f"json:{file}", "{}", None) == 0
    assert score(f"json:{file}", '{"a": 1}', {"a": 2}) == 0
    file.write_text('{"type": "objekt"}')
    with pytest.raises(ValueError, match="not a JSON schema"):
        score(f"json:{file}", "{}", None)
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read"):
        score("json:nowhere.json", "{}", None)


@pytest.mark.parametrize(
    ("reward", "answer", "reason"),
    [
        ("number", "yes", "'yes' has no number"),
        ("choice", "F", "'F' is not one of A, B, C, D, E"),
        ("choice", 5, "5 is not one of A, B, C, D, E"),
        ("exact", None, "None, and a text or number is expected"),
        ("exact", "a #### ", "the answer is empty"),
        ("math", "3:15", "a time, a date or a power of ten"),
        ("math", "2024-05-01", "a time, a date or a power of ten"),
        ("math", "1e3", "a time, a date or a power of ten"),
        ("math", "yes", "not a math expression"),
    ],
)
def test_invalid_reference_answer_is_reported(reward: str, answer: Any, reason: str) -> None:
    assert reason in check_reference(parse_reward(reward), answer)


def test_valid_reference_answer_has_no_problem() -> None:
    for reward, answer in (("number", "#### 1,000"), ("math", r"\frac{1}{2}"), ("choice", "(a)")):
        assert check_reference(parse_reward(reward), answer) == ""


@pytest.mark.parametrize("text", ["a " * 50_000, "1,1" * 50_000, "{" * 100_000, "A (" * 50_000])
def test_long_completions_are_scored_in_linear_time(text: str) -> None:
    start = time.process_time()
    for reward in ("number", "choice", "json", "repetition", "exact", "format:think"):
        score(reward, text, "42")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("length:3", "expected a range of tokens"),
        ("length:9-3", "expected a range of tokens"),
        ("length", "length has no argument. Write length:MIN-MAX"),
        ("regex:(", "missing )"),
        ("regex:", "regex has no argument"),
        ("number:x", "a tolerance of 0 or more"),
        ("exact:3", "exact takes no argument"),
        ("format:answer", "format:think"),
        ("rouge:rouge9", "rouge1, rouge2 or rougeL"),
        ("rewards.py", "names no function. Write rewards.py:FUNCTION"),
        ("rewards.py:", "expected FILE.py:FUNCTION"),
        ("=2", "names no reward"),
        ("exact=inf", "a finite number is expected"),
    ],
)
def test_malformed_reward_raises(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("(", r"\(").replace(")", r"\)")):
        parse_reward(text)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("json=0.2", RewardSpec("json=0.2", "builtin", "json", "", 0.2)),
        ("regex:a=b", RewardSpec("regex:a=b", "builtin", "regex", "a=b")),
        ("regex:a=1=2", RewardSpec("regex:a=1=2", "builtin", "regex", "a=1", 2)),
        ("repetition=-1", RewardSpec("repetition=-1", "builtin", "repetition", "", -1)),
        ("r/x.py:f=2", RewardSpec("r/x.py:f=2", "function", "r/x.py", "f", 2)),
        ("runs/reward", RewardSpec("runs/reward", "model", "runs/reward")),
    ],
)
def test_parse_reward_and_weight(text: str, spec: RewardSpec) -> None:
    assert parse_reward(text) == spec


def test_time_limit_is_not_caught_by_a_reward() -> None:
    def slow(*_: object) -> float:
        with contextlib.suppress(Exception):  # as math-verify does
            time.sleep(5)
        return 1.0

    before = signal.signal(signal.SIGALRM, worker._raise_slow)
    try:
        batch = {"texts": ["a"], "completion_ids": [[1]], "columns": {}}
        assert worker.Worker()._built_in(slow, batch, 0.05) == [0.0]
    finally:
        signal.signal(signal.SIGALRM, before)
