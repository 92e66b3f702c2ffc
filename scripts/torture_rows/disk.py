"""A disk that fills up at any byte: one message, intact checkpoints, and a resumable run."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import judge
from torture_rows.lab import BAD, GOOD, HANG, Case, Lab, ProcessResult, certified, digest

_DISK_ERRORS = ("cannot be written", "disk is full", "File too large", "No space left",
                "needs about", "cannot be created")  # fmt: skip


def fill_disk(lab: Lab, count: int) -> Iterator[Case]:
    """Four of five cases use RLIMIT_FSIZE, the others a small tmpfs if it can be mounted."""
    sizes = _file_sizes(lab)
    mount_point = lab.root / "small"
    can_mount = _mount(mount_point, 1 << 20)
    if can_mount:
        subprocess.run(["umount", str(mount_point)], check=True)
    for index in range(count):
        if can_mount and index % 5 == 0:
            size = lab.random.randint(40_000, 900_000)
            _mount(mount_point, size)
            run = mount_point / "run"
            description = f"a tmpfs of {size:,} bytes"
            result = lab.run(lab.training(run))
            copied = lab.folder()
            if run.exists():
                shutil.copytree(run, copied)
            subprocess.run(["umount", "-l", str(mount_point)], check=True)
            run = copied
        else:
            limit = lab.random.choice(sizes) - lab.random.choice((1, 1, 100, 5000))
            limit = max(1, limit if index % 2 else lab.random.randint(1, max(sizes)))
            description = f"no file above {limit:,} bytes"
            run = lab.folder()
            result = lab.run(lab.training(run), limit_file_size(limit))
        yield _judge(lab, description, run, result)
        shutil.rmtree(run, ignore_errors=True)


def limit_file_size(size: int) -> Callable[[], None]:
    """Return a function that limits the file size of a process to `size` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _judge(lab: Lab, description: str, run: Path, result: ProcessResult) -> Case:
    if result.hung:
        return Case(HANG, description, result.last)
    if result.code == 0:
        same = digest(run) == lab.reference.digest
        return Case(GOOD if same else BAD, description, result.err, "it was enough")
    is_unexpected = result.is_raw or result.is_unforeseen or result.code not in (1, 2)
    if is_unexpected or not any(word in result.last for word in _DISK_ERRORS):
        return Case(BAD, description, f"exit {result.code}: {result.err[-600:]}")
    resumed = lab.run(lab.training(run, "--resume"))
    kind = "went on" if certified(run) else "begun anew"
    return judge(description, run, resumed, lab.reference.digest, kind)


def _file_sizes(lab: Lab) -> list[int]:
    run = lab.folder()
    lab.run(lab.training(run))
    sizes = sorted({p.stat().st_size for p in run.rglob("*") if p.is_file()})
    shutil.rmtree(run)
    return [size for size in sizes if size > 1]


def _mount(path: Path, size: int) -> bool:
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
