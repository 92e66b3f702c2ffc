"""A signal at any moment of any command: one message, the exit code, no partial output."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import judge
from torture_rows.lab import BAD, GOOD, HANG, STEPS, Case, Child, Lab, ProcessResult, certified

from torture_rows.lab import warm_up  # isort: skip
from torture_rows.moments import counting, read_course, signalling

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
Command = Callable[[Path], list[str]]


def commands(lab: Lab, run: Path) -> dict[str, Command]:
    """Return functions from output path to command line."""
    rows = ["--dataset", str(lab.rows)]
    few_rows = lab.root / "few.jsonl"
    few_rows.write_text("".join(lab.rows.read_text().splitlines(keepends=True)[:12]))
    return {
        "train": lambda out: lab.training(out),
        "evaluate": lambda _: ["evaluate", str(run), *rows, "--quiet"],
        "predict": lambda out: ["predict", str(run), "--dataset", str(few_rows), "--output",
                                f"{out}.jsonl"],
        "generate": lambda out: ["generate", str(run), "--prompts", str(few_rows), "--out",
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
    run = lab.root / "run"
    lab.run(lab.training(run))
    all_commands = commands(lab, run)
    warm_up(lab, [command(lab.folder()) for command in all_commands.values()])
    events = {}
    for name, command in all_commands.items():
        course = lab.root / "course.json"
        lab.run(command(lab.folder()), counting(course))
        events[name] = read_course(course).total
    names = [*all_commands, "train", "train", "merge"]
    for index in range(count):
        name = names[index % len(names)]
        signal_name = lab.random.choice(list(CODES))
        draw = lab.random.random()
        out = lab.folder()
        arguments = all_commands[name](out)
        if draw < 1 / 8:
            seconds = lab.random.uniform(0, 8)
            description = f"{name}: {signal_name} after {seconds:.2f} s of a new interpreter"
            child = lab.fresh(arguments)
            time.sleep(seconds)
            child.kill(getattr(signal, signal_name))
        elif draw < 2 / 8:
            description = f"{name}: {signal_name} twice"
            child = lab.start(arguments)
            time.sleep(lab.random.uniform(0, lab.reference.seconds))
            child.kill(getattr(signal, signal_name))
            time.sleep(0.05)
            child.kill(getattr(signal, signal_name))
        else:
            event = lab.random.randint(1, events[name])
            description = f"{name}: {signal_name} at file event {event:,} of {events[name]:,}"
            child = lab.start(arguments, signalling(event, getattr(signal, signal_name)))
        yield _judge(lab, description, child, signal_name, out)
        for path in lab.root.glob(f"{out.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _judge(lab: Lab, description: str, child: Child, signal_name: str, out: Path) -> Case:
    result = child.wait(lab.patience)
    kind = description.partition(":")[0]
    if result.hung:
        return Case(HANG, description, result.last)
    exit_codes = (0, CODES[signal_name])
    # Before Python installs a handler, the kernel ends the process.
    is_by_clock = "file event" not in description
    before_handler = is_by_clock and result.code == -getattr(signal, signal_name) and not result.err
    if result.code not in exit_codes and not before_handler:
        return Case(BAD, description, f"exit {result.code}: {result.err[-500:]}")
    if result.is_raw or (result.code and not before_handler and "interrupted" not in result.last):
        return Case(BAD, description, f"exit {result.code}: {result.err[-500:]}")
    if kind != "train":
        partial = [p.name for p in lab.root.glob(f".{out.name}*partial")]
        outputs = list(lab.root.glob(f"{out.name}*"))
        if partial or (result.code and outputs and not _keeps_output(kind, result)):
            return Case(BAD, description, f"left {partial}, {outputs}")
        return Case(GOOD, description, kind=kind)
    if result.code == CODES[signal_name] and "after step" in result.err and not certified(out):
        return Case(BAD, description, "said that a checkpoint is kept, and none is")
    if len(certified(out)) > STEPS:
        return Case(BAD, description, "too many checkpoints")
    resumed = lab.run(lab.training(out, "--resume"))
    return judge(description, out, resumed, lab.reference.digest, kind)


def _keeps_output(kind: str, result: ProcessResult) -> bool:
    """Return whether the command keeps its partial output."""
    return kind == "predict" or "is whole" in result.last
