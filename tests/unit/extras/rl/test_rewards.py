"""Tests of reward functions: called with TRL's arguments, in a process that can be stopped."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forked import Forked
from ftlevel.config import DataConfig
from ftlevel.errors import ConfigError
from ftlevel.extras.rl.config import RlConfig
from ftlevel.extras.rl.objective import RewardMeter
from ftlevel.extras.rl.rewards import RewardError, Rewards
from ftlevel.extras.rl.step import GroupStatistics, compute_metrics
from ftlevel.tasks import TASKS

FUNCTIONS = """
import asyncio, os, subprocess, time

def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def of_messages(completions, **kwargs):
    return [len(completion[0]["content"]) for completion in completions]

async def level_of(completions, level):
    return level

def all_arguments(prompts, completions, completion_ids, answer, trainer_state, log_extra,
                  log_metric):
    log_extra("a", [1]), log_metric("b", 2.0)
    return [len(i) + trainer_state.global_step for i in completion_ids]

def where_it_applies(completions, level, **kwargs):
    return [None if one == 1 else 0.5 for one in level]

def optional(completions, level=None):
    return [0.0 if level is None else 1.0] * len(completions)

def prints(completions, **kwargs):
    print("to the screen")
    return [1] * len(completions)

loops = set()

async def num_loops(completions, **kwargs):
    loops.add(asyncio.get_running_loop())
    return [len(loops)] * len(completions)

def logs(completions, level, log_metric, log_extra, **kwargs):
    log_metric("levels", sum(level))
    log_metric("nothing", float("nan"))
    log_extra("level", level)
    return [1.0] * len(completions)

def reads_input(completions, **kwargs):
    return [len(subprocess.run(["cat"], stdout=subprocess.PIPE).stdout)] * len(completions)

def removes(completions, **kwargs):
    completions.pop()
    return [1.0] * len(completions)

def raises(completions, **kwargs):
    return [1 / len(completion.strip("x")) for completion in completions]

def exits(completions, **kwargs):
    raise SystemExit("no grader")

def nan(completions, **kwargs):
    return [float("nan") if "x" in completion else 1.0 for completion in completions]

def infinite(completions, **kwargs):
    return [float("-inf")] * len(completions)

def text(completions, **kwargs):
    return ["good"] * len(completions)

def too_few(completions, **kwargs):
    return [1.0]

def child_hangs(completions, **kwargs):
    if not os.fork():
        time.sleep(60)
    time.sleep(60)

def one_number(completions, **kwargs):
    return 1.0

def hangs(completions, **kwargs):
    time.sleep(600)

def dies(completions, **kwargs):
    os._exit(3)

def needs_groups(completions, **kwargs):
    if len(completions) < 2:
        raise ValueError("compared in groups")
    return [1.0, 0.0, 0.5]

def positional_only(completions, /):
    return [0.0] * len(completions)

class Grader:
    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)

grader = Grader()
CONSTANT = 3
"""

Score = Callable[..., list[list[float | None]]]
TEXTS = ["a", "xx", "ccc"]
COLUMNS = {"level": [1, 2, 3], "answer": ["a", "b", "ccc"]}


@pytest.fixture
def rewards_file(tmp_path: Path) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.fixture
def resolve_rewards() -> Iterator[Callable[..., Rewards]]:
    opened: list[Rewards] = []

    def create(*reward: str, **settings: Any) -> Rewards:
        opened.append(Rewards(RlConfig(reward=reward, **settings)))
        return opened[-1]

    yield create
    for rewards in opened:
        rewards.close()


def score(rewards: Rewards, prompts: Sequence[Any] = ("p", "q", "r"), **options: Any) -> Any:
    ids = [[1], [1, 2], [1, 2, 3]]
    return rewards.score(list(prompts), TEXTS, ids, COLUMNS, **options)


def test_functions_are_called_with_trl_arguments(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    names = ["length", "level_of", "all_arguments", "where_it_applies", "optional", "prints"]
    names += ["grader"]
    rewards = resolve_rewards(*(f"{rewards_file}:{name}" for name in names), "exact=0.5")
    rewards.check_columns(COLUMNS)
    rewards.check_rows([{"answer": answer} for answer in COLUMNS["answer"]], str)
    assert score(rewards, state={"global_step": 10}) == [
        [1.0, 1.0, 11.0, None, 1.0, 1.0, 0.0, 1.0],
        [2.0, 2.0, 12.0, 0.5, 1.0, 1.0, 0.0, 0.0],
        [3.0, 3.0, 13.0, 0.5, 1.0, 1.0, 0.0, 1.0],
    ]
    assert rewards.weights == [1.0] * 7 + [0.5]
    assert rewards.names[0] == f"{rewards_file}:length"
    assert rewards.names[-1] == "exact"


def test_logged_values_are_those_of_the_last_batch(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    rewards = resolve_rewards(f"{rewards_file}:logs", "exact")
    for _ in range(2):
        score(rewards)
        assert rewards.logged["extra"] == {"level": [1, 2, 3]}
        assert rewards.logged["metrics"]["levels"] == [6]


def test_async_functions_keep_their_event_loop(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    rewards = resolve_rewards(f"{rewards_file}:num_loops")
    assert [score(rewards) for _ in range(2)] == [[[1.0]] * 3] * 2


def test_processes_of_functions_get_no_input(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    rewards = resolve_rewards(f"{rewards_file}:reads_input", reward_timeout=5)
    assert score(rewards) == [[0.0]] * 3


def test_message_prompt_gives_message_completion(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    prompts = [[{"role": "user", "content": "p"}]] * 3
    assert score(resolve_rewards(f"{rewards_file}:of_messages"), prompts) == [[1.0], [2.0], [3.0]]


FAILURES = [
    (
        "raises",
        "ZeroDivisionError: division by zero, line",
        "row 2: completion: 'xx'",
        [1, 0, 1 / 3],
        1,
    ),
    ("exits", "SystemExit: no grader, line", "row 1: of 3 completions", [0, 0, 0], 3),
    ("nan", "it returned nan (None means no score)", "row 2: completion: 'xx'", [1, 0, 1], 1),
    ("infinite", "it returned -inf", "row 1: of 3 completions, the first: 'a'", [0, 0, 0], 3),
    ("text", "it returned str, not a number", "row 1: of 3 completions", [0, 0, 0], 3),
    ("one_number", "it returned float, not a list of scores", "row 1: of 3", [0, 0, 0], 3),
    ("removes", "it returned 0 scores for 1 completions", "row 1: of 3", [0, 0, 0], 3),
    ("hangs", "it took longer than 0.5 s (--reward-timeout)", "row 1: of 3", [0, 0, 0], 3),
    ("child_hangs", "it took longer than 0.5 s (--reward-timeout)", "row 1: of 3", [0, 0, 0], 3),
    ("dies", "its process ended with code 3", "row 1: of 3", [0, 0, 0], 3),
]


@pytest.mark.parametrize(("name", "problem", "row_message", "zeros", "count"), FAILURES)
def test_failing_function_raises_or_scores_zero(
    name: str,
    problem: str,
    row_message: str,
    zeros: list[float],
    count: int,
    rewards_file: str,
    resolve_rewards: Callable[..., Rewards],
) -> None:
    row_names = ["row 1", "row 2", "row 3"]
    with pytest.raises(RewardError) as error:
        score(resolve_rewards(f"{rewards_file}:{name}", reward_timeout=0.5), where=row_names)
    assert problem in str(error.value)
    assert row_message in str(error.value)
    lenient = resolve_rewards(
        f"{rewards_file}:{name}", "exact", reward_timeout=0.5, on_reward_error="zero"
    )
    expected = [[zero, float(exact)] for zero, exact in zip(zeros, (1, 0, 1), strict=True)]
    assert score(lenient) == expected
    assert lenient.failures == {f"{rewards_file}:{name}": count}
    assert score(lenient) == expected  # also after the worker was restarted
    assert lenient.failures == {f"{rewards_file}:{name}": 2 * count}
    (message,) = lenient.describe_failures()
    assert f"{name} failed on {2 * count} completions" in message
    assert problem in message
    assert lenient.logged["metrics"]["failed_rewards"] == [count / 6]
    none: tuple[Any, dict[str, str]] = (Counter(), {})
    lenient.gather_failures(lambda own: [none, own, own])  # of three processes
    (message,) = lenient.describe_failures()
    assert f"{name} failed on {4 * count} completions" in message
    assert problem in message


def test_killed_run_stops_its_reward_worker(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "slow.py").write_text(
        f"import os, time\ndef slow(completions, **_):\n    open({str(pid)!r}, "
        "'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    )
    code = (
        "import ftlevel.config\n"
        "from ftlevel.extras.rl.config import RlConfig\n"
        "from ftlevel.extras.rl.rewards import Rewards\n"
        f"rewards = Rewards(RlConfig(reward=[{str(tmp_path / 'slow.py:slow')!r}]))\n"
        "rewards.score(['a'], ['b'], [[1]], {})"
    )
    process = Forked(call=(exec, (code, {})))
    assert wait_until(lambda: pid.exists() and pid.read_text() != "")
    process.kill()
    process.wait()
    worker = Path(f"/proc/{pid.read_text()}")
    assert wait_until(
        lambda: not worker.exists() or "Z" in (worker / "stat").read_text().split()[2]
    )


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Returns whether `condition` becomes true within `seconds`."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_wrong_number_of_scores_raises(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    with pytest.raises(RewardError, match="it returned 1 scores for 3 completions"):
        score(resolve_rewards(f"{rewards_file}:too_few"))


def test_function_is_called_with_whole_group(
    rewards_file: str, resolve_rewards: Callable[..., Rewards]
) -> None:
    assert score(resolve_rewards(f"{rewards_file}:needs_groups")) == [[1.0], [0.0], [0.5]]


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ("{file}:lenght", "has no function 'lenght'. It has length, of_messages, level_of"),
        ("{file}:CONSTANT", "has no function 'CONSTANT'"),
        ("{file}:Grader", "has no function 'Grader'"),
        ("{file}:positional_only", "its arguments are positional-only"),
        ("{folder}/none.py:f", "none.py does not exist"),
        ("{folder}/broken.py:f", "broken.py cannot be imported: SyntaxError"),
        ("{folder}/imports.py:f", "cannot be imported: ModuleNotFoundError: No module named 'nox'"),
        ("json:{folder}/none.json", "none.json cannot be read"),
        ("exactly", "reward models cannot be used here"),
    ],
)
def test_unloadable_reward_raises(
    reward: str,
    problem: str,
    rewards_file: str,
    tmp_path: Path,
    resolve_rewards: Callable[..., Rewards],
) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "imports.py").write_text("import nox\n")
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        resolve_rewards(reward.format(file=rewards_file, folder=tmp_path))


def test_missing_columns_raise(rewards_file: str, resolve_rewards: Callable[..., Rewards]) -> None:
    rewards = resolve_rewards(
        f"{rewards_file}:level_of",
        f"{rewards_file}:optional",
        f"{rewards_file}:length",
        "exact",
        "json",
    )
    rewards.check_columns(["level", "answer"])
    with pytest.raises(ConfigError) as error:
        rewards.check_columns(["levle"])
    assert error.value.problems == [
        f"--reward {rewards_file}:level_of needs a column 'level', and the rows have levle. "
        "Did you mean 'levle'? Add the column, or give the argument a default.",
        "--reward exact needs a column 'answer', and the rows have levle. Name it: --map "
        "answer=COLUMN, e.g. answer=completion.",
    ]


def test_invalid_reference_answer_raises_with_row(resolve_rewards: Callable[..., Rewards]) -> None:
    rewards = resolve_rewards("number")
    rewards.check_rows([{"answer": answer} for answer in ("#### 1", 2, 3.5)], str)
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: --reward number: the answer 'b' has no"):
        rewards.check_rows([{"answer": "1"}, {"answer": "b"}], lambda row: f"rows.jsonl:{row + 1}")


def test_backtracking_pattern_scores_zero_in_time(resolve_rewards: Callable[..., Rewards]) -> None:
    rewards = resolve_rewards(r"regex:^(a+)+$", reward_timeout=5)
    ids = [[1], [1]]
    assert rewards.score(["p", "p"], ["a" * 40 + "b", "aaa"], ids, {}) == [[0.0], [1.0]]
    assert not rewards.failures


def test_fingerprint_depends_on_source_and_weight(
    rewards_file: str, tmp_path: Path, resolve_rewards: Callable[..., Rewards]
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text("{}")
    before = resolve_rewards(f"{rewards_file}:length", f"json:{schema}").fingerprint
    assert resolve_rewards(f"{rewards_file}:length", f"json:{schema}").fingerprint == before
    schema.write_text('{"type": "object"}')
    with_new_schema = resolve_rewards(f"{rewards_file}:length", f"json:{schema}").fingerprint
    Path(rewards_file).write_text(FUNCTIONS + "\n# changed\n")
    with_new_source = resolve_rewards(f"{rewards_file}:length", f"json:{schema}").fingerprint
    weighted = resolve_rewards(f"{rewards_file}:length=2", f"json:{schema}").fingerprint
    assert len({before, with_new_schema, with_new_source, weighted}) == 4
    copy = tmp_path / "moved" / Path(rewards_file).name
    copy.parent.mkdir()
    copy.write_text(Path(rewards_file).read_text())
    moved = resolve_rewards(f"{copy}:length=1", f"json:{schema}").fingerprint
    assert moved == with_new_source


def test_close_stops_worker(resolve_rewards: Callable[..., Rewards]) -> None:
    rewards = resolve_rewards("exact")
    worker = rewards._worker
    assert worker is not None
    rewards.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
    assert score(rewards) == [[1.0], [0.0], [1.0]]  # the worker restarts on demand


def test_json_schema_per_row(resolve_rewards: Callable[..., Rewards]) -> None:
    rewards = resolve_rewards("json:form")
    schemas = [{"required": ["a"]}, '{"required": ["b"]}', {}]
    rewards.check_columns(["form"])
    rewards.check_rows([{"form": schema} for schema in schemas], str)
    columns = {"form": schemas, "answer": [None, None, {"a": 1, "b": 2}]}
    scores = rewards.score(["p"] * 3, ['{"a": 1}'] * 3, [[1]] * 3, columns)
    assert scores == [[1.0], [0.0], [0.5]]
    for schema in (None, "{", {"$schema": {}}, {"$schema": 1}, {"type": "no such type"}):
        with pytest.raises(ConfigError, match="2: --reward json:form: the column 'form' has"):
            rewards.check_rows([{"form": {}}, {"form": schema}], lambda row: str(row + 1))
    with pytest.raises(ConfigError, match=r"needs a column 'form', .* Add the column\.$"):
        rewards.check_columns(["answer"])


class LengthReward:
    fingerprint = "constant"

    def score(self, prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
        return [float(len(text)) if text != "xx" else float("nan") for text in completions]


def test_reward_model_with_function() -> None:
    settings = RlConfig(reward=("run=0.5", "exact"), on_reward_error="zero")
    rewards = Rewards(settings, lambda name: LengthReward())
    try:
        assert score(rewards) == [[1.0, 1.0], [0.0, 0.0], [3.0, 1.0]]
        assert rewards.failures == {"run": 1}
        assert rewards.weights == [0.5, 1.0]
    finally:
        rewards.close()


def test_metric_names_are_unique() -> None:
    config = RlConfig(reward=("a/x.py:f", "y.py:f=2", "y.py:g", "json:b/s.json", "runs/rm"))
    assert config.reward_names == ["x.f", "y.f", "g", "json:s.json", "rm"]


def test_reward_named_std_has_its_own_metric() -> None:
    rewards, lengths = np.array([0.0, 1.0]), np.array([2, 2])
    scores = np.array([[1.0, -1.0], [1.0, 0.0]])
    group = GroupStatistics(0, rewards, scores, lengths, lengths, lengths > 1, 0.0)
    metrics = compute_metrics([group], ["std", "other"])
    assert metrics["reward_std"] == 1.0
    assert metrics["group_std"] == pytest.approx(0.5**0.5)


def test_prompts_without_a_score_are_left_out_of_pass_at_k() -> None:
    meter = RewardMeter(RlConfig(reward=("x.py:f", "exact"), num_generations=2))
    scores = ([1, 0], [np.nan, 1], [np.nan, np.nan])
    for first in scores:
        own = np.array([[0.5, 3, 1, score, 0.5] for score in first])
        meter.update(own, ["a", "b"], [None])
    assert meter.compute(math.nan)["pass@1"] == 0.5


def test_inference_config_has_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rm").mkdir()
    reward = ["r.py:f=0.1", "json:s.json=0.30000001", "rm", "org/rm", "exact"]
    task = TASKS["rl"].configured({"rl": {"reward": reward}})
    values = task.inference_config(DataConfig(), {})["rl"]
    monkeypatch.chdir("/")
    evaluated = RlConfig(**values)
    assert [spec.weight for spec in evaluated.rewards] == [0.1, 0.30000001, 1, 1, 1]
    names = [spec.argument if spec.name == "json" else spec.name for spec in evaluated.rewards]
    assert names == [f"{tmp_path}/r.py", f"{tmp_path}/s.json", f"{tmp_path}/rm", "org/rm", "exact"]
    assert evaluated.reward_names == RlConfig(reward=reward).reward_names
