"""Collate the distinct texts of an optimizer step into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftlevel.data.encoding.encode import Encoded
from ftlevel.data.encoding.texts import distinct_texts
from ftlevel.fast.step_collator import StepCollator


class TextCollator(StepCollator):
    """Collates rows whose texts are embedded one by one; each distinct text is there once."""

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        """Return what `StepCollator` returns for the distinct texts, with `texts` and `parts`.

        `texts` are the rows as `StepTexts`; `parts` the indices of the texts of each micro-batch.
        """
        texts, step = distinct_texts(rows)
        return {**super().__call__(texts), "rows": rows, "texts": step}
