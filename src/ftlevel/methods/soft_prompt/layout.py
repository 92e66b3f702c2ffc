"""Where a prompt stands in the rows of a batch, and how to put it in and take it out again.

    [pad … pad] text₀ … textₖ₋₁ [prompt] textₖ … [pad … pad]

The prompt follows the padding on the left, so that a row means the same in every batch: distances
between prompt and text do not depend on how much padding there is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """The place of a prompt in each row of a batch.

    Attributes:
        start: (batch,) index in front of which the prompt is put.
        length: of the prompt, P.
    """

    start: torch.Tensor
    length: int

    @classmethod
    def find(
        cls,
        attention_mask: torch.Tensor | None,
        rows: torch.Tensor,
        length: int,
        tokens_before: int,
    ) -> Layout:
        """Return the layout of a batch.

        Args:
            attention_mask: (batch, seq), nonzero for text; None where there is no padding.
            rows: (batch, …), for the number of rows and their device.
            length: of the prompt.
            tokens_before: tokens of the text that come first.
        """
        if attention_mask is None:
            start = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
            return cls(start + tokens_before, length)
        first = (attention_mask != 0).long().argmax(dim=1)  # the first of equal values
        return cls((first + tokens_before).clamp(max=attention_mask.shape[1]), length)

    def insert(self, states: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Put `prompt` (batch, P, …) into `states` (batch, seq, …): (batch, seq + P, …)."""
        seq = states.shape[1]
        index = torch.arange(seq + self.length, device=states.device)
        beyond = index - self.start[:, None]
        source = torch.where(beyond < 0, index, index - self.length)
        source = torch.where((beyond >= 0) & (beyond < self.length), seq + beyond, source)
        return _pick(torch.cat([states, prompt], dim=1), source)

    def take_out(self, states: torch.Tensor) -> torch.Tensor:
        """Return `states` (batch, seq + P, …) at the places of the text; (batch, seq, …)."""
        index = torch.arange(states.shape[1] - self.length, device=states.device)
        return _pick(states, index + self.length * (index >= self.start[:, None]))

    def extend_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return a mask (batch, seq) with the prompt in it, which is always seen."""
        return self.insert(attention_mask, attention_mask.new_ones(len(self.start), self.length))

    def extend_types(self, token_type_ids: torch.Tensor) -> torch.Tensor:
        """Return token types (batch, seq) with the prompt's, which is of type 0."""
        return self.insert(token_type_ids, token_type_ids.new_zeros(len(self.start), self.length))

    def extend_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Return positions (batch or 1, seq) with the prompt's, and what follows it moved on."""
        position_ids = position_ids.expand(len(self.start), -1)
        index = torch.arange(position_ids.shape[1], device=position_ids.device)
        at = self.start.clamp(max=position_ids.shape[1] - 1)[:, None]
        steps = torch.arange(self.length, device=position_ids.device)
        prompt = position_ids.gather(1, at) + (self.start[:, None] - at) + steps
        moved = position_ids + self.length * (index >= self.start[:, None])
        return self.insert(moved, prompt)


def _pick(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `states` (batch, n, …) at `index` (batch, m) of the second dimension."""
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, index]
