"""What a model answers to the prompts: its logits on them, and a few tokens of greedy text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ftlevel.merging.serving.entry import Entry, Prompt

TOKENS = 12
"""How many tokens of an answer are recorded."""
BOUND = 1e-4
"""How far logits may be apart, in multiples of the largest: sums in float32 have no order."""


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        ids: its tokens, the end-of-sequence token among them where it came.
        logprobs: of each.
        margins: how far the second likeliest token is behind each.
        text: of the tokens, as a server shows them.
    """

    ids: list[int]
    logprobs: list[float]
    margins: list[float]
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for served.json, numbers rounded to what float32 tells."""
        facts = asdict(self)
        for key in ("logprobs", "margins"):
            facts[key] = [round(value, 6) for value in facts[key]]
        return facts


@dataclass(frozen=True)
class Spoken:
    """What one model says to all prompts.

    Attributes:
        logits: of each prompt, (tokens, vocabulary) or as the head has them.
        answers: to each prompt; empty where the model does not go on writing.
    """

    logits: list[torch.Tensor]
    answers: list[Answer]


def ask(model: Any, entry: Entry, prompts: Sequence[Prompt]) -> Spoken:
    """Ask `model`, in eval mode, all prompts."""
    device = next(model.parameters()).device
    logits, answers = [], []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt.ids], device=device)
            if entry.answers:
                found, answer = _continue(model, ids, entry.tokenizer)
                answers.append(answer)
            else:
                found = _logits(model, ids, seq2seq="Seq2Seq" in entry.auto_class)
            logits.append(found.float().cpu())
    return Spoken(logits, answers)


def _logits(model: Any, ids: torch.Tensor, *, seq2seq: bool) -> torch.Tensor:
    more = {"decoder_input_ids": ids[:, :8]} if seq2seq else {}
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    if hasattr(output, "start_logits"):
        return torch.cat([output.start_logits, output.end_logits], -1)[0]
    return output.logits[0]


def _continue(model: Any, ids: torch.Tensor, tokenizer: Any) -> tuple[torch.Tensor, Answer]:
    """Return the logits of the prompt, and the greedy answer to it."""
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    of_prompt, row = output.logits[0], output.logits[0, -1]
    tokens: list[int] = []
    logprobs: list[float] = []
    margins: list[float] = []
    for number in range(TOKENS):
        scores = torch.log_softmax(row.float(), -1)
        best = scores.topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(best.values[0]))
        margins.append(float(best.values[0] - best.values[1]))
        if tokens[-1] == tokenizer.eos_token_id or number + 1 == TOKENS:
            break
        output = model(
            input_ids=torch.tensor([tokens[-1:]], device=ids.device),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        row = output.logits[0, -1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return of_prompt, Answer(tokens, logprobs, margins, text)


def largest_difference(one: Spoken, other: Spoken) -> float:
    """Return how far the logits of two models are apart at most."""
    pairs = zip(one.logits, other.logits, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def scale(spoken: Spoken) -> float:
    """Return the largest logit."""
    return max(float(found.abs().max()) for found in spoken.logits)


def divergence(one: Spoken, other: Spoken) -> float:
    """Return the mean KL divergence of `other` from `one` over the tokens of the prompts."""
    found = [
        (a.log_softmax(-1).exp() * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).flatten()
        for a, b in zip(one.logits, other.logits, strict=True)
    ]
    return float(torch.cat(found).mean())
