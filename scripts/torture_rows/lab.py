"""Processes for stress tests, forked from one that has imported everything.

A forked process begins in milliseconds instead of seconds, so that hundreds of runs are broken off
in minutes. What is done to it before it begins, such as a limit or an error to come, is a function
that it calls first. It is killed as a group when it takes too long.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOO_LONG = 20.0  # seconds without an end, beyond what a run takes when nothing is done to it
STEPS = 5  # a step with its checkpoint is a tenth of what a run costs
VERDICTS = ("good", "bad", "silent", "hang", "outside")
GOOD, BAD, SILENT, HANG, OUTSIDE = VERDICTS

_WORDS = "alpha beta gamma delta one two three four red blue green small large old new".split()


@dataclass(frozen=True)
class Case:
    """What became of one try.

    Attributes:
        verdict: one of `VERDICTS`.
        name: what was done.
        why: what was seen, where it is not good.
        kind: by which the good ones are told apart in the table, if at all.
        times: how many tries it stands for.
    """

    verdict: str
    name: str
    why: str = ""
    kind: str = ""
    times: int = 1


@dataclass(frozen=True)
class Ended:
    """A process that is over.

    Attributes:
        code: its exit code, negative for the signal that killed it.
        out: what it wrote to stdout.
        err: what it wrote to stderr.
        hung: whether it had to be killed because it took too long.
    """

    code: int
    out: str
    err: str
    hung: bool

    @property
    def last(self) -> str:
        """The last line of stderr."""
        return self.err.strip().rpartition("\n")[2]

    @property
    def is_raw(self) -> bool:
        """Whether a traceback was shown, or it was killed by a signal that nobody sent."""
        return "Traceback (most recent" in self.err or self.code in (-6, -11, -4, -7, 99)

    @property
    def is_unforeseen(self) -> bool:
        """Whether it ended in the line for errors that nobody foresaw."""
        return "is a bug in ftlevel" in self.err


class Child:
    """A process of ftlevel, in a group of its own."""

    def __init__(self, pid: int, out: int, err: int) -> None:
        self.pid = pid
        self._pipes = {out: bytearray(), err: bytearray()}
        self._order = (out, err)
        self.began = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = TOO_LONG) -> Ended:
        """Return how it ended; kill it and its own processes after `seconds`."""
        open_pipes, hung, status = set(self._pipes), False, None
        deadline = time.monotonic() + seconds
        while status is None:
            for pipe in select.select(list(open_pipes), [], [], 0.02)[0]:
                if not self._read(pipe):
                    open_pipes.discard(pipe)
            if not open_pipes:
                time.sleep(0.005)
            found, code = os.waitpid(self.pid, os.WNOHANG)
            if found:
                status = code
            elif time.monotonic() > deadline:
                hung = True
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.kill()
        for pipe in open_pipes:
            while select.select([pipe], [], [], 0)[0] and self._read(pipe):
                pass
        for pipe in self._order:
            os.close(pipe)
        out, err = (self._pipes[pipe].decode(errors="replace") for pipe in self._order)
        return Ended(os.waitstatus_to_exitcode(status), out, err, hung)

    def _read(self, pipe: int) -> bool:
        block = os.read(pipe, 1 << 16)
        self._pipes[pipe] += block
        return bool(block)


@dataclass
class Lab:
    """Where a row works.

    Attributes:
        root: its folder, deleted at the end.
        random: draws what the row does.
        patience: seconds that a process may take.
    """

    root: Path
    random: random.Random
    patience: float = TOO_LONG
    _number: int = field(default=0, init=False)

    @property
    def base(self) -> Path:
        """A tiny model."""
        return self.root / "base"

    @property
    def rows(self) -> Path:
        """A file of examples."""
        return self.root / "rows.jsonl"

    def folder(self) -> Path:
        """Return a path below the root that nothing is at yet."""
        self._number += 1
        return self.root / f"case-{self._number}"

    def training(self, run: Path, *more: str) -> list[str]:
        """Return the command of the run that most rows break off."""
        return ["train", "--quiet", "--model", str(self.base), "--dataset", str(self.rows),
                "--task", "text-generation", "--batch-size", "4", "--max-steps", str(STEPS),
                "--logging-steps", "1", "--save-steps", "1", "--lora-dropout", "0.1",
                "--no-verify-fast", "--output-dir", str(run), *more]  # fmt: skip

    def start(self, arguments: Sequence[str], before: Callable[[], None] | None = None) -> Child:
        """Begin a command in a process of its own, which calls `before` first."""
        pipes = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            _be_ftlevel(arguments, pipes[0][1], pipes[1][1], before, self.root)
        for _, write in pipes:
            os.close(write)
        return Child(pid, pipes[0][0], pipes[1][0])

    def run(
        self,
        arguments: Sequence[str],
        before: Callable[[], None] | None = None,
        seconds: float | None = None,
    ) -> Ended:
        """Run a command to its end."""
        return self.start(arguments, before).wait(seconds or self.patience)

    def fresh(self, arguments: Sequence[str]) -> Child:
        """Begin a command as a user does, by a new interpreter."""
        pipes = os.pipe(), os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "ftlevel", *arguments], stdout=pipes[0][1], stderr=pipes[1][1],
            stdin=subprocess.DEVNULL, cwd=self.root, start_new_session=True, preexec_fn=_defaults,
        )  # fmt: skip
        for _, write in pipes:
            os.close(write)
        process.returncode = 0  # it is waited for by us
        return Child(process.pid, pipes[0][0], pipes[1][0])


def _defaults() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _be_ftlevel(
    arguments: Sequence[str],
    out: int,
    err: int,
    before: Callable[[], None] | None,
    where: Path,
) -> None:
    """Run a command as the program does, and end the process."""
    code = 99
    try:
        os.setsid()
        os.chdir(where)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    except BaseException:  # noqa: BLE001 - it is shown, as the interpreter would
        traceback.print_exc()
        os._exit(code)
    _run_main(arguments, before)


def _run_main(arguments: Sequence[str], before: Callable[[], None] | None = None) -> None:
    """Run a command line in this process, and end it with its exit code; 99 after a traceback."""
    code = 99
    try:
        _defaults()
        sys.argv = ["ftlevel", *arguments]
        from ftlevel.__main__ import main

        if before is not None:
            before()
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - it is shown, as the interpreter would
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def save_rows(path: Path, rows: int = 64, seed: int = 0) -> None:
    """Write examples of prompts and completions."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(least, most)))

    lines = [
        json.dumps({"prompt": words(3, 20), "completion": words(2, 8)}) + "\n" for _ in range(rows)
    ]
    path.write_text("".join(lines))


def replace_methods(owner: type, **methods: Callable[..., object]) -> None:
    """Give a class other methods, in a process that is tortured."""
    for name, method in methods.items():
        setattr(owner, name, method)


def digest(run: Path) -> str:
    """Return what a run has trained, and what it logged of its steps, as one digest."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = hashlib.sha256()
    try:
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        return "no adapter"
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].float().numpy().tobytes())
    steps = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            steps[record["step"]] = [record[k] for k in ("loss", "grad_norm", "learning_rate")]
    found.update(json.dumps(steps, sort_keys=True).encode())
    return found.hexdigest()


def certified(run: Path) -> list[Path]:
    """Return the checkpoints of `run` that have a manifest."""
    found = (p.parent for p in run.glob("checkpoints/checkpoint-*/manifest.json"))
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def leftovers(run: Path) -> list[str]:
    """Return what a run that is done should not have: partial files, a replaced run."""
    rejected = "/rejected-"  # a checkpoint that was set aside as it was
    names = [p.name for p in run.rglob("*.partial") if rejected not in p.as_posix()]
    return names + [name for name in (".replaced",) if (run / name).exists()]


def warm_up(lab: Lab, commands: Sequence[Sequence[str]]) -> None:
    """Import here what the commands import, so that processes forked from here need not.

    Raises:
        RuntimeError: one of them failed.
    """
    listed = lab.root / "modules.json"
    for command in commands:

        def note() -> None:
            end = os._exit

            def ending(code: int) -> None:
                listed.write_text(json.dumps(sorted(sys.modules)))
                end(code)

            os._exit = ending  # type: ignore[assignment]

        ended = lab.run(command, note, seconds=300)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(command)}: {ended.code}\n{ended.err}")
        for name in json.loads(listed.read_text()):
            if name not in sys.modules and not name.startswith("_"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    gc.collect()
    gc.freeze()


def begin(root: Path) -> Path:
    """Make what all labs have, a model and rows, and import what a run imports, once for all.

    Returns:
        Where they are.
    """
    from tiny_models import save_tiny

    first = Lab(root / "first", random.Random(0))
    first.root.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()):
        save_tiny(first.base, "qwen2", chat=True)
    save_rows(first.rows)
    run = first.folder()
    with _at_home(first.root):
        warm_up(first, [first.training(run)])
    shutil.rmtree(run)
    return first.root


@contextlib.contextmanager
def new_lab(root: Path, seed: int, first: Path) -> Iterator[Lab]:
    """Give a lab with the model and the rows of the `first`, and a home of its own."""
    root.mkdir(parents=True)
    lab = Lab(root, random.Random(seed))
    shutil.copytree(first / "base", lab.base)
    shutil.copy(first / "rows.jsonl", lab.rows)
    try:
        with _at_home(root):
            yield lab
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _at_home(root: Path) -> Iterator[None]:
    """Let processes keep what they keep below `root`."""
    before = dict(os.environ)
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "cache")):
        (root / folder).mkdir()
        os.environ[name] = str(root / folder)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
