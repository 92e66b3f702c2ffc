"""`--overwrite` deletes only the files of a run, even if it is killed at any point."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from ftlevel.artifacts import checkpoints
from ftlevel.artifacts import run_directory as ownership
from ftlevel.artifacts.files import read_plain
from ftlevel.artifacts.run_directory import RunDirectory, check_output, open_run
from ftlevel.data.encoding.chat import set_chat_template
from ftlevel.errors import ConfigError, InputError


def create_finished_run(path: Path, text: str = "old") -> RunDirectory:
    run, _ = open_run(path, "x", overwrite=False)
    run.save_config(text)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_text(text)
    run.save_summary({"of": text})
    ownership.record_files(path)
    return run


def read_tree(path: Path) -> dict[str, str]:
    return {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}


def list_names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def restart_run(path: Path) -> tuple[RunDirectory, list[str]]:
    check_output(path, overwrite=True, resume=False)
    run, notes = open_run(path, "x", overwrite=True)
    run.save_config("new")
    return run, notes


def fail_run(path: Path) -> None:
    with pytest.raises(RuntimeError), ownership.replace_run(path):
        raise RuntimeError


def write_checkpoint(path: Path, *, certified: bool = True) -> None:
    path.mkdir(exist_ok=True)
    (path / "a").write_text("whole")
    if certified:
        checkpoints.certify(path)


@pytest.mark.parametrize("name", ["config.yaml", "README.md", ".git/config", "adapter/a"])
def test_overwrite_keeps_directory_without_run(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"so it is not deleted\. Choose another directory\."):
        check_output(tmp_path, overwrite=True, resume=False)
    assert read_tree(tmp_path) == {name: "mine"}


def test_overwrite_rejects_link_home_and_git_directories(tmp_path, monkeypatch):
    create_finished_run(tmp_path / "run")
    before = read_tree(tmp_path)
    (tmp_path / "link").symlink_to("run")
    with pytest.raises(ConfigError, match="it is a link to run"):
        check_output(tmp_path / "link", overwrite=True, resume=False)
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="your home directory"):
        check_output(tmp_path / "run", overwrite=True, resume=False)
    monkeypatch.undo()
    (tmp_path / "run" / ".git").mkdir()
    with pytest.raises(ConfigError, match="git work tree"):
        check_output(tmp_path / "run", overwrite=True, resume=False)
    assert read_tree(tmp_path / "run") == {k.removeprefix("run/"): v for k, v in before.items()}


def test_overwrite_keeps_and_reports_other_files(tmp_path):
    create_finished_run(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter" / "notes.txt").write_text("mine too")
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-1" / "a").write_text("foreign")
    run, notes = restart_run(tmp_path)
    assert len(notes) == 3
    for name in ("notes.txt", "adapter/notes.txt", "checkpoints/checkpoint-1/a"):
        assert any(str(tmp_path / name) in line for line in notes)
    with ownership.replace_run(tmp_path):
        run.save_summary({"of": "new"})
    files = read_tree(tmp_path)
    assert files["notes.txt"] == "mine"
    assert files["kept/adapter/notes.txt"] == "mine too"
    assert files["kept/checkpoints/checkpoint-1/a"] == "foreign"
    assert "adapter/adapter_model.safetensors" not in files, "the old run is gone"
    assert not (tmp_path / ".replaced").exists()


def test_old_run_is_restored_if_new_run_fails(tmp_path):
    create_finished_run(tmp_path)
    before = read_tree(tmp_path)
    run, _ = restart_run(tmp_path)
    assert run.adapter.exists() is False
    fail_run(tmp_path)
    assert read_tree(tmp_path) == before


def test_old_run_is_not_restored_after_first_checkpoint(tmp_path):
    create_finished_run(tmp_path)
    run, _ = restart_run(tmp_path)
    write_checkpoint(run.checkpoints / "checkpoint-1")
    fail_run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "new"
    restart_run(tmp_path)
    assert (tmp_path / ".replaced" / "checkpoints" / "checkpoint-1" / "a").is_file()


def test_old_run_is_deleted_if_failure_follows_summary(tmp_path):
    create_finished_run(tmp_path)
    run, _ = restart_run(tmp_path)
    run.save_summary({})
    fail_run(tmp_path)  # such as a failed upload
    assert (tmp_path / "config.yaml").read_text() == "new"
    assert not (tmp_path / ".replaced").exists()


def test_old_run_survives_repeated_kills_of_new_runs(tmp_path):
    create_finished_run(tmp_path)
    for _ in range(3):
        run, _ = restart_run(tmp_path)  # killed before it saves a checkpoint
        run.save_config("broken")
    assert (tmp_path / ".replaced" / "summary.json").is_file()
    fail_run(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "old"


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize("phase", ["backup", "restore"])
@pytest.mark.parametrize("calls", range(6))
def test_kill_while_moving_old_run_loses_nothing(tmp_path, monkeypatch, calls, phase, is_reverse):
    create_finished_run(tmp_path)
    before = read_tree(tmp_path)
    rename, iterdir, count = Path.rename, Path.iterdir, itertools.count()
    if phase == "restore":
        restart_run(tmp_path)

    def sorted_iterdir(path):
        return iter(sorted(iterdir(path), reverse=is_reverse))

    def interrupted_rename(path, to):
        if next(count) >= calls:
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "iterdir", sorted_iterdir)
    monkeypatch.setattr(Path, "rename", interrupted_rename)
    move = fail_run if phase == "restore" else restart_run
    if calls < 4:  # config.yaml, summary.json, adapter and checkpoints
        with pytest.raises(KeyboardInterrupt):
            move(tmp_path)
    elif phase == "restore":
        move(tmp_path)
    monkeypatch.undo()
    restart_run(tmp_path)
    fail_run(tmp_path)
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("state", ["nothing", "marker", "partial marker", "config"])
@pytest.mark.parametrize("mode", ["plain", "overwrite", "resume"])
def test_run_can_start_from_every_interrupted_state(tmp_path, state, mode):
    path = tmp_path / "run"
    path.mkdir()
    if state in ("marker", "config"):
        ownership.create_marker(path)
    if state == "partial marker":
        (path / f".{ownership.MARKER}.partial").write_text('{"run":')
    if state == "config":
        (path / "checkpoints").mkdir()
        (path / "config.yaml").write_text("cut short")
    options = {"overwrite": mode == "overwrite", "resume": mode == "resume"}
    if mode == "plain" and state in ("marker", "config"):
        with pytest.raises(ConfigError, match=r"--overwrite to replace it or --resume"):
            check_output(path, **options)
        return
    check_output(path, **options)
    run, _ = open_run(path, "x", **options)
    assert ownership.is_run(path)
    run.save_config("new")
    with ownership.replace_run(path):
        run.save_summary({})
    assert list_names(path) == [".ftlevel.json", "checkpoints", "config.yaml", "summary.json"]


def test_rotation_keeps_checkpoints_without_manifest(tmp_path):
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}", certified=step > 1)
    write_checkpoint(tmp_path / "checkpoint-4")  # a checkpoint saved twice is valid
    checkpoints.rotate(tmp_path, 2)
    assert list_names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert checkpoints.detect_corruption(tmp_path / "checkpoint-4") is None


def test_damaged_checkpoints_are_renamed_repeatedly(tmp_path):
    for _ in range(3):
        (tmp_path / "checkpoint-2").mkdir()
        newest, rejected = checkpoints.get_last_valid_checkpoint(tmp_path)
        assert newest is None
        assert len(rejected) == 1
        checkpoints.reject_newer(tmp_path, newest)
    assert list_names(tmp_path) == ["rejected-2", "rejected-2-2", "rejected-2-3"]


def test_checkpoint_with_nan_or_infinity_is_damaged(tmp_path):
    for step, value in ((1, 0.5), (2, float("nan")), (3, float("inf"))):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.ones(3), "b": torch.tensor([value])}, folder / "x.safetensors")
        checkpoints.certify(folder)
    newest, rejected = checkpoints.get_last_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-1"
    assert rejected == [f"checkpoint-{n}: x.safetensors has NaN or infinity in b" for n in (3, 2)]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\xff",
     "[" * 100_000, '{"files": {"a": {"size": 1e999, "sha256": "x"}}}',
     '{"files": {"a": {"size": "x", "sha256": 3}}}', '{"files": {}}', '{"files": {"b": {}}}'],
)  # fmt: skip
def test_malformed_manifest_is_reported_as_corruption(tmp_path, text):
    (tmp_path / "a").write_text("a")
    checkpoints.certify(tmp_path)
    assert checkpoints.detect_corruption(tmp_path) is None
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    assert checkpoints.detect_corruption(tmp_path)


def test_files_are_recorded_after_kill_at_end_of_run(tmp_path):
    run, _ = open_run(tmp_path, "x", overwrite=False)
    run.save_summary({"of": "old"})
    (tmp_path / f".{ownership.MARKER}.partial").write_text('{"run":')  # killed in `record_files`
    ownership.record_files_once(tmp_path)
    assert list_names(tmp_path) == [".ftlevel.json", "checkpoints", "summary.json"]
    (run.checkpoints / "notes.txt").write_text("mine")
    ownership.record_files_once(tmp_path)
    restart_run(tmp_path)
    ownership.delete_backup(tmp_path)
    assert (tmp_path / "kept/checkpoints/notes.txt").read_text() == "mine"


def create_interrupted_run(path: Path) -> RunDirectory:
    run, _ = open_run(path, "x", overwrite=False)
    for name in ("checkpoint-1", "checkpoint-2", "rejected-1-2", "best-1"):
        (run.checkpoints / name).mkdir()
        for file in ("adapter_model.safetensors", "trainer_state.json", "rng_state_1.pth"):
            (run.checkpoints / name / file).write_text("old")
    (run.checkpoints / "identity.json").write_text("{}")
    return run


def test_overwrite_keeps_user_files_among_checkpoints(tmp_path):
    run = create_interrupted_run(tmp_path / "run")
    user_files = ("notes.txt", "data/rows.jsonl", "checkpoint-2/mine.txt")
    for name in user_files:
        (run.checkpoints / name).parent.mkdir(exist_ok=True)
        (run.checkpoints / name).write_text("mine")
    restart_run(run.path)
    kept = {name for name, text in read_tree(run.path).items() if text == "mine"}
    assert kept == {f"kept/checkpoints/{name}" for name in user_files}
    assert len(read_tree(run.path / "kept")) == len(user_files), "what the run wrote goes with it"


def test_interrupted_resumed_run_owns_its_checkpoints(tmp_path):
    run = create_finished_run(tmp_path)
    ownership.mark_resumed(tmp_path)
    (run.checkpoints / "checkpoint-9").mkdir()
    (run.checkpoints / "checkpoint-9" / "optimizer.pt").write_text("later")
    (run.adapter / "notes.txt").write_text("mine")
    _, notes = restart_run(tmp_path)
    assert len(notes) == 1
    assert read_tree(tmp_path / "kept") == {"adapter/notes.txt": "mine"}


def test_delete_adapter_keeps_user_files(tmp_path):
    run = create_finished_run(tmp_path / "run")
    (run.adapter / "notes.txt").write_text("mine")
    ownership.mark_resumed(run.path)
    ownership.delete_adapter(run.path)
    assert not run.adapter.exists()
    assert read_tree(run.path / "kept") == {"adapter/notes.txt": "mine"}


def test_targets_of_links_are_not_deleted(tmp_path):
    for name, delete in (("adapter", ownership.delete_adapter), ("checkpoints", restart_run)):
        run, target = create_finished_run(tmp_path / name), tmp_path / f"{name}-there"
        (run.path / name).rename(target)
        (target / "precious").write_text("mine")
        (run.path / name).symlink_to(target)
        before = read_tree(target)
        delete(run.path)
        assert read_tree(target) == before
        ownership.delete_backup(run.path)
        assert read_tree(target) == before


def test_best_models_without_manifest_are_kept(tmp_path):
    for name in ("best-1", "best-3", "best-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")

    def write(path: Path) -> None:
        (path / "trained.safetensors").write_text("ours")

    for step in (2, 3, 4):
        checkpoints.save_best(tmp_path, step, write)
    checkpoints.delete_best_after(tmp_path, 0)
    assert sorted(read_tree(tmp_path)) == ["best-1/mine", "best-3-kept/mine", "best-9/mine"]


@pytest.mark.parametrize("name", [".ftlevel.json", "metrics.jsonl", "checkpoints/identity.json"])
def test_pipe_among_run_files_raises(tmp_path, name):
    create_finished_run(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for overwrite, resume in ((True, False), (False, True)):
        with pytest.raises(InputError, match="is a pipe, a socket or a device"):
            check_output(tmp_path, overwrite=overwrite, resume=resume)


def test_pipe_is_rejected_as_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_plain(tmp_path / "pipe")
    with pytest.raises(InputError, match="neither a name nor a readable file"):
        set_chat_template(SimpleNamespace(chat_template=None), str(tmp_path / "pipe"))
    (tmp_path / "summary.json").symlink_to("pipe")
    (tmp_path / ".ftlevel.json").symlink_to("pipe")
    assert RunDirectory(tmp_path).load_summary() is None
    assert not ownership.is_run(tmp_path)
