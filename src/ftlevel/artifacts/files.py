"""Writing a file so that it is absent or whole, whenever the process is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it to the disk, and rename it into place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, absent or whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
