"""Tests of tokenizers that llama.cpp supports, and of errors for those it does not."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from ftlevel.errors import InputError
from ftlevel.extras.serving import gguf_vocabulary as gguf
from ftlevel.extras.serving.gguf_vocabulary import load_vocab
from tiny_tokenizers import as_sentencepiece, build_tokenizer

SIZE = 704
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def create_tokenizer(*steps: Any, family: str = "gpt2") -> Any:
    """Return a byte-level tokenizer with the pre-tokenization `steps`."""
    tokenizer = build_tokenizer(family)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


DIGITS = pre_tokenizers.Digits(individual_digits=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def create_llama_3_tokenizer() -> Any:
    tokenizer = create_tokenizer(pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES_ONLY)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (build_tokenizer("gpt2"), "gpt-2"),
        (build_tokenizer("qwen2"), "qwen2"),
        (create_tokenizer(DIGITS, BYTES), "smollm"),
        (create_llama_3_tokenizer(), "llama-bpe"),
    ],
)
def test_pre_tokenizer_is_recognized_by_its_steps(tokenizer, name):
    vocabulary = load_vocab(tokenizer, SIZE)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", name)
    assert vocabulary.scores is None
    assert vocabulary.merges is not None
    keys = vocabulary.metadata()
    assert keys["tokenizer.ggml.pre"] == name
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.token_type"]) == SIZE


def test_wordpiece_tokens_mark_word_starts():
    tokenizer = build_tokenizer("bert")
    vocabulary = load_vocab(tokenizer, SIZE)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for piece, token in zip(pieces, vocabulary.tokens, strict=False):
        if piece.startswith("##"):
            assert token == piece[2:]
        else:
            assert token == (piece if piece[0] + piece[-1] == "[]" else "\u2581" + piece)
    keys = vocabulary.metadata()
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.cls_token_id
    assert keys["tokenizer.ggml.seperator_token_id"] == tokenizer.sep_token_id  # ggml's spelling
    assert (
        keys["tokenizer.ggml.normalizer.lowercase"]
        == keys["tokenizer.ggml.normalizer.strip_accents"]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="but not with BERT's steps"):
        load_vocab(tokenizer, SIZE)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (
            create_tokenizer(pre_tokenizers.Digits(individual_digits=False), BYTES),
            "'individual_digits'",
        ),
        (
            create_tokenizer(pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated"), BYTES_ONLY),
            "{1,2}",
        ),
        (create_tokenizer(BYTES, DIGITS), "not known here"),
        (
            create_tokenizer(pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES_ONLY),
            "ignore_merges",
        ),
        (build_tokenizer("t5"), "of type Unigram"),
        (build_tokenizer("llama"), "not those of a SentencePiece model"),
    ],
)
def test_unsupported_tokenizer_raises(tokenizer, message):
    with pytest.raises(InputError, match=message.replace("{", r"\{").replace("'", '"')):
        load_vocab(tokenizer, SIZE)


def test_unsupported_normalizer_raises():
    tokenizer = build_tokenizer("gpt2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="normalizer Lowercase"):
        load_vocab(tokenizer, SIZE)


def test_tokenizer_larger_than_embedding_raises():
    with pytest.raises(InputError, match="a token of id 500, and the model's embedding has 500"):
        load_vocab(build_tokenizer("gpt2"), 500)


def test_token_types_and_special_tokens():
    tokenizer = as_sentencepiece(build_tokenizer("gemma3_text"))
    tokenizer.add_tokens(["\u2581\u2581x"])  # not special: matched before spaces are replaced
    vocabulary = load_vocab(tokenizer, SIZE)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert vocabulary.model == "llama"
    assert kinds["<bos>"] == kinds["<end_of_turn>"] == gguf.CONTROL
    assert kinds["<unk>"] == gguf.UNKNOWN
    assert kinds["<0x0A>"] == gguf.BYTE
    assert kinds["  x"] == gguf.USER_DEFINED
    assert kinds["e"] == gguf.NORMAL
    assert kinds[f"[PAD{SIZE - 1}]"] == gguf.UNUSED
    assert vocabulary.special == {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    assert vocabulary.flags == {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_space_prefix": False,
    }


def test_scores_decrease_in_merge_order():
    tokenizer = as_sentencepiece(build_tokenizer("llama"))
    vocabulary = load_vocab(tokenizer, SIZE)
    assert vocabulary.scores is not None
    model = gguf.json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    order = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert [scores[token] for token in order] == [-float(rank) for rank in range(len(order))]
    assert scores["<s>"] < scores[order[-1]]
    assert len(vocabulary.notes) == 2, "Metaspace prepends at the beginning only"


def test_separated_merges_of_a_token_raise():
    tokenizer = as_sentencepiece(build_tokenizer("llama"))
    serialized = gguf.json.loads(tokenizer.backend_tokenizer.to_str())
    merges = serialized["model"]["merges"]
    index = next(i for i, (a, b) in enumerate(merges) if a + b == "".join(merges[i + 1]))
    merges.append(merges.pop(index))
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(gguf.json.dumps(serialized))
    with pytest.raises(InputError, match="are apart"):
        load_vocab(tokenizer, SIZE)
