"""Flags from other tools' own examples, and what ftlevel does with each: spellings.yaml.

docs/coming-from.md is generated from this table; `test_spellings.py` checks it against the CLI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class ForeignFlag:
    """One flag as typed for another tool.

    Attributes:
        tool: the other tool.
        typed: flag and value.
        sets: expected field values, which differ from the defaults.
        agrees: part of the docs line that says why nothing has to be set.
        answer: part of the error message if the flag is rejected.
        extra: further arguments that the flag needs.
    """

    tool: str
    typed: str
    sets: Mapping[str, Any] = field(default_factory=dict)
    agrees: str = ""
    answer: str = ""
    extra: str = ""

    @property
    def is_accepted(self) -> bool:
        """Whether the command line is accepted."""
        return not self.answer


SPELLINGS = [
    ForeignFlag(group["tool"], **row)
    for group in yaml.safe_load(Path(__file__).with_name("spellings.yaml").read_text("utf-8"))
    for row in group["rows"]
]
