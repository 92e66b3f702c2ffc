"""Deleted, emptied, truncated and corrupted files: detected and named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from torture_rows.kills import judge
from torture_rows.lab import BAD, GOOD, HANG, STEPS, Case, Lab, ReferenceRun, certified
from torture_rows.moments import killing


def _delete(path: Path, _: Random) -> None:
    path.unlink()


def _empty(path: Path, _: Random) -> None:
    path.write_bytes(b"")


def _halve(path: Path, _: Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _cut(path: Path, _: Random) -> None:
    os.truncate(path, min(path.stat().st_size * 99 // 100, path.stat().st_size - 1))


def _flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, Random], None]] = {
    "deleted": _delete, "emptied": _empty, "half": _halve, "99 %": _cut, "one bit": _flip,
}  # fmt: skip


def _create_interrupted_run(lab: Lab) -> Path:
    """Return a run with two checkpoints that was killed after its sixth step."""
    run = lab.root / "broken"
    lab.run(lab.training(run), killing(lab.reference.course.certified[STEPS - 3] + 40))
    if not certified(run):
        raise RuntimeError("the run to damage has no checkpoint")
    return run


def damage_checkpoints(lab: Lab, count: int) -> Iterator[Case]:
    """Every file × every damage × the newest checkpoint or all; the error must name it."""
    reference, interrupted = lab.reference, _create_interrupted_run(lab)
    names = sorted(p.name for p in certified(interrupted)[-1].iterdir())
    cases = [(n, d, scope) for n in names for d in DAMAGES for scope in ("newest", "all")]
    cases += [(n, d, "all, twice") for n in names for d in ("deleted", "one bit")]
    lab.random.shuffle(cases)
    for name, damage, scope in cases[:count]:
        run = lab.folder()
        shutil.copytree(interrupted, run)
        rerun = lab.run  # damaged, resumed, and damaged again
        for _ in range(2 if scope == "all, twice" else 1):
            checkpoints = certified(run) if scope != "newest" else certified(run)[-1:]
            for checkpoint in checkpoints:
                if (checkpoint / name).is_file() and (checkpoint / name).stat().st_size:
                    DAMAGES[damage](checkpoint / name, lab.random)
            if scope == "all, twice":
                rerun(lab.training(run, "--resume"), killing(reference.course.certified[1] + 40))
        description = f"{name} {damage}, {scope}"
        result = lab.run(lab.training(run, "--resume"))
        case = judge(description, run, result, reference.digest, scope)
        if (
            case.verdict == GOOD
            and scope != "all, twice"
            and checkpoints[-1].name not in result.err
        ):
            case = Case(BAD, description, f"not named: {result.err}")
        yield case
        shutil.rmtree(run)


def damage_state(lab: Lab, count: int) -> Iterator[Case]:
    """Damaged files beside the checkpoints: rejected in one line, or not needed."""
    reference, interrupted = lab.reference, _create_interrupted_run(lab)
    names = [str(p.relative_to(interrupted)) for p in sorted(interrupted.rglob("*"))
             if p.is_file() and "checkpoint-" not in str(p)]  # fmt: skip
    cases = [(name, damage) for name in names for damage in DAMAGES]
    lab.random.shuffle(cases)
    for name, damage in cases[:count]:
        run = lab.folder()
        shutil.copytree(interrupted, run)
        if (run / name).stat().st_size:
            DAMAGES[damage](run / name, lab.random)
        result = lab.run(lab.training(run, "--resume"))
        description = f"{name} {damage}"
        if result.code == 2 and not result.is_raw and not result.is_unforeseen:
            yield Case(GOOD, description, kind="refused")
        elif name == "metrics.jsonl" and result.code == 0:  # past records are lost
            yield Case(GOOD, description, kind="done without")
        else:
            yield judge(description, run, result, reference.digest, "done without")
        shutil.rmtree(run)


def damage_cache(lab: Lab, count: int) -> Iterator[Case]:
    """Damaged prepared rows are prepared again."""
    from ftlevel.data.prepare import dataset

    dataset.MIN_CACHED_ROWS = dataset.SMALL_BYTES = 1  # cache rows of small sets too
    reference = ReferenceRun(lab)
    folders = [p for p in (lab.root / "cache" / "ftlevel" / "rows").iterdir() if p.is_dir()]
    backup = lab.root / "kept-rows"
    shutil.copytree(folders[0], backup)
    names = sorted(str(p.relative_to(backup)) for p in backup.rglob("*") if p.is_file())
    for _ in range(count):
        name, damage = lab.random.choice(names), lab.random.choice(list(DAMAGES))
        shutil.rmtree(folders[0], ignore_errors=True)
        shutil.copytree(backup, folders[0])
        if (folders[0] / name).stat().st_size:
            DAMAGES[damage](folders[0] / name, lab.random)
        run = lab.folder()
        result = lab.run(lab.training(run))
        if result.hung:
            yield Case(HANG, f"{name} {damage}")
        else:
            yield judge(f"{name} {damage}", run, result, reference.digest)
        shutil.rmtree(run, ignore_errors=True)
