"""Text generation with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ftlevel.artifacts.files import read_json, write_json
from ftlevel.data.encoding.chat import get_end_of_turn_id
from ftlevel.data.encoding.collate import pad


@dataclass(frozen=True)
class GenerationOptions:
    """Settings of text generation, which ends at a stop text; `temperature` 0 does not sample."""

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_texts: Sequence[str] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.num_beams == 1 and not self.temperature

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Returns arguments of `model.generate`; with sampling, also sets torch's global seed."""
        kwargs: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "use_cache": True,
            "pad_token_id": tokenizer.pad_token_id or 0,
            "eos_token_id": stop_ids(model, tokenizer),
        }
        if getattr(tokenizer, "tgt_lang", None):
            first = tokenizer(text_target="")["input_ids"][0]
            if first != tokenizer.eos_token_id:  # the language's token begins a translation
                kwargs["forced_bos_token_id"] = first
        if self.stop_texts:
            criteria = _StopTextCriteria(tokenizer, self.stop_texts)
            kwargs["stopping_criteria"] = StoppingCriteriaList([criteria])
        if not self.temperature:
            return kwargs | {"do_sample": False}
        torch.manual_seed(self.seed)
        # transformers' default of 50 for top_k is switched off.
        sampling_kwargs = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return kwargs | {"do_sample": True} | sampling_kwargs


class _StopTextCriteria(StoppingCriteria):
    """Ends rows whose new tokens end in a stop text; `stop_strings` also matches prompt tokens."""

    def __init__(self, tokenizer: Any, stop_texts: Sequence[str]) -> None:
        self._tokenizer, self._stop_texts, self._num_new = tokenizer, stop_texts, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Returns (rows,) booleans: which rows end. Each call has one token more than the last."""
        self._num_new = min(self._num_new + 1, get_tail_length(self._stop_texts))
        rows = input_ids[:, -self._num_new :].tolist()
        ended = [has_stop_text(self._tokenizer, ids, self._stop_texts) for ids in rows]
        return torch.tensor(ended, device=input_ids.device)


def has_stop_text(tokenizer: Any, ids: Sequence[int], stop_texts: Sequence[str]) -> bool:
    """Returns whether the last of the generated `ids` complete a stop text."""
    if not stop_texts:
        return False
    tail = tokenizer.decode(ids[-get_tail_length(stop_texts) :])
    return any(text in tail for text in stop_texts)


def get_tail_length(stop_texts: Sequence[str]) -> int:
    """Returns how many last tokens must be decoded to find any stop text at the end."""
    return max(len(text.encode()) for text in stop_texts) + 4  # a token has at least one byte


def cut_at_stop(text: str, stop_texts: Sequence[str]) -> str:
    """Returns `text` up to its first stop text."""
    return text[: min((text.find(stop) for stop in stop_texts if stop in text), default=len(text))]


def batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields slices of `rows` of at most `size` items."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


Divide = Callable[[Callable[[Sequence[Any]], Sequence[Any]], Sequence[Any]], Sequence[Any]]
"""Function (compute, items) that returns `compute(items)`, of which each process computes some."""


def compute_all(compute: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]) -> Any:
    """Returns `compute(items)`, in this process."""
    return compute(items)


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    device: str,
    batch_size: int,
    options: GenerationOptions,
    divide: Divide = compute_all,
) -> list[str]:
    """Returns the generated text for each prompt, in order and without special tokens.

    Prompts are batched by length. Decoders are padded on the left, encoder-decoders on the right,
    since left padding shifts the positions of BART; its decoder alone gets prompts of one length.
    """
    order: Sequence[int] = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if getattr(model.config, "is_decoder", False):  # BART's decoder has no position_ids
        groups = [[*group] for _, group in groupby(order, key=lambda i: len(prompts[i]))]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    encoder_decoder = model.config.is_encoder_decoder

    def generate(indices: Sequence[int]) -> list[str]:
        ids = pad([prompts[i] for i in indices], pad_id, left=not encoder_decoder).to(device)
        mask = pad([[1] * len(prompts[i]) for i in indices], 0, left=not encoder_decoder).to(device)
        generated = model.generate(
            input_ids=ids, attention_mask=mask, **options.arguments(model, tokenizer)
        )
        completions = generated if encoder_decoder else generated[:, ids.shape[1] :]
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]
        return [cut_at_stop(text, options.stop_texts).strip() for text in texts]

    parts = [part for group in groups for part in batches(group, batch_size)]
    outputs = divide(lambda own: [generate(indices) for indices in own], parts)
    by_index = {
        index: text
        for indices, texts in zip(parts, outputs, strict=True)
        for index, text in zip(indices, texts, strict=True)
    }
    return [by_index[index] for index in range(len(prompts))]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Returns ids that end generation: EOS of generation_config and tokenizer, end of chat turn."""
    return merge_stop_ids(model.generation_config.eos_token_id, tokenizer)


def merge_stop_ids(eos: int | list[int] | None, tokenizer: Any) -> list[int]:
    """Returns `eos` with the EOS of `tokenizer` and the token that ends a chat turn."""
    own = eos if isinstance(eos, list) else [eos]
    token_ids = [*own, tokenizer.eos_token_id, get_end_of_turn_id(tokenizer)]
    return list(dict.fromkeys(i for i in token_ids if i is not None))


def added_stops(eos: int | list[int] | None, tokenizer: Any) -> dict[str, int]:
    """Returns token → id of `merge_stop_ids`; empty if generation stops at them by `eos` alone."""
    ids = merge_stop_ids(eos, tokenizer)
    if ids in (eos, [eos]):
        return {}
    return {str(tokenizer.convert_ids_to_tokens(i)): i for i in ids}


def save_stop_ids(directory: Path, tokenizer: Any) -> dict[str, int]:
    """Add `added_stops` to generation_config.json in `directory`, if it exists; return them."""
    path = directory / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    stops = added_stops(config.get("eos_token_id"), tokenizer)
    if config and stops:
        write_json(path, {**config, "eos_token_id": list(stops.values())})
    return stops
