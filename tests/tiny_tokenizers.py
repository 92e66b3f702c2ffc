"""Small real tokenizers for every model family, trained on Python's docstrings.

Each family has the class, special tokens and settings of its well-known checkpoint: GPT-2 and Llama
have no pad token, Qwen's end of turn is not its pad token, Phi-3 stops at several tokens, RoBERTa
and BART end with `</s>`, OPT begins with it.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import logging
import pathlib
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BASE_VOCAB = 400  # pieces from training, without special tokens and byte tokens
MAX_LENGTH = 512

CHATML, GEMMA_TEMPLATE, PHI3_TEMPLATE, LLAMA_TEMPLATE = (
    (pathlib.Path(__file__).parent / f"chat_templates/tiny-{name}.jinja").read_text("utf-8")[:-1]
    for name in ("chatml", "gemma", "phi3", "llama")
)


@cache
def corpus() -> tuple[str, ...]:
    """Return lines of docstrings of Python's standard library."""
    texts = []
    for module in (argparse, collections, inspect, json, logging, pathlib, subprocess):
        members = sorted(inspect.getmembers(module, callable), key=lambda pair: pair[0])
        texts += [inspect.getdoc(value) or "" for _, value in members]
    texts += [" ".join(map(str, range(0, 2030, 7))), "".join(map(chr, range(32, 127)))]
    return tuple(dict.fromkeys(line for text in texts for line in text.splitlines() if line))


def _train(tokenizer: Tokenizer, trainer: trainers.Trainer) -> dict[str, Any]:
    tokenizer.train_from_iterator(corpus(), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [(left, right) for left, right in model["merges"]]


def _pieces(model: dict[str, Any]) -> list[str]:
    return sorted(model["vocab"], key=model["vocab"].__getitem__)


@cache
def byte_level() -> dict[str, Any]:
    """Train a byte-level BPE, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=BASE_VOCAB + 100, initial_alphabet=alphabet, show_progress=False
        ),
    )


@cache
def metaspace() -> dict[str, Any]:
    """Train a BPE on words that begin with a visible space, as in Llama."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _train(tokenizer, trainers.BpeTrainer(vocab_size=BASE_VOCAB, show_progress=False))


@cache
def wordpiece() -> dict[str, Any]:
    """Train a WordPiece on lower-cased words, as in BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = transformers.BertTokenizer().backend_tokenizer.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=BASE_VOCAB, show_progress=False)
    model = _train(tokenizer, trainer)
    # The ids of pieces that continue a word differ from one training to the next.
    return model | {"vocab": _vocabulary((), sorted(model["vocab"]))}


@cache
def unigram() -> tuple[tuple[str, float], ...]:
    """Train a Unigram model on words that begin with a visible space, as in T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=BASE_VOCAB, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    vocab = _train(tokenizer, trainer)["vocab"]
    # Scores are rounded because their last digits, and so the order of ties, can vary.
    pieces = ((piece, round(score, 2)) for piece, score in vocab if piece != "<unk>")
    return tuple(sorted(pieces, key=lambda pair: (-pair[1], pair[0])))


def _vocabulary(
    leading: Sequence[str], pieces: Sequence[str], trailing: Sequence[str] = ()
) -> dict[str, int]:
    return {piece: index for index, piece in enumerate([*leading, *pieces, *trailing])}


def _byte_level_parts(leading: Sequence[str], trailing: Sequence[str] = ()) -> dict[str, Any]:
    model = byte_level()
    return {"vocab": _vocabulary(leading, _pieces(model), trailing), "merges": _merges(model)}


def _metaspace_parts(leading: Sequence[str], trailing: Sequence[str] = ()) -> dict[str, Any]:
    model = metaspace()
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    return {
        "vocab": _vocabulary([*leading, *raw_bytes], _pieces(model), trailing),
        "merges": _merges(model),
    }


def _unigram_parts(leading: Sequence[str], trailing: Sequence[str] = ()) -> list[tuple[str, float]]:
    return [*((token, 0.0) for token in leading), *unigram(), *((token, 0.0) for token in trailing)]


def bert_tokenizer(name: str = "BertTokenizer") -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return getattr(transformers, name)(vocab=_vocabulary(special, _pieces(wordpiece())))


def roberta_tokenizer() -> Any:
    parts = _byte_level_parts(["<s>", "<pad>", "</s>", "<unk>"], ["<mask>"])
    return transformers.RobertaTokenizer(**parts)


def albert_tokenizer() -> Any:
    leading = ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]
    return transformers.AlbertTokenizer(vocab=_unigram_parts(leading))


def deberta_tokenizer() -> Any:
    vocab = _unigram_parts(["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ["[MASK]"])
    return transformers.DebertaV2Tokenizer(vocab=vocab, unk_id=3)


def modernbert_tokenizer() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.BPE(**_byte_level_parts(special)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def gpt2_tokenizer() -> Any:
    return transformers.GPT2Tokenizer(**_byte_level_parts([], ["<|endoftext|>"]))


def gpt_neox_tokenizer() -> Any:
    parts = _byte_level_parts(["<|endoftext|>", "<|padding|>"])
    return transformers.GPTNeoXTokenizer(**parts)


def opt_tokenizer() -> Any:
    return transformers.GPT2Tokenizer(
        **_byte_level_parts(["<s>", "<pad>", "</s>", "<unk>"]),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


def llama_tokenizer() -> Any:
    parts = _metaspace_parts(["<unk>", "<s>", "</s>"])
    return transformers.LlamaTokenizer(**parts, add_bos_token=True)


def phi3_tokenizer() -> Any:
    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"]
    parts = _metaspace_parts(["<unk>", "<s>", "</s>"], turns)
    backend = transformers.LlamaTokenizer(**parts, add_bos_token=False).backend_tokenizer
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=turns[1:],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def qwen_tokenizer() -> Any:
    turns = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        **_byte_level_parts([], turns),
        eos_token="<|im_end|>",
        additional_special_tokens=turns[1:],
    )


def gemma_tokenizer() -> Any:
    turns = ["<start_of_turn>", "<end_of_turn>"]
    parts = _metaspace_parts(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], turns)
    return transformers.GemmaTokenizer(**parts, add_bos_token=True, additional_special_tokens=turns)


def t5_tokenizer() -> Any:
    return transformers.T5Tokenizer(vocab=_unigram_parts(["<pad>", "</s>", "<unk>"]), extra_ids=100)


BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": bert_tokenizer,
    "roberta": roberta_tokenizer,
    "distilbert": lambda: bert_tokenizer("DistilBertTokenizer"),
    "electra": bert_tokenizer,
    "albert": albert_tokenizer,
    "deberta-v2": deberta_tokenizer,
    "modernbert": modernbert_tokenizer,
    "gpt2": gpt2_tokenizer,
    "gpt_neo": gpt2_tokenizer,
    "gpt_neox": gpt_neox_tokenizer,
    "opt": opt_tokenizer,
    "llama": llama_tokenizer,
    "mistral": llama_tokenizer,
    "qwen2": qwen_tokenizer,
    "qwen3": qwen_tokenizer,
    "gemma3_text": gemma_tokenizer,
    "phi3": phi3_tokenizer,
    "mixtral": llama_tokenizer,
    "qwen3_moe": qwen_tokenizer,
    "t5": t5_tokenizer,
    "mt5": t5_tokenizer,
    "bart": roberta_tokenizer,
}

# Families whose well-known checkpoint is a chat model, and templates for chat variants of others.
DEFAULT_CHAT_TEMPLATES = {
    "qwen2": CHATML,
    "qwen3": CHATML,
    "qwen3_moe": CHATML,
    "gemma3_text": GEMMA_TEMPLATE,
    "phi3": PHI3_TEMPLATE,
}
OPTIONAL_CHAT_TEMPLATES = {
    "llama": LLAMA_TEMPLATE,
    "mistral": LLAMA_TEMPLATE,
    "mixtral": LLAMA_TEMPLATE,
}


def build_tokenizer(family: str, chat: bool | None = None) -> Any:
    """Return a fresh tokenizer of `family`.

    Args:
        family: a key of `MAKERS`.
        chat: whether to add a chat template; None follows the family's well-known checkpoint.
    """
    tokenizer = BUILDERS[family]()
    tokenizer.model_max_length = MAX_LENGTH
    has_chat_template = family in DEFAULT_CHAT_TEMPLATES if chat is None else chat
    if has_chat_template:
        tokenizer.chat_template = {**DEFAULT_CHAT_TEMPLATES, **OPTIONAL_CHAT_TEMPLATES}[family]
    return tokenizer


def as_sentencepiece(tokenizer: Any) -> Any:
    """Return `tokenizer` (mutated) with the merges of an equivalent SentencePiece model.

    SentencePiece joins any two neighbors whose concatenation is a piece, so each piece has a merge
    for every split into two pieces, not only for that found in training.
    """
    serialized = json.loads(tokenizer.backend_tokenizer.to_str())
    model = serialized["model"]
    added = {token["content"] for token in serialized["added_tokens"]}
    vocabulary = {piece for piece in model["vocab"] if piece not in added and piece[:3] != "<0x"}
    model["merges"] = [
        (piece[:split], piece[split:])
        for piece in dict.fromkeys("".join(pair) for pair in model["merges"])
        for split in range(1, len(piece))
        if piece[:split] in vocabulary and piece[split:] in vocabulary
    ]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(serialized))
    return tokenizer
