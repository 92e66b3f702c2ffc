"""Which recipe a run came from, and whether git knows it as it was."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any


def describe_recipe(path: Path) -> dict[str, Any]:
    """Return a recipe's path, its SHA-256, and where its directory is under git, its state there.

    `commit` is the checkout's; `changed` whether the recipe differs from it. Both are None outside
    of a repository, where there is no git, and for a recipe that git does not track.
    """
    path = path.resolve()
    known = _git(path, "ls-files", "--error-unmatch", path.name) is not None
    commit = _git(path, "rev-parse", "HEAD") if known else None
    changed = bool(_git(path, "status", "--porcelain", "--", path.name)) if commit else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
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
