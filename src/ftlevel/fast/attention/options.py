"""What an attention is asked to compute of a row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionOptions:
    """One attention's part of a model.

    Attributes:
        causal: whether a token sees only itself and what is before it.
        window: a token sees fewer than this many tokens to each side, itself included; None for
            all.
        scale: of the scores.
        dropout: of the probabilities.
        cap: what scores are capped at (Gemma 2); None for nothing.
    """

    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    cap: float | None = None
