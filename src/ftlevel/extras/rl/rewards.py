"""Rewards of completions: reward models, and functions that run in a worker process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftlevel.errors import ConfigError, RunError, did_you_mean, join_names
from ftlevel.extras.rl.builtin_rewards import get_columns
from ftlevel.extras.rl.config import RewardSpec, RlConfig
from ftlevel.safe_io import python_command, start_process

START_SECONDS = 300.0
"""Time limit for starting the worker and importing the files of reward functions."""
_SECONDS_TO_END = 1.0
Prompt = str | list[dict[str, Any]]
OpenModel = Callable[[str], Any]
"""Returns the reward model of a name (`score`, `fingerprint`) without loading its weights.

Raises InputError; see `extras.rl.rollouts.TrainedRewardModel`."""


class RewardError(RunError):
    """A reward failed on a completion."""


class Rewards:
    """All rewards of `--task rl`; imports the functions' files, but loads no weights.

    `open_model` resolves reward models. `opens_think`: whether prompts end with `<think>`. Raises
    `ConfigError` if a reward does not exist or cannot be used.

    Attributes:
        names: rewards as the user wrote them, without weights.
        weights: one per name.
        fingerprint: hash of everything that determines the scores, such as the functions' files.
        failures: name → number of completions that scored 0 because the reward failed.
        logged: arguments of `log_metric` and `log_extra` in the last `score`: metrics (name →
            values) and extra (column → values).
    """

    def __init__(
        self, config: RlConfig, open_model: OpenModel | None = None, *, opens_think: bool = False
    ) -> None:
        self.specs = specs = config.rewards
        self.names = [_name(spec) for spec in specs]
        self.weights = [spec.weight for spec in specs]
        self.failures: Counter[str] = Counter()
        self._first_errors: dict[str, str] = {}
        self.logged: dict[str, dict[str, Any]] = {"metrics": {}, "extra": {}}
        self._config = config
        self._models: dict[int, Any] = {}
        self._opens_think = opens_think
        self._worker: subprocess.Popen[str] | None = None
        for at, spec in enumerate(specs):
            if spec.kind == "model":
                if open_model is None:
                    raise ConfigError(f"--reward {spec.name}: reward models cannot be used here.")
                self._models[at] = open_model(spec.name)
        self.fingerprint = _fingerprint(specs, self._models)
        self._needs = [signature["needs"] for signature in self._start()]

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise `ConfigError` if a reward needs a column that the rows do not have."""
        there = list(columns)
        problems = []
        for spec, needs in zip(self.specs, self._needs, strict=True):
            for name in get_columns(spec) if spec.kind == "builtin" else needs:
                if name not in there:
                    advice = "Add the column."
                    if name == "answer":
                        advice = "Name it: --map answer=COLUMN, e.g. answer=completion."
                    elif spec.kind == "function":
                        advice = "Add the column, or give the argument a default."
                    problems.append(
                        f"--reward {spec.text} needs a column {name!r}, and the rows have "
                        f"{join_names(there) or 'none'}.{did_you_mean(name, there)} {advice}"
                    )
        if problems:
            raise ConfigError(problems)

    def check_rows(self, rows: Sequence[Mapping[str, Any]], where: Callable[[int], str]) -> None:
        """Raise `ConfigError` if a built-in reward cannot use a row; `where(index)`: file:line."""
        used = {name for spec in self.specs for name in get_columns(spec)}
        values = [{name: row.get(name) for name in used} for row in rows]
        found = self._request({"do": "check", "rows": values}, START_SECONDS)
        if found is None:
            raise ConfigError("the answers could not be checked: the reward process ended.")
        if found["reason"]:
            raise ConfigError(f"{where(found['row'])}: {found['reason']}.")

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        where: Sequence[str] = (),
        state: Mapping[str, Any] | None = None,
    ) -> list[list[float | None]]:
        """Returns unweighted scores `[completion][reward]`; None where a reward does not apply.

        Args:
            prompts: a text, or messages, for each completion.
            completions: texts; functions get a list of one message each if the prompt has messages.
            completion_ids: token ids of the completions.
            columns: column → value for each completion.
            where: file and line of each completion's prompt, for errors.
            state: fields of `trainer_state`; default: only global_step 0.

        Raises:
            RewardError: a reward failed, unless `on_reward_error` is zero.
        """
        batch = {
            "texts": list(completions),
            "prompts": list(prompts),
            "completions": [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(prompts, completions, strict=True)
            ],
            "completion_ids": [list(ids) for ids in completion_ids],
            "columns": {name: list(values) for name, values in columns.items()},
            "state": dict(state or {"global_step": 0}),
        }
        self.logged, num_failures = {"metrics": {}, "extra": {}}, self.failures.total()
        by_reward = [self._score(at, batch, where) for at in range(len(self.specs))]
        if self._config.on_reward_error == "zero":
            share = (self.failures.total() - num_failures) / (len(completions) * len(self.specs))
            self.logged["metrics"]["failed_rewards"] = [share]
        return [list(scores) for scores in zip(*by_reward, strict=True)]

    def gather_failures(self, all_gather: Callable[[Any], list[Any]]) -> None:
        """Add the failures in all processes; called once, by each of them."""
        parts = all_gather((self.failures, self._first_errors))
        self.failures, self._first_errors = Counter(), {}
        for failures, errors in parts:
            self.failures += failures
            self._first_errors = errors | self._first_errors

    def describe_failures(self) -> list[str]:
        """Returns a message for each reward that failed and scored 0."""
        return [
            f"--reward {name} failed on {count:,} completions, which score 0. The first error: "
            f"{self._first_errors[name]}."
            for name, count in self.failures.items()
        ]

    def close(self) -> None:
        """Stop the worker process and all processes that reward functions started."""
        if self._worker is None:
            return
        import psutil  # lazy: of accelerate

        worker, self._worker = self._worker, None
        with contextlib.suppress(psutil.Error):  # those that left the group by setsid, too
            for process in psutil.Process(worker.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        if hasattr(os, "killpg"):  # not on Windows
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):  # processes may hold the other ends
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _score(
        self, at: int, batch: Mapping[str, Any], where: Sequence[str]
    ) -> Sequence[float | None]:
        count = len(batch["texts"])
        if at in self._models:
            reply: dict[str, Any]
            scores = self._models[at].score(batch["prompts"], batch["texts"])
            wrong = [i for i, score in enumerate(scores) if score != score]
            reply = {"failed": wrong, "problem": "it returned nan" if wrong else ""}
            reply["scores"] = [0.0 if score != score else score for score in scores]
        else:
            if self._worker is None:
                self._start()
            seconds = self._config.reward_timeout
            request = {"do": "score", "reward": at, "batch": batch, "seconds": seconds}
            reply = self._request(request, seconds) or {
                "problem": self._why_no_reply(seconds),
                "failed": list(range(count)),
                "scores": [0.0] * count,
            }
        if reply.get("problem"):
            self._fail(at, reply, batch, where)
        for kind, values in self.logged.items():
            for name, new in reply.get(kind, {}).items():
                values[name] = [*values.get(name, ()), *new]
        return list(reply["scores"])

    def _fail(
        self, at: int, reply: Mapping[str, Any], batch: Mapping[str, Any], where: Sequence[str]
    ) -> None:
        name, failed = self.names[at], reply["failed"]
        if self._config.on_reward_error == "zero":
            self.failures[name] += len(failed)
            self._first_errors.setdefault(name, reply["problem"])
            return
        first, count = failed[0], len(batch["texts"])
        location = where[first] if where else f"prompt {_shown(batch['prompts'][first])}"
        which = f"of {count} completions, the first" if len(failed) == count > 1 else "completion"
        raise RewardError(
            f"--reward {name} failed: {reply['problem']}. {location}: {which}: "
            f"{_shown(batch['texts'][first])}\nCorrect it and resume with --resume --allow-change "
            "rl.fingerprint, or with --resume --on-reward-error zero."
        )

    def _start(self) -> list[dict[str, Any]]:
        self._reason = ""
        self._worker = start_process(
            python_command("ftlevel.extras.rl.reward_worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        specs = [asdict(spec) for spec in self.specs]
        request = {"do": "load", "specs": specs, "opens_think": self._opens_think}
        loaded = self._request(request, START_SECONDS)
        if loaded is None:
            raise ConfigError(f"the rewards cannot be loaded: {self._why_no_reply(START_SECONDS)}.")
        if loaded["problems"]:
            self.close()
            raise ConfigError(loaded["problems"])
        signatures: list[dict[str, Any]] = loaded["signatures"]
        return signatures

    def _request(self, request: Mapping[str, Any], seconds: float) -> Any:
        """Returns the worker's reply; None if it has exited, or was stopped after `seconds`."""
        worker = self._worker
        if worker is None or worker.stdin is None or worker.stdout is None:
            raise RuntimeError("there is no worker")
        try:
            worker.stdin.write(json.dumps(request, default=str) + "\n")
            worker.stdin.flush()
            if select.select([worker.stdout], [], [], seconds)[0]:
                line = worker.stdout.readline()
                if line:
                    return json.loads(line)
                self._reason = _describe_end(worker)
        except BrokenPipeError:
            self._reason = _describe_end(worker)
        self.close()
        return None

    def _why_no_reply(self, seconds: float) -> str:
        return self._reason or f"it took longer than {seconds:g} s (--reward-timeout)"


def _describe_end(worker: subprocess.Popen[str]) -> str:
    try:
        return f"its process ended with code {worker.wait(_SECONDS_TO_END)}"
    except subprocess.TimeoutExpired:
        return "its process closed its output"


def _name(spec: RewardSpec) -> str:
    return f"{spec.name}:{spec.argument}" if spec.argument else spec.name


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else str(value[-1].get("content", ""))
    text = " ".join(text.split())
    return repr(text if len(text) <= 200 else f"{text[:200]}…")


def _fingerprint(specs: Sequence[RewardSpec], models: Mapping[int, Any]) -> str:
    digest = hashlib.sha256()
    for at, spec in enumerate(specs):
        digest.update(spec.map_path(lambda path: Path(path).name).removesuffix("=1").encode())
        file = spec.name if spec.kind == "function" else spec.argument
        if spec.kind != "model" and file.endswith((".py", ".json")) and Path(file).is_file():
            digest.update(Path(file).read_bytes())
        if at in models:
            digest.update(models[at].fingerprint.encode())
    return digest.hexdigest()[:16]
