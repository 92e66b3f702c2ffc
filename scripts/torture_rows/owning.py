"""Files of others, two runs in one directory, and tokens in the environment."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import Whole, judge
from torture_rows.lab import BAD, GOOD, OUTSIDE, Case, Lab, digest, replace_methods
from torture_rows.moments import killing

_SECRET = "hf_" + "tOpSeCrEt" * 4
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN",
          "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY")  # fmt: skip


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def _project(folder: Path, lab: Lab) -> Path:
    """A stranger's project with files that are called as a run's."""
    folder.mkdir()
    for name in ("config.yaml", "summary.json", "checkpoints/checkpoint-1/manifest.json",
                 "README.md",
                 "adapter/mine.txt", "src/main.py"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine {lab.random.random()}")
    return folder


def _repository(folder: Path, lab: Lab) -> Path:
    _project(folder, lab)
    (folder / ".ftlevel.json").write_text('{"run": "x"}')
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    return folder


def _link(folder: Path, lab: Lab) -> Path:
    folder.symlink_to(_project(folder.with_name(f"{folder.name}-there"), lab))
    return folder


def _home(_: Path, __: Lab) -> Path:
    home = Path.home()
    (home / "diary.txt").write_text("mine")
    (home / ".ftlevel.json").write_text('{"run": "x"}')
    return home


REFUSED: dict[str, Callable[[Path, Lab], Path]] = {
    "a stranger's project": _project, "a git work tree": _repository, "a link": _link,
    "the home directory": _home,
}  # fmt: skip


def overwrite(lab: Lab, count: int) -> Iterator[Case]:
    """Refused directories keep each byte; a run's own files alone go; a kill loses neither run."""
    whole = Whole(lab, "--seed", "2")
    ways = [*REFUSED, "files of others in a run", "tracker directories", "a kill", "a kill",
            "two at once", "two at once"]  # fmt: skip
    for number in range(count):
        way, run = ways[number % len(ways)], lab.folder()
        if way in REFUSED:
            yield _refuse(lab, way, REFUSED[way](run, lab))
        elif way == "two at once":
            yield _two(lab, run)
        else:
            lab.run(lab.training(run))
            yield _replace(lab, way, run, whole)
        for path in (run, run.with_name(f"{run.name}-there")):
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)


def _refuse(lab: Lab, way: str, folder: Path) -> Case:
    before = _tree(folder)
    ended = lab.run(lab.training(folder, "--overwrite"))
    if _tree(folder) != before:
        return Case(OUTSIDE, way, "files changed")
    good = ended.code == 2 and not ended.is_raw
    return Case(GOOD if good else BAD, way, ended.err[-300:], "refused")


def _replace(lab: Lab, way: str, run: Path, whole: Whole) -> Case:
    again = lab.training(run, "--seed", "2", "--overwrite")
    if way == "a kill":
        old = digest(run)
        event = lab.random.randint(1, whole.course.total)
        lab.run(again, killing(event))
        kept = any(digest(p) == old for p in (run, run / ".replaced") if (p / "adapter").exists())
        if not kept and not list(run.glob("checkpoints/checkpoint-*/manifest.json")):
            return Case(BAD, f"{way} at {event:,}", "neither run is there")
        return judge(f"{way} at {event:,}", run, lab.run(again), whole.digest, "killed")
    names = ["tensorboard/events.1", "wandb/run-1/x", "mlflow/1/meta.yaml", "trackio/t.db"]
    if way == "files of others in a run":
        names = ["notes.txt", "adapter/notes.txt", "checkpoints/mine/x", "data/rows.jsonl"]
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    ended = lab.run(again)
    texts = [p.read_text() for p in run.rglob("*") if p.is_file() and p.suffix != ".safetensors"
             and p.stat().st_size < 100]  # fmt: skip
    if missing := [name for name in names if name not in texts]:
        return Case(OUTSIDE, way, f"deleted: {missing}")
    return judge(way, run, ended, whole.digest, "replaced")


def _two(lab: Lab, run: Path) -> Case:
    """Two runs into one directory, begun at once: one is refused, the other is whole."""
    children = [lab.start(lab.training(run)) for _ in range(2)]
    ended = [child.wait(lab.patience) for child in children]
    codes = sorted(one.code for one in ended)
    refused = next((one for one in ended if one.code == 2), None)
    good = codes == [0, 2] and refused is not None and not refused.is_raw
    return Case(GOOD if good else BAD, "two at once", f"{codes}: {[e.err[-200:] for e in ended]}",
                "one refused")  # fmt: skip


def look_for_secrets(lab: Lab, count: int) -> Iterator[Case]:
    """A token in the environment is in no file and no line; files have the user's umask."""
    for number in range(count):
        name, run = TOKENS[number % len(TOKENS)], lab.folder()
        fails = number % 2 == 1

        def before(name: str = name, fails: bool = fails) -> None:
            os.environ[name] = _SECRET
            os.umask(0o077)
            if fails:
                from ftlevel.training.trainer import FtlevelTrainer

                def broken(*_: object, **__: object) -> object:
                    raise RuntimeError("an error that nobody foresaw")

                replace_methods(FtlevelTrainer, compute_loss=broken)

        ended = lab.run(lab.training(run, *(["--traceback"] if fails else [])), before)
        texts = [p.read_bytes() for p in run.rglob("*") if p.is_file()]
        texts += [ended.out.encode(), ended.err.encode()]
        told = any(_SECRET.encode() in text for text in texts)
        modes = {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in run.rglob("*")}
        ends = (1, 99) if fails else (0,)  # 99 is our own traceback, as the interpreter shows it
        good = not told and modes <= {0} and ended.code in ends
        why = f"told: {told}, modes: {modes}, exit {ended.code}: {ended.err[-300:]}"
        yield Case(GOOD if good else BAD, name, why, "a failing run" if fails else "a whole run")
        shutil.rmtree(run, ignore_errors=True)
