from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from ftlevel.artifacts.run_directory import get_recipe_info


def run_git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_recipe_info_has_commit_and_changes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: summarization\n")
    run_git(tmp_path, "init")
    assert get_recipe_info(recipe)["commit"] is None, "it is not tracked yet"
    run_git(tmp_path, "add", "recipe.yaml")
    run_git(tmp_path, "commit", "-m", "A recipe")
    info = get_recipe_info(recipe)
    assert len(info["commit"]) == 40
    assert info["changed"] is False
    recipe.write_text("task: translation\n")
    assert get_recipe_info(recipe)["changed"] is True


def test_recipe_info_outside_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: summarization\n")
    assert get_recipe_info(recipe) == {
        "path": str(recipe),
        "sha256": hashlib.sha256(b"task: summarization\n").hexdigest(),
        "commit": None,
        "changed": None,
    }


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_recipe_info_runs_no_repository_hooks(tmp_path: Path) -> None:
    """`git status` would run core.fsmonitor and the filters of .gitattributes."""
    recipe, canary = tmp_path / "recipe.yaml", tmp_path / "canary"
    recipe.write_text("task: summarization\n")
    run_git(tmp_path, "init")
    run_git(tmp_path, "add", "recipe.yaml")
    run_git(tmp_path, "commit", "-m", "A recipe")
    run_git(tmp_path, "config", "core.fsmonitor", f"touch {canary}; false")
    run_git(tmp_path, "config", "filter.x.clean", f"touch {canary}; cat")
    (tmp_path / ".gitattributes").write_text("* filter=x\n")
    recipe.write_text("task: translation\n")
    assert get_recipe_info(recipe)["changed"] is True
    assert not canary.exists()
