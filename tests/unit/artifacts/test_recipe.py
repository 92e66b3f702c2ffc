from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from ftlevel.artifacts.run_directory import get_recipe_info


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", folder, *who, *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_knows_the_recipe_as_it_is(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: summarization\n")
    git(tmp_path, "init")
    assert get_recipe_info(recipe)["commit"] is None, "it is not tracked yet"
    git(tmp_path, "add", "recipe.yaml")
    git(tmp_path, "commit", "-m", "A recipe")
    found = get_recipe_info(recipe)
    assert len(found["commit"]) == 40
    assert found["changed"] is False
    recipe.write_text("task: translation\n")
    assert get_recipe_info(recipe)["changed"] is True


def test_outside_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_nothing_runs_that_a_strangers_repository_names(tmp_path: Path) -> None:
    """`git status` runs core.fsmonitor and the filters of .gitattributes."""
    recipe, canary = tmp_path / "recipe.yaml", tmp_path / "canary"
    recipe.write_text("task: summarization\n")
    git(tmp_path, "init")
    git(tmp_path, "add", "recipe.yaml")
    git(tmp_path, "commit", "-m", "A recipe")
    git(tmp_path, "config", "core.fsmonitor", f"touch {canary}; false")
    git(tmp_path, "config", "filter.x.clean", f"touch {canary}; cat")
    (tmp_path / ".gitattributes").write_text("* filter=x\n")
    recipe.write_text("task: translation\n")
    assert get_recipe_info(recipe)["changed"] is True
    assert not canary.exists()
