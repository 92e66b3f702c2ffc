"""Encoder of queries, documents and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.data.encoding.encode import split_batches
from ftlevel.data.encoding.row import Encoded, RowError
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.rows import EncodedText, EncodedTexts


@dataclass(frozen=True)
class TextEncoder:
    """Callable that encodes examples; it is picklable for worker processes.

    Attributes:
        end: id to append to each text that does not end with a special token; None for none.
        with_words: whether the encoded rows keep their texts, for a teacher or guide model.
        include_prompt: whether the tokens of prompts are pooled.
    """

    tokenizer: Any
    query_prompt: str
    document_prompt: str
    end: int | None = None
    with_words: bool = False
    include_prompt: bool = True

    def __call__(self, examples: Sequence[EmbeddingRow]) -> list[Encoded]:
        """Returns one row per example; raises `RowError` for a text without tokens."""
        return [row for chunk in split_batches(examples) for row in self._encode(chunk)]

    def _encode(self, examples: Sequence[EmbeddingRow]) -> list[Encoded]:
        prompts = [
            [example.prompt or self.query_prompt, *[self.document_prompt] * len(example.documents)]
            for example in examples
        ]
        texts = [
            [prompt + text for prompt, text in zip(own, (e.query, *e.documents), strict=True)]
            for own, e in zip(prompts, examples, strict=True)
        ]
        encoded = iter(self.ids([text for own in texts for text in own]))
        sizes = {prompt: self.prompt_size(prompt) for own in prompts for prompt in own}
        ends = self.ends
        rows: list[Encoded] = []
        for example, own, heads in zip(examples, texts, prompts, strict=True):
            ids = [next(encoded) for _ in own]
            if not all(ids):
                raise RowError(example.row, "has a text without a token.")
            labels = example.labels or (float(hash_group(example.group)),)
            prompt_sizes = tuple(sizes[prompt] for prompt in heads)
            rows.append(
                EncodedTexts(
                    [token for part in ids for token in part],
                    tuple(map(float, labels)),
                    example.row,
                    {},
                    tuple(map(len, ids)),
                    example.teacher,
                    prompt_sizes,
                    (example.query, *example.documents) if self.with_words else (),
                    prompt_sizes if not self.include_prompt and any(prompt_sizes) else (),
                    ends,
                )
            )
        return rows

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each text, ending with `end` or another special token."""
        found: list[list[int]] = self.tokenizer(list(texts))["input_ids"]
        if self.end is None:
            return found
        special = set(self.tokenizer.all_special_ids)
        return [ids if ids and ids[-1] in special else [*ids, self.end] for ids in found]

    @property
    def ends(self) -> bool:
        """Whether each text ends with a special token."""
        return bool(self.prompt_size("a") < len(self.ids(["a"])[0]))

    def documents(self, texts: Sequence[str]) -> list[EncodedText]:
        """Returns the encoded documents; the `row` of each is its index in `texts`."""
        unpooled = 0 if self.include_prompt else self.prompt_size(self.document_prompt)
        ends = self.ends
        found: list[EncodedText] = []
        for chunk in split_batches(texts):
            for own in self.ids([self.document_prompt + text for text in chunk]):
                found.append(EncodedText(own, 0, len(found), {}, min(unpooled, len(own) - 1), ends))
        return found

    def prompt_size(self, prompt: str) -> int:
        """Returns the number of tokens of `prompt` and special tokens before it, such as BOS."""
        if not prompt:
            return 0
        ids = self.ids([prompt])[0]
        special = set(self.tokenizer.all_special_ids)
        while ids and ids[-1] in special:
            ids = ids[:-1]
        return len(ids)


def append_end(tokenizer: Any, end: int) -> None:
    """Make a fast `tokenizer` (modified) append the token `end` to each text.

    Other libraries pool the same token if they load the tokenizer from the model's directory.
    """
    around = tokenizer("a")["input_ids"]
    if not tokenizer.is_fast or around[-1] in set(tokenizer.all_special_ids):
        return
    from tokenizers.processors import TemplateProcessing

    start = around[: len(around) - len(tokenizer("a", add_special_tokens=False)["input_ids"])]
    names = {f"start{at}": token for at, token in enumerate(start)} | {"end": end}
    before = "".join(f"start{at}:0 " for at in range(len(start)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before}$A:0 end:0",
        pair=f"{before}$A:0 end:0 $B:1 end:1",
        special_tokens=list(names.items()),
    )


def keeps_case(tokenizer: Any) -> bool:
    """Returns whether a fast `tokenizer` distinguishes upper and lower case."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer is None or "A" in normalizer.normalize_str("A")


def lowercase(tokenizer: Any) -> None:
    """Modify a fast `tokenizer` in place to lowercase texts."""
    from tokenizers import normalizers

    if keeps_case(tokenizer):
        backend = tokenizer.backend_tokenizer
        own = [backend.normalizer] if backend.normalizer else []
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])


def hash_group(group: str) -> int:
    """Returns a hash below 2⁴⁴ of a class name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=6).digest()[:6], "big") >> 4


_SHOWN = 60  # characters of a document


def check_documents(rows: Sequence[EmbeddingRow]) -> list[tuple[str, int, str]]:
    """Returns (check name, number of documents or pairs, description) per failed check of `rows`.

    `contradicting_labels`: a document is relevant and irrelevant to a query. `document_variants`:
    documents differ only by case and white space, so that one may be a false negative.
    """
    found = []
    if (contradictions := _get_contradictions(rows))[0]:
        found.append(("contradicting_labels", *contradictions))
    if (variants := _get_variants(rows))[0]:
        found.append(("document_variants", *variants))
    return found


def check_eval_set(
    training_set: Sequence[EmbeddingRow],
    eval_set: Sequence[EmbeddingRow],
    corpus: Sequence[str] | None,
) -> list[tuple[str, str, Sequence[int], str]]:
    """Returns (check name, split, row indices, example) per failed check of the validation rows.

    `missing_positives`: a relevant document is not in the corpus. `trained_documents`: a searched
    document is a positive of a training row, which biases the evaluation.
    """
    if eval_set[0].kind != "ranking":
        return []
    found: list[tuple[str, str, Sequence[int], str]] = []
    documents = {text for row in eval_set for text in row.documents}
    if corpus is not None:
        documents = set(corpus)
        missing = {
            row.row: text for row in eval_set for text in row.positives if text not in documents
        }
        if missing:
            example = next(iter(missing.values()))
            found.append(("missing_positives", "validation", list(missing), _shorten(example)))
    shared = {row.row: text for row in training_set for text in row.positives if text in documents}
    if shared:
        example = next(iter(shared.values()))
        found.append(("trained_documents", "train", list(shared), _shorten(example)))
    return found


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def _get_contradictions(rows: Sequence[EmbeddingRow]) -> tuple[int, str]:
    """Returns the number of (query, document) pairs with contradicting labels, and an example."""
    seen: dict[tuple[str, str], tuple[bool, int]] = {}
    pairs: set[tuple[str, str]] = set()
    first = ""
    for row in rows:
        if row.kind == "class":
            return 0, ""
        query = row.prompt + row.query
        for text, label in zip(row.documents, row.labels, strict=True):
            is_good, before = seen.setdefault((query, text), (label > 0, row.row))
            if is_good != (label > 0):
                first = first or f"rows {before + 1} and {row.row + 1}"
                pairs.add((query, text))
    return len(pairs), first


def _get_variants(rows: Sequence[EmbeddingRow]) -> tuple[int, str]:
    """Returns the number of documents that repeat another up to case and space, and an example."""
    seen: dict[str, tuple[str, int]] = {}
    variants: set[str] = set()
    first = ""
    for row in rows:
        for text in row.documents:
            other, before = seen.setdefault(" ".join(text.lower().split()), (text, row.row))
            if other != text and text not in variants:
                first = first or f"rows {before + 1} and {row.row + 1}"
                variants.add(text)
    return len(variants), first
