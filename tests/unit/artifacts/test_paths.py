"""Paths in a run's configuration: relative to the run, then absolute, else reported missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftlevel.artifacts.paths import (
    check_paths,
    load_run_config,
    make_paths_absolute,
    save_relative_paths,
)
from ftlevel.artifacts.run_directory import RunDirectory
from ftlevel.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with two data files and a run that refers to both."""
    folder = tmp_path / "project"
    (folder / "runs/one").mkdir(parents=True)
    for name in ("rows.jsonl", "more.jsonl", "template.jinja"):
        (folder / name).write_text(name)
    monkeypatch.chdir(folder)
    write_run(folder / "runs/one", {"dataset": "rows.jsonl", "also": ["./more.jsonl"],
                                    "chat_template": "template.jinja"})  # fmt: skip
    return folder


def write_run(run: Path, data: dict[str, Any], model: str = "builtin:tiny-llama") -> None:
    values = {"model": {"name_or_path": model}, "data": data}
    (run / "config.yaml").write_text(yaml.safe_dump(make_paths_absolute(values)))
    save_relative_paths(RunDirectory(run), values)


def load_data_section(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = load_run_config(run).values["data"]
    return data


def test_run_stores_absolute_and_relative_paths(project):
    stored = yaml.safe_load(Path("runs/one/config.yaml").read_text())
    assert stored["data"]["dataset"] == str(project / "rows.jsonl")
    assert stored["model"]["name_or_path"] == "builtin:tiny-llama"
    assert json.loads(Path("runs/one/places.json").read_text()) == {
        str(project / "rows.jsonl"): "../../rows.jsonl",
        str(project / "more.jsonl"): "../../more.jsonl",
        str(project / "template.jinja"): "../../template.jinja",
    }


def test_paths_of_models_and_rewards_are_absolute(project):
    rewards = ["rows.jsonl=0.5", "more.jsonl", "json:rows.jsonl", "org/rm=0.1", "exact"]
    values = {"embedding": {"guide": "more.jsonl"}, "model": {"adapter": "rows.jsonl"},
              "rl": {"reward": rewards}}  # fmt: skip
    absolute = make_paths_absolute(values)
    assert absolute["embedding"]["guide"] == str(project / "more.jsonl")
    assert absolute["model"]["adapter"] == str(project / "rows.jsonl")
    paths = [f"{project}/rows.jsonl=0.5", f"{project}/more.jsonl=1"]
    assert absolute["rl"]["reward"] == [*paths, *rewards[2:]]


def test_moved_project_uses_relative_paths(project, tmp_path):
    moved = tmp_path / "elsewhere/else"
    moved.parent.mkdir()
    project.rename(moved)
    data = load_data_section(moved / "runs/one")
    assert data["dataset"] == str(moved / "rows.jsonl")
    assert data["also"] == [str(moved / "more.jsonl")]
    assert data["chat_template"] == str(moved / "template.jinja")
    check_paths(moved / "runs/one", {"data": data})


def test_moved_run_uses_absolute_paths(project, tmp_path):
    (project / "runs/one").rename(tmp_path / "two")
    assert load_data_section(tmp_path / "two")["dataset"] == str(project / "rows.jsonl")
    (tmp_path / "two/places.json").unlink()
    assert load_data_section(tmp_path / "two")["dataset"] == str(project / "rows.jsonl")


def test_missing_file_error_names_paths_and_flag(project):
    run = project / "runs/one"
    (project / "rows.jsonl").unlink()
    values = load_run_config(run).values
    with pytest.raises(ConfigError) as caught:
        check_paths(run, values)
    assert str(caught.value) == (
        f"{run}: data.dataset is not where it was, and was looked for at {project}/rows.jsonl. "
        "Pass its path: --dataset PATH."
    )
    check_paths(run, values, ["data.also"])
    values["data"]["dataset"] = "mine.jsonl"  # given by the user, so checked elsewhere
    check_paths(run, values)


def test_rows_in_memory_raise(project):
    Path("in memory").write_text("")
    write_run(project / "runs/one", {"dataset": "in memory", "validation_file": "in memory"})
    assert load_data_section(project / "runs/one")["dataset"] == "in memory"
    with pytest.raises(ConfigError, match="trained on rows in memory, which are not saved"):
        check_paths(project / "runs/one", load_run_config(project / "runs/one").values)


def test_template_name_is_not_a_path(project):
    Path("chatml").write_text("")
    write_run(project / "runs/one", {"dataset": "rows.jsonl", "chat_template": "chatml"})
    assert load_data_section(project / "runs/one")["chat_template"] == "chatml"


def test_model_with_matching_fingerprint_is_used(project, tmp_path):
    import shutil

    import torch
    from safetensors.torch import save_file

    from ftlevel.artifacts.files import base_fingerprint

    (project / "model").mkdir()
    save_file({"a": torch.ones(2)}, project / "model/model.safetensors")
    run = project / "runs/one"
    write_run(run, {}, "model")
    (run / "checkpoints").mkdir()
    origin = {"model.fingerprint": base_fingerprint(project / "model")}
    (run / "checkpoints/identity.json").write_text(json.dumps(origin))
    shutil.copytree(project, tmp_path / "copy")
    copy = tmp_path / "copy/runs/one"
    assert load_run_config(copy).values["model"]["name_or_path"] == str(tmp_path / "copy/model")
    save_file({"a": torch.zeros(2)}, tmp_path / "copy/model/model.safetensors")
    assert load_run_config(copy).values["model"]["name_or_path"] == str(project / "model")
