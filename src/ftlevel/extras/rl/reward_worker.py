"""Worker process for reward functions, so that a function that hangs or crashes can be stopped.

Requests and replies are JSON lines on stdin and stdout; what functions print goes to stderr.
`extras/rl/rewards.py` starts it.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, TextIO

from ftlevel.extras.rl.builtin_rewards import MAX_CHARACTERS, check_row, create_reward

SECONDS = 5.0
"""Maximum time of a built-in reward for one completion, which then scores 0."""
_OWN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of reward functions that are not columns."""


class _SlowError(BaseException):
    """Timeout of a built-in reward; a `BaseException`, as math-verify catches any `Exception`."""


def _raise_slow(_: int, __: FrameType | None) -> None:
    raise _SlowError


def load_function(path: str, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Import `name` from the file `path`; return it and its signature, as in `_signature`.

    Raises ValueError if the file cannot be imported or has no such function.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"{path} does not exist")
    unique = "ftlevel_reward_" + hashlib.sha256(str(file).encode()).hexdigest()[:8]
    for folder in (str(file.parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)  # last: a file in it does not replace an installed module
    module: Any = sys.modules.get(unique)
    if module is None:
        module_spec = importlib.util.spec_from_file_location(unique, file)
        if module_spec is None or module_spec.loader is None:
            raise ValueError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[unique] = module
        try:
            module_spec.loader.exec_module(module)
        except BaseException as error:  # noqa: BLE001 - any failure of the user's code
            del sys.modules[unique]
            raise ValueError(f"{path} cannot be imported: {_describe(error, str(file))}") from None
    function = getattr(module, name, None)
    if not callable(function) or inspect.isclass(function):
        values = vars(module).items()
        names = [n for n, v in values if inspect.isfunction(v) and v.__module__ == unique]
        has = f"It has {', '.join(names)}." if names else "It has none."
        raise ValueError(f"{path} has no function {name!r}. {has}")
    return function, _signature(function)


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns `needs`, the columns a function requires, and `takes`, its arguments (None: any)."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind == p.POSITIONAL_ONLY for p in parameters):
        raise ValueError("its arguments are positional-only. Drop the /: they are passed by name")
    keywords = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needs = [p.name for p in keywords if p.default is p.empty and p.name not in _OWN]
    accepts_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    return {"needs": needs, "takes": None if accepts_all else [p.name for p in keywords]}


def _describe(error: BaseException, file: str = "") -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    where = f", line {lines[-1]}" if lines else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"[:500]


class Worker:
    """Loaded rewards, and the handlers of requests, which refer to a reward by its index."""

    def __init__(self) -> None:
        self.specs: list[Any] = []
        self.functions: list[Any] = []
        self.signatures: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()  # only one: clients of a file are bound to it
        self._logged: dict[str, Any] = {}

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the rewards; returns `signatures`, one per reward, and error messages `problems`."""
        problems = []
        for fields in request["specs"]:
            config = SimpleNamespace(**fields)
            function: Any = None
            signature: dict[str, Any] = {"needs": [], "takes": None}
            try:
                if config.kind == "builtin":
                    function = create_reward(config, opens_think=request["opens_think"])
                elif config.kind == "function":
                    function, signature = load_function(config.name, config.argument)
            except ValueError as error:
                problems.append(f"--reward {config.text}: {error}")
            self.specs.append(config)
            self.functions.append(function)
            self.signatures.append(signature)
        return {"signatures": self.signatures, "problems": problems}

    def check(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `row`, the first that a built-in reward rejects (or None), and `reason`."""
        for spec in self.specs:
            if spec.kind != "builtin":
                continue
            for index, row in enumerate(request["rows"]):
                if reason := check_row(spec, row):
                    return {"row": index, "reason": f"--reward {spec.text}: {reason}"}
        return {"row": None, "reason": ""}

    def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `scores` and, on failure, `problem` (a message) and `failed` (indices)."""
        index, batch = request["reward"], request["batch"]
        if self.specs[index].kind == "builtin":
            share = 0.8 * request["seconds"] / max(len(batch["texts"]), 1)
            return {"scores": self._built_in(self.functions[index], batch, min(SECONDS, share))}
        return self._called(index, batch)

    def _built_in(self, reward: Any, batch: Mapping[str, Any], seconds: float) -> list[float]:
        scores = []
        for at, (text, ids) in enumerate(zip(batch["texts"], batch["completion_ids"], strict=True)):
            if len(text) > MAX_CHARACTERS:
                scores.append(0.0)
                continue
            _start_timer(seconds)
            try:
                row = {name: values[at] for name, values in batch["columns"].items()}
                scores.append(float(reward(text, ids, row)))
            except (_SlowError, RecursionError, OverflowError, MemoryError):
                scores.append(0.0)
            finally:
                _start_timer(0)
        return scores

    def _called(self, index: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `scores` of a function and, on failure, `problem` and `failed` (indices)."""
        count = len(batch["texts"])
        parts = [_part(batch, at) for at in range(count)]  # first: a function may modify lists
        scores, problem = self._try(index, batch)
        if not problem:
            return {"scores": scores, **self._logged}
        singles = [self._try(index, part) for part in parts] if count > 1 else []
        failed = [at for at, (_, reason) in enumerate(singles) if reason]
        if not failed:  # of the batch as a whole
            return {"problem": problem, "failed": list(range(count)), "scores": [0.0] * count}
        return {
            "problem": singles[failed[0]][1],
            "failed": failed,
            "scores": [(one or [0.0])[0] for one, _ in singles],
        }

    def _try(self, index: int, batch: Mapping[str, Any]) -> tuple[list[Any] | None, str]:
        """Call function `index` on `batch`; returns (scores, ""), or (None, problem) on failure."""
        spec, accepted = self.specs[index], self.signatures[index]["takes"]
        self._logged = {"metrics": defaultdict(list), "extra": defaultdict(list)}
        values = {
            **batch["columns"],
            "prompts": batch["prompts"],
            "completions": batch["completions"],
            "completion_ids": batch["completion_ids"],
            "trainer_state": SimpleNamespace(**batch["state"]),
            "log_extra": lambda column, values: self._logged["extra"][column].extend(values),
            "log_metric": lambda name, value: self._logged["metrics"][name].append(float(value)),
        }
        if accepted is not None:
            values = {name: value for name, value in values.items() if name in accepted}
        try:
            result = self.functions[index](**values)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(result)
            return _checked(result, len(batch["texts"]))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any failure of the user's code
            return None, _describe(error, str(Path(spec.name).resolve()))


def _part(batch: Mapping[str, Any], at: int) -> dict[str, Any]:
    names = ("texts", "prompts", "completions", "completion_ids")
    columns = {name: [values[at]] for name, values in batch["columns"].items()}
    return {**batch, **{name: [batch[name][at]] for name in names}, "columns": columns}


def _checked(result: Any, count: int) -> tuple[list[Any] | None, str]:
    """Returns (scores, "") if `result` has `count` items, numbers or None; else (None, problem)."""
    if hasattr(result, "tolist"):  # a tensor or an array
        result = result.tolist()
    if not isinstance(result, list | tuple):
        return None, f"it returned {type(result).__name__}, not a list of scores"
    if len(result) != count:
        return None, f"it returned {len(result)} scores for {count} completions"
    scores: list[float | None] = []
    for value in result:
        if value is None:
            scores.append(None)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            return None, f"it returned {type(value).__name__}, not a number"
        if number != number or abs(number) == float("inf"):
            return None, f"it returned {number} (None means no score)"
        scores.append(number)
    return scores, ""


def _start_timer(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def serve(requests: TextIO, replies: TextIO) -> None:
    """Reply to requests until the input ends."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _raise_slow)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides
    worker = Worker()
    methods = {"load": worker.load, "check": worker.check, "score": worker.score}
    for line in requests:
        request = json.loads(line)
        replies.write(json.dumps(methods[request["do"]](request), default=_to_json) + "\n")
        replies.flush()


def _to_json(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve requests on stdin and stdout; reward functions have no stdin, and print to stderr."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():  # a signal ends the run only
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    serve(requests, replies)


if __name__ == "__main__":
    main()
