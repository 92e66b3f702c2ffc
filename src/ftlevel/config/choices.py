"""A value that ftlevel chose because the user gave none, with the reason that is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """One line of what a run is made of: `dtype bfloat16 (auto: CPU has avx512_bf16)`."""

    name: str
    value: Any
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})" if self.reason else str(self.value)
