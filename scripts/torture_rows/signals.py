"""A signal at any moment of any command: one message, the exit code, no partial output."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import Whole, judge
from torture_rows.lab import BAD, GOOD, HANG, STEPS, Case, Child, Ended, Lab, certified

from torture_rows.lab import warm_up  # isort: skip
from torture_rows.moments import counting, read_course, signalling

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
Command = Callable[[Path], list[str]]


def commands(lab: Lab, run: Path) -> dict[str, Command]:
    """Return what makes each command line, given where its output goes."""
    rows = ["--dataset", str(lab.rows)]
    few = lab.root / "few.jsonl"
    few.write_text("".join(lab.rows.read_text().splitlines(keepends=True)[:12]))
    return {
        "train": lambda out: lab.training(out),
        "evaluate": lambda _: ["evaluate", str(run), *rows, "--quiet"],
        "predict": lambda out: ["predict", str(run), "--dataset", str(few), "--output",
                                f"{out}.jsonl"],
        "generate": lambda out: ["generate", str(run), "--prompts", str(few), "--out",
                                 f"{out}.jsonl", "--max-new-tokens", "4"],
        "merge": lambda out: ["merge", str(run), "--out", str(out), "--quiet"],
        "quantize": lambda out: ["quantize", str(lab.base), "--quant", "4bit", "--out", str(out),
                                 "--quiet"],
        "export": lambda out: ["export", str(run), "--out", f"{out}.gguf", "--quiet"],
        "preview": lambda _: ["preview", "--model", str(lab.base), *rows, "--task",
                              "text-generation"],
        "list-targets": lambda _: ["list-targets", str(lab.base)],
    }  # fmt: skip


def signal_commands(lab: Lab, count: int) -> Iterator[Case]:
    """Each command in turn; one in eight in a new interpreter, and one in eight twice."""
    whole, run = Whole(lab), lab.root / "run"
    lab.run(lab.training(run))
    every = commands(lab, run)
    warm_up(lab, [command(lab.folder()) for command in every.values()])
    events = {}
    for name, command in every.items():
        course = lab.root / "course.json"
        lab.run(command(lab.folder()), counting(course))
        events[name] = read_course(course).total
    names = [*every, "train", "train", "merge"]
    for number in range(count):
        name = names[number % len(names)]
        which = lab.random.choice(list(CODES))
        how = lab.random.random()
        out = lab.folder()
        arguments = every[name](out)
        if how < 1 / 8:
            seconds = lab.random.uniform(0, 8)
            words = f"{name}: {which} after {seconds:.2f} s of a new interpreter"
            child = lab.fresh(arguments)
            time.sleep(seconds)
            child.kill(getattr(signal, which))
        elif how < 2 / 8:
            words = f"{name}: {which} twice"
            child = lab.start(arguments)
            time.sleep(lab.random.uniform(0, whole.seconds))
            child.kill(getattr(signal, which))
            time.sleep(0.05)
            child.kill(getattr(signal, which))
        else:
            event = lab.random.randint(1, events[name])
            words = f"{name}: {which} at file event {event:,} of {events[name]:,}"
            child = lab.start(arguments, signalling(event, getattr(signal, which)))
        yield _judge(lab, words, child, which, out, whole)
        for path in lab.root.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _judge(lab: Lab, words: str, child: Child, which: str, out: Path, whole: Whole) -> Case:
    ended = child.wait(lab.patience)
    kind = words.partition(":")[0]
    if ended.hung:
        return Case(HANG, words, ended.last)
    wanted = (0, CODES[which])
    # Before Python has installed a handler the kernel ends it, which no program can help.
    is_by_clock = "file event" not in words
    early = is_by_clock and ended.code == -getattr(signal, which) and not ended.err
    if ended.code not in wanted and not early:
        return Case(BAD, words, f"exit {ended.code}: {ended.err[-500:]}")
    if ended.is_raw or (ended.code and not early and "interrupted" not in ended.last):
        return Case(BAD, words, f"exit {ended.code}: {ended.err[-500:]}")
    if kind != "train":
        partial = [p.name for p in lab.root.glob(f".{out.name}*partial")]
        there = list(lab.root.glob(f"{out.name}*"))
        if partial or (ended.code and there and not _may_be_there(kind, ended)):
            return Case(BAD, words, f"left {partial}, {there}")
        return Case(GOOD, words, kind=kind)
    if ended.code == CODES[which] and "after step" in ended.err and not certified(out):
        return Case(BAD, words, "said that a checkpoint is kept, and none is")
    if len(certified(out)) > STEPS:
        return Case(BAD, words, "too many checkpoints")
    return judge(words, out, lab.run(lab.training(out, "--resume")), whole.digest, kind)


def _may_be_there(kind: str, ended: Ended) -> bool:
    """Whether the command says that it has kept what it wrote so far."""
    return kind == "predict" or "is whole" in ended.last
