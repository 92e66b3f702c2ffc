"""Files that are deleted, emptied, truncated or have a flipped bit: detected and named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from torture_rows.kills import Whole, judge
from torture_rows.lab import BAD, GOOD, HANG, STEPS, Case, Lab, certified
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


def _broken_off(lab: Lab, whole: Whole) -> Path:
    """Return a run with two checkpoints that was killed after its sixth step."""
    run = lab.root / "broken"
    lab.run(lab.training(run), killing(whole.course.certified[STEPS - 3] + 40))
    if not certified(run):
        raise RuntimeError("the run to damage has no checkpoint")
    return run


def damage_checkpoints(lab: Lab, count: int) -> Iterator[Case]:
    """Every file × every damage × the newest or all; a missing or damaged one is named."""
    whole = Whole(lab)
    broken = _broken_off(lab, whole)
    names = sorted(p.name for p in certified(broken)[-1].iterdir())
    every = [(n, d, which) for n in names for d in DAMAGES for which in ("newest", "all")]
    every += [(n, d, "all, twice") for n in names for d in ("deleted", "one bit")]
    lab.random.shuffle(every)
    for name, damage, which in every[:count]:
        run = lab.folder()
        shutil.copytree(broken, run)
        again = lab.run  # a run that was damaged, went on, and is damaged once more
        for _ in range(2 if which == "all, twice" else 1):
            hit = certified(run) if which != "newest" else certified(run)[-1:]
            for checkpoint in hit:
                if (checkpoint / name).is_file() and (checkpoint / name).stat().st_size:
                    DAMAGES[damage](checkpoint / name, lab.random)
            if which == "all, twice":
                again(lab.training(run, "--resume"), killing(whole.course.certified[1] + 40))
        words = f"{name} {damage}, {which}"
        ended = lab.run(lab.training(run, "--resume"))
        case = judge(words, run, ended, whole.digest, which)
        if case.verdict == GOOD and which != "all, twice" and hit[-1].name not in ended.err:
            case = Case(BAD, words, f"not named: {ended.err}")
        yield case
        shutil.rmtree(run)


def damage_state(lab: Lab, count: int) -> Iterator[Case]:
    """What stands beside the checkpoints: refused in a line, or done without."""
    whole = Whole(lab)
    broken = _broken_off(lab, whole)
    names = [str(p.relative_to(broken)) for p in sorted(broken.rglob("*"))
             if p.is_file() and "checkpoint-" not in str(p)]  # fmt: skip
    every = [(name, damage) for name in names for damage in DAMAGES]
    lab.random.shuffle(every)
    for name, damage in every[:count]:
        run = lab.folder()
        shutil.copytree(broken, run)
        if (run / name).stat().st_size:
            DAMAGES[damage](run / name, lab.random)
        ended = lab.run(lab.training(run, "--resume"))
        words = f"{name} {damage}"
        if ended.code == 2 and not ended.is_raw and not ended.is_unforeseen:
            yield Case(GOOD, words, kind="refused")
        elif name == "metrics.jsonl" and ended.code == 0:  # what it said of past steps is lost
            yield Case(GOOD, words, kind="done without")
        else:
            yield judge(words, run, ended, whole.digest, "done without")
        shutil.rmtree(run)


def damage_cache(lab: Lab, count: int) -> Iterator[Case]:
    """Prepared rows that are damaged are prepared anew."""
    from ftlevel.data.prepare import dataset

    dataset.MIN_CACHED_ROWS = dataset.SMALL_BYTES = 1  # keep the rows of small sets too
    whole = Whole(lab)
    folders = [p for p in (lab.root / "cache" / "ftlevel" / "rows").iterdir() if p.is_dir()]
    kept = lab.root / "kept-rows"
    shutil.copytree(folders[0], kept)
    names = sorted(str(p.relative_to(kept)) for p in kept.rglob("*") if p.is_file())
    for _ in range(count):
        name, damage = lab.random.choice(names), lab.random.choice(list(DAMAGES))
        shutil.rmtree(folders[0], ignore_errors=True)
        shutil.copytree(kept, folders[0])
        if (folders[0] / name).stat().st_size:
            DAMAGES[damage](folders[0] / name, lab.random)
        run = lab.folder()
        ended = lab.run(lab.training(run))
        if ended.hung:
            yield Case(HANG, f"{name} {damage}")
        else:
            yield judge(f"{name} {damage}", run, ended, whole.digest)
        shutil.rmtree(run, ignore_errors=True)
