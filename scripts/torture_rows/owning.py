"""Foreign files, two runs in one directory, and tokens in the environment."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torture_rows.kills import judge
from torture_rows.lab import BAD, GOOD, OUTSIDE, Case, Lab, ReferenceRun, digest

from torture_rows.lab import replace_methods  # isort: skip
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
    """Create another project with files named like a run's."""
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
    """Rejected directories keep all bytes; only a run's own files are deleted."""
    get_reference = functools.cache(lambda: ReferenceRun(lab, "--seed", "2"))
    scenarios = [*REFUSED, "files of others in a run", "tracker directories", "a kill", "a kill",
            "two at once", "two at once"]  # fmt: skip
    for index in range(count):
        scenario, run = scenarios[index % len(scenarios)], lab.folder()
        if scenario in REFUSED:
            yield _refuse(lab, scenario, REFUSED[scenario](run, lab))
        elif scenario == "two at once":
            yield _start_two_runs(lab, run)
        else:
            lab.run(lab.training(run))
            yield _replace(lab, scenario, run, get_reference())
        for path in (run, run.with_name(f"{run.name}-there")):
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)


def _refuse(lab: Lab, scenario: str, folder: Path) -> Case:
    before = _tree(folder)
    result = lab.run(lab.training(folder, "--overwrite"))
    if _tree(folder) != before:
        return Case(OUTSIDE, scenario, "files changed")
    good = result.code == 2 and not result.is_raw
    return Case(GOOD if good else BAD, scenario, result.err[-300:], "refused")


def _replace(lab: Lab, scenario: str, run: Path, reference: ReferenceRun) -> Case:
    command = lab.training(run, "--seed", "2", "--overwrite")
    if scenario == "a kill":
        old = digest(run)
        event = lab.random.randint(1, reference.course.total)
        lab.run(command, killing(event))
        old_run_exists = any(
            digest(p) == old for p in (run, run / ".replaced") if (p / "adapter").exists()
        )
        if not old_run_exists and not list(run.glob("checkpoints/checkpoint-*/manifest.json")):
            return Case(BAD, f"{scenario} at {event:,}", "neither run is there")
        return judge(f"{scenario} at {event:,}", run, lab.run(command), reference.digest, "killed")
    names = ["tensorboard/events.1", "wandb/run-1/x", "mlflow/1/meta.yaml", "trackio/t.db"]
    if scenario == "files of others in a run":
        names = ["notes.txt", "adapter/notes.txt", "checkpoints/mine/x", "data/rows.jsonl"]
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    result = lab.run(command)
    texts = [p.read_text() for p in run.rglob("*") if p.is_file() and p.suffix != ".safetensors"
             and p.stat().st_size < 100]  # fmt: skip
    if missing := [name for name in names if name not in texts]:
        return Case(OUTSIDE, scenario, f"deleted: {missing}")
    return judge(scenario, run, result, reference.digest, "replaced")


def _start_two_runs(lab: Lab, run: Path) -> Case:
    """Two runs started in one directory: one is rejected, the other completes."""
    children = [lab.start(lab.training(run)) for _ in range(2)]
    results = [child.wait(lab.patience) for child in children]
    codes = sorted(result.code for result in results)
    refused = next((result for result in results if result.code == 2), None)
    good = codes == [0, 2] and refused is not None and not refused.is_raw
    return Case(GOOD if good else BAD, "two at once", f"{codes}: {[e.err[-200:] for e in results]}",
                "one refused")  # fmt: skip


def look_for_secrets(lab: Lab, count: int) -> Iterator[Case]:
    """A token in the environment is in no file or output; files follow the user's umask."""
    for index in range(count):
        name, run = TOKENS[index % len(TOKENS)], lab.folder()
        fails = index % 2 == 1

        def before(name: str = name, fails: bool = fails) -> None:
            os.environ[name] = _SECRET
            os.umask(0o077)
            if fails:
                from ftlevel.training.trainer import FtlevelTrainer

                def raise_error(*_: object, **__: object) -> object:
                    raise RuntimeError("an error that nobody foresaw")

                replace_methods(FtlevelTrainer, compute_loss=raise_error)

        result = lab.run(lab.training(run, *(["--traceback"] if fails else [])), before)
        texts = [p.read_bytes() for p in run.rglob("*") if p.is_file()]
        texts += [result.out.encode(), result.err.encode()]
        is_leaked = any(_SECRET.encode() in text for text in texts)
        modes = {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in run.rglob("*")}
        exit_codes = (1, 99) if fails else (0,)  # 99: a traceback
        good = not is_leaked and modes <= {0} and result.code in exit_codes
        why = f"leaked: {is_leaked}, modes: {modes}, exit {result.code}: {result.err[-300:]}"
        yield Case(GOOD if good else BAD, name, why, "a failing run" if fails else "a whole run")
        shutil.rmtree(run, ignore_errors=True)
