"""Tests of pooling, encoding, truncation and the order of texts."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from ftlevel.data.encoding.row import Encoded
from ftlevel.extras.retrieval.batches import DistinctTextSampler
from ftlevel.extras.retrieval.encoding import TextEncoder, append_end, lowercase
from ftlevel.extras.retrieval.formats import EmbeddingRow
from ftlevel.extras.retrieval.objective import Embeddings, pool
from ftlevel.extras.retrieval.rows import EncodedTexts, distinct_texts
from ftlevel.extras.retrieval.sentence_transformers import EmbeddingFormat
from tiny_tokenizers import bert_tokenizer, build_tokenizer, llama_tokenizer


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
@pytest.mark.parametrize("virtual", [0, 3])
def test_pooling_ignores_padding_and_virtual_tokens(pooling: str, virtual: int, left: bool) -> None:
    lengths, width = (4, 2), 5
    texts = [torch.randn(length, width) for length in lengths]
    states = torch.full((2, virtual + 4, width), 1e3)
    mask = torch.zeros(2, 4, dtype=torch.long)
    for row, text in enumerate(texts):
        token_slice = slice(4 - len(text), 4) if left else slice(0, len(text))
        states[row, virtual:][token_slice] = text
        mask[row, token_slice] = 1
    expected = {
        "mean": [text.mean(0) for text in texts],
        "cls": [text[0] for text in texts],
        "last": [text[-1] for text in texts],
        "max": [text.amax(0) for text in texts],
    }[pooling]
    assert torch.allclose(pool(states, mask, pooling), torch.stack(expected), atol=1e-6)


def test_prompts_are_prepended_to_queries_and_documents() -> None:
    tokenizer = bert_tokenizer()
    encode = TextEncoder(tokenizer, "the query: ", "a text: ")
    (row,) = encode([EmbeddingRow("the cat", 7, ("a dog", "the end"), (1.0, 0.0))])
    assert isinstance(row, EncodedTexts)
    expected = tokenizer(["the query: the cat", "a text: a dog", "a text: the end"])["input_ids"]
    assert [text.input_ids for text in row.sequences] == expected
    assert (row.labels, row.row) == ((1.0, 0.0), 7)
    prompt_ids = row.sequences[0].input_ids[: row.prompts[0]]
    assert prompt_ids == tokenizer("the query: ")["input_ids"][:-1]


def test_embeddings_are_truncated_after_normalization() -> None:
    """As `encode` of sentence-transformers with truncate_dim and a module Normalize."""
    states, mask = torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.long)
    embedding_format = EmbeddingFormat("mean", normalize=True, dims=4)
    actual = Embeddings("ndcg@10", format=embedding_format).embed_states(states, mask)
    mean = states.mean(1)
    assert torch.allclose(actual, (mean / mean.norm(dim=1, keepdim=True))[:, :4], atol=1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_prompt_tokens_are_excluded_from_pooling(left: bool) -> None:
    states, counts, lengths = torch.randn(3, 5, 4), (3, 0, 2), (5, 3, 4)
    mask = torch.zeros(3, 5, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(5 - length, 5) if left else slice(0, length)] = 1
    embedding_format = EmbeddingFormat("mean", include_prompt=False)
    actual = Embeddings("ndcg@10", format=embedding_format).embed(
        SimpleNamespace(last_hidden_state=states), mask, counts
    )
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        start = 5 - length if left else 0
        expected = states[row, start + count : start + length].mean(0)
        assert torch.allclose(actual[row], expected, atol=1e-6)


def test_equal_tokens_with_different_prompts_are_distinct() -> None:
    """A document that starts with the words of the prompt has all its tokens pooled."""
    encode = TextEncoder(bert_tokenizer(), "the query: ", "", include_prompt=False)
    (row,) = encode([EmbeddingRow("the cat", 0, ("the query: the cat",), (1.0,))])
    query, document = row.sequences
    assert query.input_ids == document.input_ids
    assert (query.unpooled, document.unpooled) == (row.prompts[0], 0)
    assert len(distinct_texts([row])[0]) == 2
    truncated = row.truncated(3)  # shorter than the prompt
    assert [text.unpooled for text in truncated.sequences] == [2, 0]


def test_decoder_texts_end_with_one_end_token() -> None:
    tokenizer = llama_tokenizer()
    end = tokenizer.eos_token_id
    (row,) = TextEncoder(tokenizer, "", "", end)([EmbeddingRow("the cat", 0, ("a dog",), (1.0,))])
    for text in row.sequences:
        assert text.input_ids[-1] == end
        assert text.input_ids.count(end) == 1


def test_truncation_keeps_end_token_of_each_text() -> None:
    row = EncodedTexts([1, 2, 3, 9, 1, 9], (1.0,), 0, {}, (4, 2))
    truncated = row.truncated(3)
    assert truncated is not None
    assert [text.input_ids for text in truncated.sequences] == [[1, 2, 9], [1, 9]]
    assert truncated.length == 3


@pytest.mark.parametrize("end", [None, 2])
def test_truncation_without_end_token_cuts_last_tokens(end: int | None) -> None:
    encode = TextEncoder(llama_tokenizer(), "", "", end)
    (row,) = encode([EmbeddingRow("the cat is old", 0, ("a dog",), (1.0,))])
    (document,) = encode.documents(["the cat is old"])
    for text in (row.sequences[0], document):
        expected = text.input_ids[:2] + ([text.input_ids[2]] if end is None else [end])
        assert text.truncated(3).input_ids == expected
    assert row.truncated(3).sequences[0].input_ids == expected


def _row(index: int, *texts: list[int]) -> Encoded:
    sizes = tuple(map(len, texts))
    return EncodedTexts([t for text in texts for t in text], (1.0,), index, {}, sizes)


def test_distinct_texts_are_embedded_once() -> None:
    rows = [_row(0, [1, 2], [3]), _row(1, [3], [1, 2]), _row(-1, [5], [6])]
    texts, step = distinct_texts(rows)
    assert [text.input_ids for text in texts] == [[1, 2], [3]]
    assert step.texts == ((0, 1), (1, 0))


def test_step_contains_no_text_twice() -> None:
    rows = [_row(i, [i // 2], [100 + i]) for i in range(16)]  # every query has two rows
    order = list(DistinctTextSampler(rows, 4, seed=3))
    assert sorted(order) == list(range(16))
    for start in range(0, 16, 4):
        queries = [rows[index].input_ids[0] for index in order[start : start + 4]]
        assert len(set(queries)) == len(queries)


def test_order_depends_on_seed_and_epoch_only() -> None:
    rows = [_row(i, [i], [100 + i]) for i in range(16)]
    first, second = DistinctTextSampler(rows, 4, 3), DistinctTextSampler(rows, 4, 3)
    assert list(first) == list(second)
    first.epoch = 1
    assert list(first) != list(second)


@pytest.mark.parametrize("is_distinct", [True, False])
def test_step_contains_rows_of_one_dataset(is_distinct: bool) -> None:
    """11 and 5 rows in steps of 4 are 3 and 2 steps; index 16 pads the short steps."""
    rows = [_row(i, [i // 2], [100 + i]) for i in range(16)]
    sets = [int(i % 3 == 1) for i in range(16)]
    sampler = DistinctTextSampler(rows, 4, 3, sets, is_distinct=is_distinct)
    set_orders = set()
    for sampler.epoch in range(4):
        order = list(sampler)
        assert len(order) == len(sampler) == 20
        assert sorted(order) == [*range(16), *[16] * 4]
        steps = [[row for row in order[start : start + 4] if row < 16] for start in range(0, 20, 4)]
        assert all(len({sets[row] for row in step}) == 1 for step in steps)
        set_orders.add(tuple(sets[step[0]] for step in steps))
        if is_distinct:
            repeats = sum(len(step) - len({row // 2 for row in step}) for step in steps)
            assert repeats <= sampler.repeated <= 2
    assert len(set_orders) > 1


def test_unavoidable_repeats_are_counted() -> None:
    rows = [_row(i, [0], [100 + i]) for i in range(4)] + [
        _row(i, [i], [i + 50]) for i in range(4, 8)
    ]
    sampler = DistinctTextSampler(rows, 4, 3)
    assert sorted(sampler) == list(range(8))
    assert sampler.repeated > 0


def test_search_for_distinct_rows_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps, although most rows repeat a text; no search passes over all the others."""
    read: list[int] = []

    class CountingDeque(deque[int]):
        def popleft(self) -> int:
            read.append(super().popleft())
            return read[-1]

    monkeypatch.setattr("ftlevel.extras.retrieval.batches.deque", CountingDeque)
    monkeypatch.setattr("ftlevel.extras.retrieval.batches.LOOKAHEAD", 10)
    rows = [_row(i, [0 if i % 50 else i], [1_000 + i]) for i in range(1_000)]
    assert sorted(DistinctTextSampler(rows, 4, 3)) == list(range(1_000))
    assert len(read) <= 250 * (10 + 4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_saved_tokenizer_appends_pooled_token(family: str, tmp_path: Path) -> None:
    """Other libraries load the tokenizer from the model's directory."""
    tokenizer = build_tokenizer(family)
    before = tokenizer("a cat")["input_ids"]
    append_end(tokenizer, tokenizer.eos_token_id)
    append_end(tokenizer, tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a cat")["input_ids"] == [*before, tokenizer.eos_token_id]
    assert (
        loaded("a cat", add_special_tokens=False)["input_ids"]
        == tokenizer("a cat", add_special_tokens=False)["input_ids"]
    )


def test_texts_are_lowercased_for_a_tokenizer_that_keeps_case(tmp_path: Path) -> None:
    """As sentence-transformers does for a model with do_lower_case."""
    tokenizer = build_tokenizer("roberta")
    assert tokenizer("The CAT")["input_ids"] != tokenizer("the cat")["input_ids"]
    expected = tokenizer("the cat")["input_ids"]
    lowercase(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)  # without a normalizer
    for own in (tokenizer, loaded):
        lowercase(own)
        assert own("The CAT")["input_ids"] == expected
        assert own.backend_tokenizer.normalizer.normalize_str("The CAT") == "the cat"
