"""Which recipe a run came from, and whether git knows it as it was."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any


def describe_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe's path, its SHA-256, and where its directory is under git, its state there.

    `commit` is the checkout's; `changed` whether the recipe differs from it. Both are None outside
    of a repository, where there is no git, and for a recipe that no commit has.

    The recipe may lie in a repository that somebody else made. `git status` would run what its
    settings name (core.fsmonitor, filters); to look up and to hash an object runs nothing.
    """
    path = path.resolve()
    kept = _git(path, "rev-parse", "--verify", "--end-of-options", f"HEAD:./{path.name}")
    commit = _git(path, "rev-parse", "HEAD") if kept else None
    own = _git(path, "hash-object", "--no-filters", "--", path.name) if commit else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    changed = None if commit is None else own != kept
    return {"path": str(path), "sha256": digest, "commit": commit, "changed": changed}


def _git(path: Path, *arguments: str) -> str | None:
    """Return what git prints about the directory of `path`, None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(path.parent), *arguments],
            capture_output=True, text=True, check=False, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
