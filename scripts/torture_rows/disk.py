"""A disk that is full at any byte: one message, intact checkpoints, and a resumable run."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import Whole, judge
from torture_rows.lab import BAD, GOOD, HANG, Case, Ended, Lab, certified, digest

_WORDS = ("cannot be written", "disk is full", "File too large", "No space left", "needs about",
          "cannot be created")  # fmt: skip


def fill_disk(lab: Lab, count: int) -> Iterator[Case]:
    """Four in five by RLIMIT_FSIZE, the others on a small tmpfs where one can be mounted."""
    whole = Whole(lab)
    sizes = _file_sizes(lab)
    mounts = lab.root / "small"
    can_mount = _mount(mounts, 1 << 20)
    if can_mount:
        subprocess.run(["umount", str(mounts)], check=True)
    for number in range(count):
        if can_mount and number % 5 == 0:
            size = lab.random.randint(40_000, 900_000)
            _mount(mounts, size)
            run = mounts / "run"
            words = f"a tmpfs of {size:,} bytes"
            ended = lab.run(lab.training(run))
            kept = lab.folder()
            if run.exists():
                shutil.copytree(run, kept)
            subprocess.run(["umount", "-l", str(mounts)], check=True)
            run = kept
        else:
            limit = lab.random.choice(sizes) - lab.random.choice((1, 1, 100, 5000))
            limit = max(1, limit if number % 2 else lab.random.randint(1, max(sizes)))
            words = f"no file above {limit:,} bytes"
            run = lab.folder()
            ended = lab.run(lab.training(run), limiting(limit))
        yield _judge(lab, words, run, ended, whole)
        shutil.rmtree(run, ignore_errors=True)


def limiting(size: int) -> Callable[[], None]:
    """Return what lets a process write no file above `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _judge(lab: Lab, words: str, run: Path, ended: Ended, whole: Whole) -> Case:
    if ended.hung:
        return Case(HANG, words, ended.last)
    if ended.code == 0:
        same = digest(run) == whole.digest
        return Case(GOOD if same else BAD, words, ended.err, "it was enough")
    wrong = ended.is_raw or ended.is_unforeseen or ended.code not in (1, 2)
    if wrong or not any(word in ended.last for word in _WORDS):
        return Case(BAD, words, f"exit {ended.code}: {ended.err[-600:]}")
    again = lab.run(lab.training(run, "--resume"))
    return judge(words, run, again, whole.digest, "went on" if certified(run) else "begun anew")


def _file_sizes(lab: Lab) -> list[int]:
    run = lab.folder()
    lab.run(lab.training(run))
    sizes = sorted({p.stat().st_size for p in run.rglob("*") if p.is_file()})
    shutil.rmtree(run)
    return [size for size in sizes if size > 1]


def _mount(where: Path, size: int) -> bool:
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
