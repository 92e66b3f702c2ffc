"""An encoded row: token ids and labels; the label -100 excludes a token from the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ftlevel.errors import InputError
from ftlevel.objectives import IGNORED as IGNORED

ROW_TYPES: dict[str, type[Encoded]] = {}
"""Row classes by name, to restore stored rows."""


class RowError(InputError):
    """Error: the example at index `row` cannot be encoded; `message` has the reason and a fix."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(f"row {row + 1} {message}")
        self.row, self.message = row, message

    def __reduce__(self) -> tuple[type[RowError], tuple[int, str]]:
        return RowError, (self.row, self.message)


@dataclass(frozen=True)
class Encoded:
    """One encoded row; a task may define a subclass.

    Attributes:
        input_ids: token ids of the row, or of the source for an encoder-decoder.
        labels: a list (one label per input token, or an encoder-decoder's target ids), a class or
            value, or a tuple (0.0 or 1.0 per class, or first and last token of a span).
        row: index of the example in its table.
        extras: additional model inputs by name, such as `token_type_ids`.
        has_several_texts: whether a row has several texts, such as a query and documents.
    """

    has_several_texts: ClassVar[bool] = False
    input_ids: list[int]
    labels: list[int] | int | float | tuple[float, ...] | tuple[int, int]
    row: int
    extras: dict[str, list[int]] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        ROW_TYPES[cls.__name__] = cls

    @property
    def supervised(self) -> int:
        """Number of tokens or labels that contribute to the loss."""
        if isinstance(self.labels, int | float):
            return 1
        return sum(label != IGNORED for label in self.labels)

    @property
    def sequences(self) -> Sequence[Encoded]:
        """Sequences that the model processes: the row itself, or one per answer or text of it."""
        return (self,)

    @property
    def loss_inputs(self) -> Mapping[str, Any]:
        """Further inputs of the loss: name → array with a row per sequence or per target."""
        return {}

    @property
    def group(self) -> bytes | None:
        """Key of the group of rows that belong together, such as those of a query; or None."""
        return None

    @property
    def length(self) -> int:
        """Number of tokens of the longest sequence."""
        return len(self.input_ids)

    def truncated(self, limit: int) -> Encoded | None:  # noqa: ARG002 - of subclasses
        """Returns the row cut to `limit` tokens; None (the default) leaves it to `truncate_row`."""
        return None

    def without(self, num_tokens: int) -> Encoded:
        """Returns the row without the `num_tokens` prompt tokens after the first token."""
        ids, labels = self.input_ids, self.labels
        if not isinstance(labels, list):
            raise TypeError("a row without a label for each token has no prompt")
        return replace(
            self,
            input_ids=ids[:1] + ids[1 + num_tokens :],
            labels=labels[:1] + labels[1 + num_tokens :],
        )


ROW_TYPES[Encoded.__name__] = Encoded
