"""PEFT methods: each module turns one spec of the config into one `peft` config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftlevel.methods import lora

BUILDERS: dict[str, Callable[..., Any]] = {"lora": lora.build, "qlora": lora.build}
"""Method → function that makes its PEFT config; `full` has none."""
