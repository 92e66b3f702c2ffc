from __future__ import annotations

import hashlib

from ftlevel.artifacts.run_directory import get_recipe_info


def test_recipe_info_has_path_and_digest(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: summarization\n")
    assert get_recipe_info(recipe) == {
        "path": str(recipe),
        "sha256": hashlib.sha256(b"task: summarization\n").hexdigest(),
    }
