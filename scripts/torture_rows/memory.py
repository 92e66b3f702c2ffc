"""Memory that is too small, once or from some size on, really or by an injected error."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from torture_rows.kills import Whole, judge
from torture_rows.lab import BAD, GOOD, HANG, SILENT, STEPS, Case, Lab, digest, replace_methods

from torture_rows.lab import leftovers  # isort: skip

ERRORS: dict[str, Callable[[], Exception]] = {
    "MemoryError": MemoryError,
    "DefaultCPUAllocator": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "oneDNN": lambda: RuntimeError("could not create a primitive"),
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "bitsandbytes": lambda: RuntimeError("CUDA error: out of memory at csrc/ops.cu:83"),
}  # fmt: skip
WHERE = ("step 1", "step 2", "the middle", "the evaluation", "from some size on")


def failing(where: str, error: Callable[[], Exception]) -> Callable[[], None]:
    """Return what makes a forward pass fail for want of memory, after part of the gradient."""

    def begin() -> None:
        from ftlevel.training.trainer import FtlevelTrainer

        compute, evaluate, seen = FtlevelTrainer.compute_loss, FtlevelTrainer.evaluate, [0]
        step = {"step 1": 0, "step 2": 1, "the middle": STEPS // 2}.get(where)

        def compute_loss(self, model, inputs, *more, **settings):  # type: ignore[no-untyped-def]
            loss = compute(self, model, inputs, *more, **settings)
            large = int(inputs["attention_mask"].sum()) > 120
            at_step = self.state.global_step == step and not seen[0]
            if model.training and (at_step or (where == "from some size on" and large)):
                seen[0] = 1
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.ones_like(parameter)
                raise error()
            return loss

        def evaluated(self, *more, **settings):  # type: ignore[no-untyped-def]
            if where == "the evaluation" and not seen[0]:
                seen[0] = 1
                raise error()
            return evaluate(self, *more, **settings)

        replace_methods(FtlevelTrainer, compute_loss=compute_loss, evaluate=evaluated)

    return begin


def run_out_of_memory(lab: Lab, count: int) -> Iterator[Case]:
    """The losses are those of enough memory to rounding, or the run ends in a line.

    Native code ends the process where it can get no memory, as safetensors' Rust does; that is
    judged as a kill is, by what `--resume` gives.
    """
    whole = Whole(lab)
    evaluated = ("--set", "data.validation_split=0.2", "--dtype", "float32", "--lora-dropout", "0")
    run = lab.folder()
    lab.run(lab.training(run, *evaluated))
    losses = _losses(run)
    plain = lab.folder()
    lab.run(lab.training(plain))
    for number in range(count):
        if number % 5 == 4:
            yield _really(lab, whole, _losses(plain))
            continue
        where, name = lab.random.choice(WHERE), lab.random.choice(list(ERRORS))
        how = lab.random.choice(("--fast", "--no-fast", "--gradient-checkpointing"))
        run = lab.folder()
        more = (*evaluated, how)
        ended = lab.run(lab.training(run, *more), failing(where, ERRORS[name]))
        words = f"{name} at {where}, {how}"
        if ended.hung:
            yield Case(HANG, words)
        elif ended.code == 0 and not ended.is_raw and "out of memory" in ended.err:
            near = _is_near(run, losses)
            yield Case(GOOD if near else SILENT, words, "other losses", "went on")
        else:
            told = ended.code == 1 and ended.last.startswith("ftlevel: out of memory")
            yield Case(GOOD if told and not ended.is_raw else BAD, words, ended.err[-500:], "ended")
        shutil.rmtree(run, ignore_errors=True)


def _really(lab: Lab, whole: Whole, losses: list[float]) -> Case:
    """With a limit on the memory of the process that is a little above what it has.

    Where memory is nearly gone, a library may compute by other code: the loss of a first step that
    nothing was made smaller in was seen to differ by 2e-7 of it. So what goes on from a checkpoint
    of such a run has to be near, and not equal.

    Args:
        lab: where.
        whole: the run with enough memory.
        losses: of its steps.
    """
    more = lab.random.randint(1, 200) << 20
    run = lab.folder()

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        size = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    ended = lab.run(lab.training(run), limit)
    words = f"RLIMIT_DATA {more >> 20} MiB above what it begins with"
    if ended.hung:
        return Case(HANG, words)
    if ended.code == 0:
        same = digest(run) == whole.digest or "out of memory" in ended.err
        return Case(GOOD if same else SILENT, words, kind="it was enough")
    if ended.code in (-signal.SIGABRT, -signal.SIGSEGV):
        again = lab.run(lab.training(run, "--resume"))
        case = judge(words, run, again, whole.digest, "ended by native code, and went on")
        is_near = case.verdict == SILENT and not leftovers(run) and _is_near(run, losses)
        return Case(GOOD, words, kind=f"{case.kind}, to rounding") if is_near else case
    told = ended.code == 1 and "out of memory" in ended.last and not ended.is_raw
    return Case(GOOD if told else BAD, words, f"exit {ended.code}: {ended.err[-600:]}", "ended")


def _is_near(run: Path, losses: list[float]) -> bool:
    return all(abs(a - b) < 2e-4 * b for a, b in zip(_losses(run), losses, strict=True))


def _losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]
