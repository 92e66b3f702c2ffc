"""How a model of each task answers a prompt: text, a class, tags, a span, or filled-in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ftlevel.data.encoding.collate import Collator
from ftlevel.data.encoding.encode import IGNORED, Encoded, encode_labelled
from ftlevel.data.encoding.prompts import prompt_ids
from ftlevel.data.encoding.tags import encode_words
from ftlevel.data.encoding.windows import encode_questions
from ftlevel.data.formats.examples import Labelled, Question
from ftlevel.data.prepare.encoder import question_separator
from ftlevel.errors import ConfigError, InputError
from ftlevel.evaluation.scoring import Writing, batches, generate_texts
from ftlevel.models.kinds import max_positions
from ftlevel.tasks.squad import Found, update_found
from ftlevel.trained.load import Trained

_WORDS = re.compile(r"\w+|[^\w\s]")
_MASK = "[MASK]"
NO_ANSWER = "(no answer)"
NO_LABEL = "(no label)"


@dataclass(frozen=True)
class Reply:
    """What a model says to one prompt.

    Attributes:
        text: to be shown.
        scores: class or word → probability; empty where there are none.
        tags: each word with its tag; empty but for token classification.
    """

    text: str
    scores: dict[str, float] = field(default_factory=dict)
    tags: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Ask:
    """What is asked.

    Attributes:
        prompts: one or more.
        context: where answers are looked for; question answering only.
        writing: how text is generated.
        batch_size: prompts a forward pass.
    """

    prompts: Sequence[str]
    context: str | None
    writing: Writing
    batch_size: int = 8


def answer(trained: Trained, ask: Ask) -> list[Reply]:
    """Return what `trained` says to each prompt; call it without gradients.

    Raises:
        ConfigError: a context that is missing or not wanted, or a prompt without a mask.
        InputError: a prompt beyond the model's positions.
    """
    task = trained.task
    if task.target == "span" and ask.context is None:
        raise ConfigError(f"{task.name} looks for an answer in a text. Add --context TEXT.")
    if task.target != "span" and ask.context is not None:
        raise ConfigError(f"--context belongs to question answering, and this is {task.name}.")
    return _ANSWERS[task.target](trained, ask)


def _write(trained: Trained, ask: Ask) -> list[Reply]:
    if trained.prompt_format is None:
        raise TypeError("a model that writes text has a prompt format")
    ids = [prompt_ids(trained.tokenizer, trained.prompt_format, text) for text in ask.prompts]
    texts = generate_texts(
        trained.model, trained.tokenizer, ids, trained.device, ask.batch_size, ask.writing
    )
    return [Reply(text) for text in texts]


def _classify(trained: Trained, ask: Ask) -> list[Reply]:
    texts = [Labelled(text, None, 0, i) for i, text in enumerate(ask.prompts)]
    rows = encode_labelled(trained.tokenizer, texts, lambda _: 0)
    return [
        _read_label(trained, logits.float()) for logits in _logits(trained, rows, ask.batch_size)
    ]


def _read_label(trained: Trained, logits: torch.Tensor) -> Reply:
    problem = trained.options.get("problem_type")
    if problem == "regression":
        return Reply(f"{float(logits[0]):.4f}")
    several = problem == "multi_label_classification"
    shares = logits.sigmoid() if several else logits.softmax(-1)
    scores = dict(zip(trained.labels, shares.tolist(), strict=True))
    if several:
        above = [label for label, share in scores.items() if share > 0.5]
        return Reply(", ".join(above) or NO_LABEL, scores)
    return Reply(max(scores, key=lambda label: scores[label]), scores)


def _tag(trained: Trained, ask: Ask) -> list[Reply]:
    sentences = [_WORDS.findall(text) or [text] for text in ask.prompts]
    ids, extras, positions = encode_words(trained.tokenizer, sentences)
    rows = [
        Encoded(tokens, [IGNORED] * len(tokens), i, more)
        for i, (tokens, more) in enumerate(zip(ids, extras, strict=True))
    ]
    replies = []
    for words, first, logits in zip(
        sentences, positions, _logits(trained, rows, ask.batch_size), strict=True
    ):
        best = logits.argmax(-1).tolist()
        tags = ["O" if at is None else trained.labels[best[at]] for at in first]
        shown = [w if tag == "O" else f"{w}/{tag}" for w, tag in zip(words, tags, strict=True)]
        replies.append(Reply(" ".join(shown), {}, list(zip(words, tags, strict=True))))
    return replies


def _find(trained: Trained, ask: Ask) -> list[Reply]:
    questions = [Question(ask.context or "", text, (), i) for i, text in enumerate(ask.prompts)]
    windows, _ = encode_questions(
        trained.tokenizer,
        questions,
        length=trained.max_length,
        stride=trained.options["doc_stride"],
        separator=question_separator(trained.kind),
        where=lambda index: f"--prompt {index + 1}",
    )
    found = [Found() for _ in questions]
    for window, logits in zip(windows, _logits(trained, windows, ask.batch_size), strict=True):
        update_found(found[window.row], logits.cpu(), window)
    texts = [best.answer(unanswerable=trained.options["unanswerable"]) for best in found]
    return [Reply(text or NO_ANSWER) for text in texts]


def _fill(trained: Trained, ask: Ask) -> list[Reply]:
    tokenizer = trained.tokenizer
    texts = [text.replace(_MASK, tokenizer.mask_token) for text in ask.prompts]
    for text in texts:
        if tokenizer.mask_token not in text:
            raise ConfigError(f"--prompt {text!r} has nothing to fill in. Write {_MASK} somewhere.")
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    rows = [Encoded(ids, [IGNORED] * len(ids), i) for i, ids in enumerate(encoded)]
    replies = []
    for text, row, logits in zip(texts, rows, _logits(trained, rows, ask.batch_size), strict=True):
        places = [i for i, token in enumerate(row.input_ids) if token == tokenizer.mask_token_id]
        # An embedding may have more rows than the vocabulary has words.
        shares = logits[places, : len(tokenizer)].float().softmax(-1)
        for best in shares.argmax(-1).tolist():
            text = text.replace(tokenizer.mask_token, tokenizer.decode([best]).strip(), 1)
        top = shares[0].topk(5)
        words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
        replies.append(Reply(text, dict(zip(words, top.values.tolist(), strict=True))))
    return replies


_ANSWERS: dict[str, Callable[[Trained, Ask], list[Reply]]] = {
    "text": _write,
    "class": _classify,
    "tags": _tag,
    "span": _find,
    "mask": _fill,
}


def _logits(trained: Trained, rows: Sequence[Encoded], batch_size: int) -> Iterator[torch.Tensor]:
    """Yield the logits of each row, without padding, in order."""
    positions = max_positions(trained.model.config)
    longest = max(len(row.input_ids) for row in rows)
    if positions is not None and longest > positions:
        raise InputError(f"--prompt has {longest:,} tokens, and the model takes {positions:,}.")
    collate = Collator(trained.tokenizer.pad_token_id or 0)
    for part in batches(rows, batch_size):
        batch: dict[str, Any] = {k: v.to(trained.device) for k, v in collate(part).items()}
        inputs, _ = trained.objective.split(batch)
        logits = trained.objective.logits(trained.model(**inputs))
        per_token = trained.task.target != "class"
        for row, scores in zip(part, logits, strict=True):
            yield scores[: len(row.input_ids)] if per_token else scores
