"""What a model predicts in windows of a text, or its hidden states where it has no head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlevel.data.sources.docstrings import read_module, stdlib_modules
from ftlevel.errors import InputError

WINDOW = 256  # tokens that a prediction can look back on, at most
_MASKED_SHARE = 0.15
_DOCUMENTATION = "documentation of Python's standard library"
_CHARACTERS_A_TOKEN = 12  # more than any tokenizer packs, so that enough text is read

PREDICTS = {
    "AutoModelForCausalLM": "next tokens",
    "AutoModelForMaskedLM": "masked tokens (15 %)",
    "AutoModelForSeq2SeqLM": "the second half of each window, given the first",
}
HIDDEN_STATES = "hidden states (the model has no language head)"


@dataclass(frozen=True)
class Text:
    """What is read, and where it is from."""

    content: str
    name: str


def read_eval_text(path: Path | None, tokens: int) -> Text:
    """Return the text to compare on.

    Args:
        path: the user's file; None for the documentation of modules that no built-in training row
            comes from.
        tokens: how many will be used.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    if path is not None:
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--eval-text {path} cannot be read: {error}.") from None
        if not content.strip():
            raise InputError(f"--eval-text {path} is empty. Name a text file.")
        return Text(content, str(path))
    parts, size = [], 0
    for _, file in stdlib_modules("test"):
        for item in read_module(file):
            parts.append(item.docstring)
            size += len(item.docstring)
        if size > tokens * _CHARACTERS_A_TOKEN:
            break
    return Text("\n\n".join(parts), _DOCUMENTATION)


def cut_windows(tokenizer: Any, text: str, tokens: int, length: int) -> list[list[int]]:
    """Return the first `tokens` tokens of `text` in windows of at most `length`.

    Each has the special tokens that the tokenizer puts around a text.
    """
    around = tokenizer("")["input_ids"]
    head = around[:-1] if around and around[-1] == _end(tokenizer) else around
    tail = around[len(head) :]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    room = length - len(around)
    parts = [ids[start : start + room] for start in range(0, len(ids), room)]
    return [[*head, *part, *tail] for part in parts if len(part) > 1]


def _end(tokenizer: Any) -> int | None:
    if tokenizer.sep_token_id is not None:
        return int(tokenizer.sep_token_id)
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


@dataclass(frozen=True)
class Answer:
    """What a model predicts in a window: `(positions, size)` in float32, and the true tokens."""

    values: torch.Tensor
    labels: torch.Tensor


def read_windows(
    model: Any, windows: Sequence[list[int]], auto_class: str, tokenizer: Any
) -> Iterator[Answer]:
    """Yield what `model`, in eval mode, predicts in each window."""
    device = next(model.parameters()).device
    ask = _QUESTIONS.get(auto_class, _ask_hidden)
    for number, window in enumerate(windows):
        question = ask(torch.tensor([window], device=device), tokenizer, number)
        with torch.no_grad():
            values = question.answers(model)
        yield Answer(values, question.labels)


@dataclass(frozen=True)
class _Question:
    """A window as a model is asked: its inputs, which outputs count, and the true tokens there."""

    inputs: dict[str, torch.Tensor]
    places: torch.Tensor | slice
    labels: torch.Tensor
    output: str = "logits"

    def answers(self, model: Any) -> torch.Tensor:
        """Return the outputs that count, `(positions, size)` in float32."""
        inputs = dict(self.inputs)
        if self.output == "last_hidden_state" and model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        output = model(**inputs)
        return output[self.output][0][self.places].float()


def _ask_next(ids: torch.Tensor, tokenizer: Any, number: int) -> _Question:  # noqa: ARG001
    return _Question({"input_ids": ids}, slice(0, -1), ids[0, 1:])


def _ask_masked(ids: torch.Tensor, tokenizer: Any, number: int) -> _Question:
    special = torch.tensor(tokenizer.all_special_ids, device=ids.device)
    plain = (~torch.isin(ids[0], special)).nonzero().flatten()
    count = max(1, round(len(plain) * _MASKED_SHARE))
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(number))
    places = plain[order[:count].to(ids.device)].sort().values
    hidden = ids.clone()
    hidden[0, places] = tokenizer.mask_token_id
    return _Question({"input_ids": hidden}, places, ids[0, places])


def _ask_half(ids: torch.Tensor, tokenizer: Any, number: int) -> _Question:  # noqa: ARG001
    middle = ids.shape[1] // 2
    inputs = {"input_ids": ids[:, :middle], "labels": ids[:, middle:]}
    return _Question(inputs, slice(None), ids[0, middle:])


def _ask_hidden(ids: torch.Tensor, tokenizer: Any, number: int) -> _Question:  # noqa: ARG001
    inputs = {"input_ids": ids}
    return _Question(inputs, slice(None), ids[0], "last_hidden_state")


_QUESTIONS = {
    "AutoModelForCausalLM": _ask_next,
    "AutoModelForMaskedLM": _ask_masked,
    "AutoModelForSeq2SeqLM": _ask_half,
}
