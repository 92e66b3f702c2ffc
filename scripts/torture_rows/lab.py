"""Processes for stress tests, forked from one that has imported everything.

A forked process starts in milliseconds instead of seconds, so hundreds of runs can be interrupted
in minutes. Limits and planned errors are set by a function that it calls first. Its process group
is killed when it takes too long.
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

from torture_rows.moments import Course, counting, read_course

HANG_SECONDS = 20.0  # seconds beyond the duration of an undisturbed run
STEPS = 5  # a step with its checkpoint takes a tenth of a run's time
VERDICTS = ("good", "bad", "silent", "hang", "outside")
GOOD, BAD, SILENT, HANG, OUTSIDE = VERDICTS

_WORDS = "alpha beta gamma delta one two three four red blue green small large old new".split()


@dataclass(frozen=True)
class Case:
    """Result of `times` tries; `why` has details if it is not good, `kind` groups good cases."""

    verdict: str
    name: str
    why: str = ""
    kind: str = ""
    times: int = 1


@dataclass(frozen=True)
class ProcessResult:
    """A finished process; `hung` if it was killed because it took too long."""

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
        """Whether it printed a traceback, or was killed by a signal that no one sent."""
        return "Traceback (most recent" in self.err or self.code in (-6, -11, -4, -7, 99)

    @property
    def is_unforeseen(self) -> bool:
        """Whether it ended with the message for unexpected errors."""
        return "is a bug in ftlevel" in self.err


class Child:
    """A process of ftlevel, in its own process group."""

    def __init__(self, pid: int, out: int, err: int) -> None:
        self.pid = pid
        self._pipes = {out: bytearray(), err: bytearray()}
        self._order = (out, err)
        self.start_time = time.monotonic()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal, if the process is running."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = HANG_SECONDS) -> ProcessResult:
        """Return its result; kill its process group after `seconds`."""
        open_pipes, hung, status = set(self._pipes), False, None
        deadline = time.monotonic() + seconds
        while status is None:
            for pipe in select.select(list(open_pipes), [], [], 0.02)[0]:
                if not self._read(pipe):
                    open_pipes.discard(pipe)
            if not open_pipes:
                time.sleep(0.005)
            finished_pid, code = os.waitpid(self.pid, os.WNOHANG)
            if finished_pid:
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
        return ProcessResult(os.waitstatus_to_exitcode(status), out, err, hung)

    def _read(self, pipe: int) -> bool:
        block = os.read(pipe, 1 << 16)
        self._pipes[pipe] += block
        return bool(block)


@dataclass
class Lab:
    """Working directory of a row; a process may take `patience` seconds.

    `reference` is an uninterrupted run of `training` without flags.
    """

    root: Path
    random: random.Random
    patience: float = HANG_SECONDS
    reference: ReferenceRun = field(init=False)
    _number: int = field(default=0, init=False)

    @property
    def base(self) -> Path:
        """Path of a tiny model."""
        return self.root / "base"

    @property
    def rows(self) -> Path:
        """Path of a file of examples."""
        return self.root / "rows.jsonl"

    def folder(self) -> Path:
        """Return a new path below the root."""
        self._number += 1
        return self.root / f"case-{self._number}"

    def training(self, run: Path, *flags: str) -> list[str]:
        """Return the train command that most rows interrupt."""
        return ["train", "--quiet", "--model", str(self.base), "--dataset", str(self.rows),
                "--task", "text-generation", "--batch-size", "4", "--max-steps", str(STEPS),
                "--logging-steps", "1", "--save-steps", "1", "--lora-dropout", "0.1",
                "--no-verify-fast", "--output-dir", str(run), *flags]  # fmt: skip

    def start(self, arguments: Sequence[str], before: Callable[[], None] | None = None) -> Child:
        """Start a command in a forked process, which calls `before` first."""
        pipes = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            _run_as_ftlevel(arguments, pipes[0][1], pipes[1][1], before, self.root)
        for _, write in pipes:
            os.close(write)
        return Child(pid, pipes[0][0], pipes[1][0])

    def run(
        self,
        arguments: Sequence[str],
        before: Callable[[], None] | None = None,
        seconds: float | None = None,
    ) -> ProcessResult:
        """Run a command to its end."""
        return self.start(arguments, before).wait(seconds or self.patience)

    def fresh(self, arguments: Sequence[str], folder: Path | None = None) -> Child:
        """Start a command with a new interpreter, as users do, in `folder` or the root."""
        pipes = os.pipe(), os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-m", "ftlevel", *arguments], stdout=pipes[0][1], stderr=pipes[1][1],
            stdin=subprocess.DEVNULL, cwd=folder or self.root, env=_get_environment(),
            start_new_session=True, preexec_fn=_defaults,
        )  # fmt: skip
        for _, write in pipes:
            os.close(write)
        process.returncode = 0  # Child.wait waits for it
        return Child(process.pid, pipes[0][0], pipes[1][0])


def _get_environment() -> dict[str, str]:
    """Return the environment, with the absolute path of the tested package."""
    import ftlevel

    return {**os.environ, "PYTHONPATH": str(Path(ftlevel.__file__).resolve().parents[1])}


def _defaults() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _run_as_ftlevel(
    arguments: Sequence[str],
    out: int,
    err: int,
    before: Callable[[], None] | None,
    directory: Path,
) -> None:
    """Run a command as the program does, and end the process."""
    code = 99
    try:
        os.setsid()
        os.chdir(directory)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    except BaseException:  # noqa: BLE001 - printed, as by the interpreter
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
    except BaseException:  # noqa: BLE001 - printed, as by the interpreter
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def save_rows(path: Path, rows: int = 64, seed: int = 0) -> None:
    """Write examples with prompts and completions."""
    generator = random.Random(seed)

    def draw_words(low: int, high: int) -> str:
        return " ".join(generator.choices(_WORDS, k=generator.randint(low, high)))

    lines = [
        json.dumps({"prompt": draw_words(3, 20), "completion": draw_words(2, 8)}) + "\n"
        for _ in range(rows)
    ]
    path.write_text("".join(lines))


def replace_methods(owner: type, **methods: Callable[..., object]) -> None:
    """Replace methods of a class in the tested process."""
    for name, method in methods.items():
        setattr(owner, name, method)


def digest(run: Path) -> str:
    """Return one digest of a run's adapter and of the logged values of its steps."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    total = hashlib.sha256()
    try:
        tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    except (OSError, SafetensorError):
        return "no adapter"
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].float().numpy().tobytes())
    steps = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            steps[record["step"]] = [record[k] for k in ("loss", "grad_norm", "learning_rate")]
    total.update(json.dumps(steps, sort_keys=True).encode())
    return total.hexdigest()


def certified(run: Path) -> list[Path]:
    """Return the checkpoints of `run` that have a manifest."""
    checkpoints = (p.parent for p in run.glob("checkpoints/checkpoint-*/manifest.json"))
    return sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]))


def leftovers(run: Path) -> list[str]:
    """Return files that a finished run should not have: partial files, a replaced run."""
    rejected = "/rejected-"  # a checkpoint that was set aside as it was
    names = [p.name for p in run.rglob("*.partial") if rejected not in p.as_posix()]
    return names + [name for name in (".replaced",) if (run / name).exists()]


class ReferenceRun:
    """The uninterrupted run: digest of its adapter and log, file events, and duration."""

    def __init__(self, lab: Lab, *flags: str) -> None:
        run, course = lab.folder(), lab.root / "course.json"
        start = time.monotonic()
        result = lab.run(lab.training(run, *flags), counting(course), seconds=200)
        if result.code != 0:
            raise RuntimeError(result.err)
        self.seconds = time.monotonic() - start
        self.digest = digest(run)
        self.course: Course = read_course(course)
        shutil.rmtree(run)


def warm_up(lab: Lab, commands: Sequence[Sequence[str]]) -> None:
    """Import the modules that the commands import, so that forked processes have them.

    Raises:
        RuntimeError: a command failed.
    """
    modules_file = lab.root / "modules.json"
    for command in commands:

        def record_modules() -> None:
            end = os._exit

            def ending(code: int) -> None:
                modules_file.write_text(json.dumps(sorted(sys.modules)))
                end(code)

            os._exit = ending  # type: ignore[assignment]

        result = lab.run(command, record_modules, seconds=300)
        if result.code != 0:
            raise RuntimeError(f"{' '.join(command)}: {result.code}\n{result.err}")
        for name in json.loads(modules_file.read_text()):
            if name not in sys.modules and not name.startswith("_"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    gc.collect()
    gc.freeze()


def create_template(root: Path) -> Lab:
    """Create the model, the rows and the reference run for all labs, and import a run's modules."""
    from tiny_models import save_tiny

    template = Lab(root / "first", random.Random(0))
    template.root.mkdir(parents=True)
    with contextlib.redirect_stderr(io.StringIO()):
        save_tiny(template.base, "qwen2", chat=True)
    save_rows(template.rows)
    with _use_home(template.root):
        warm_up(template, [template.training(template.folder())])
        template.reference = ReferenceRun(template)
    return template


@contextlib.contextmanager
def new_lab(root: Path, seed: int, template: Lab) -> Iterator[Lab]:
    """Yield a lab with the files and the reference of `template`, and its own home directory."""
    root.mkdir(parents=True)
    lab = Lab(root, random.Random(seed))
    lab.reference = template.reference
    shutil.copytree(template.base, lab.base)
    shutil.copy(template.rows, lab.rows)
    try:
        with _use_home(root):
            yield lab
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _use_home(root: Path) -> Iterator[None]:
    """Set the home and cache directories to folders below `root`."""
    before = dict(os.environ)
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "cache")):
        (root / folder).mkdir()
        os.environ[name] = str(root / folder)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
