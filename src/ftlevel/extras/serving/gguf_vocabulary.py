"""Convert a fast tokenizer to the metadata of a .gguf file.

The file has tokens, merges or scores, and the name of a pre-tokenizer that llama.cpp implements.
The steps in tokenizer.json must equal those of a known name, else the tokenizer is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftlevel.errors import InputError, join_names

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
READ_BY_TRANSFORMERS = ("gpt-2", "llama-bpe", "qwen2")
"""Pre-tokenizers that transformers' GGUF reader implements, too."""


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer that llama.cpp has a name for.

    `steps` are those of tokenizer.json without irrelevant keys, `whole_words` is its
    `ignore_merges`. `normalizers` are the allowed ones; llama.cpp skips NFC.
    """

    steps: Sequence[Mapping[str, Any]]
    whole_words: bool = False
    normalizers: tuple[str | None, ...] = (None,)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer([_BYTES | {"use_regex": True}]),
    "smollm": PreTokenizer(
        [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}]
    ),
    "qwen2": PreTokenizer(
        [_split(_WORDS % ""), _BYTES | {"use_regex": False}], normalizers=(None, "NFC")
    ),
    "llama-bpe": PreTokenizer(
        [_split(_WORDS % "{1,3}"), _BYTES | {"use_regex": False}], whole_words=True
    ),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer metadata of a .gguf file.

    `model` is `gpt2` for byte-level BPE, `llama` for SentencePiece or `bert` for WordPiece. Tokens
    with higher `scores` are merged first. `special` maps `bos`, `eos`, `unknown` and `padding` to
    ids. `notes` are differences of llama.cpp that the file cannot express.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: Mapping[str, int]
    flags: Mapping[str, bool]
    chat_template: str | None
    notes: list[str]

    def metadata(self) -> dict[str, Any]:
        """Returns the tokenizer's metadata for the .gguf file, by key."""
        keys: dict[str, Any] = {
            "tokenizer.ggml.model": self.model,
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
        }
        if self.merges is not None:
            keys["tokenizer.ggml.merges"] = self.merges
        if self.scores is not None:
            keys["tokenizer.ggml.scores"] = self.scores
        keys |= {f"tokenizer.ggml.{name}_token_id": value for name, value in self.special.items()}
        keys |= {f"tokenizer.ggml.{name}": value for name, value in self.flags.items()}
        if self.chat_template is not None:
            keys["tokenizer.chat_template"] = self.chat_template
        return keys


def load_vocab(tokenizer: Any, size: int, end: int | None = None) -> Vocabulary:
    """Returns the GGUF metadata of `tokenizer` for a model with `size` embeddings.

    `end` is the id of the token that the tokenizer adds after each text; None for EOS. Raises
    InputError if llama.cpp does not support the tokenizer, or it has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which is where its steps are read. "
            "Save it as a fast tokenizer."
        )
    tokenizer_json: dict[str, Any] = json.loads(backend.to_str())
    model = tokenizer_json["model"]
    if model["type"] == "WordPiece":
        return _load_wordpiece(tokenizer, tokenizer_json, size)
    if model["type"] != "BPE":
        raise InputError(
            f"its tokenizer is of type {model['type']}, and ftlevel writes BPE and WordPiece."
        )
    added = {token["id"]: token for token in tokenizer_json["added_tokens"]}
    tokens, types = _tokens(tokenizer, model, added, size)
    notes = _strip_notes(added)
    special = _special(tokenizer) | ({} if end is None else {"eos": end})
    flags = _flags(tokenizer, special)
    merges: list[str] | None = None
    scores: list[float] | None = None
    if model["byte_fallback"]:
        kind, pre = "llama", "default"
        prefix, extra = _space_prefix(tokenizer_json)
        flags["add_space_prefix"], notes = prefix, [*notes, *extra]
        scores = _scores(model, tokens, types)
    else:
        kind, pre = "gpt2", _get_pre_tokenizer_name(tokenizer_json)
        merges = [" ".join(pair) for pair in _pairs(model)]
        notes += _normalizer_notes(tokenizer_json)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Vocabulary(kind, pre, tokens, types, merges, scores, special, flags, template, notes)


def _load_wordpiece(tokenizer: Any, tokenizer_json: Mapping[str, Any], size: int) -> Vocabulary:
    """Returns the vocabulary of a WordPiece tokenizer; raises InputError if it is not BERT's."""
    model, normalizer = tokenizer_json["model"], tokenizer_json["normalizer"] or {}
    lowercase = bool(normalizer.get("lowercase"))
    strip_accents = normalizer.get("strip_accents")
    strip_accents = lowercase if strip_accents is None else strip_accents
    ids = tokenizer("a")["input_ids"]
    if (
        normalizer.get("type") != "BertNormalizer"
        or not normalizer["handle_chinese_chars"]
        or _steps(tokenizer_json["pre_tokenizer"]) != [{"type": "BertPreTokenizer"}]
        or model["continuing_subword_prefix"] != "##"
        or (ids[0], ids[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ):
        raise InputError(
            "its tokenizer is WordPiece, but not with BERT's steps ([CLS] text [SEP], split at "
            "punctuation), which llama.cpp implements. Keep it with transformers."
        )
    added = {token["id"]: token for token in tokenizer_json["added_tokens"]}
    texts = _get_texts(model, added, size)
    tokens, types = [], []
    for index in range(size):
        text = texts.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]")
        elif index in added or (text.startswith("[") and text.endswith("]")):
            tokens.append(text)
        else:
            tokens.append(text[2:] if text.startswith("##") else SPACE + text)
        is_special = index in added and added[index]["special"]
        types.append(UNUSED if text is None else CONTROL if is_special else NORMAL)
    special = {
        "bos": tokenizer.cls_token_id,
        "cls": tokenizer.cls_token_id,
        "seperator": tokenizer.sep_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id,
    }
    flags = {"normalizer.lowercase": lowercase, "normalizer.strip_accents": strip_accents}
    special_ids = {name: index for name, index in special.items() if index is not None}
    cased = "versions of llama.cpp before normalizer.lowercase turn all texts into lower case"
    notes = [] if lowercase else [cased]
    return Vocabulary("bert", "default", tokens, types, None, None, special_ids, flags, None, notes)


def _get_texts(
    model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], size: int
) -> dict[int, str]:
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    if (largest := max(texts)) >= size:
        raise InputError(
            f"its tokenizer has a token of id {largest:,}, and the model's embedding has {size:,} "
            "rows. Is it the model's own tokenizer?"
        )
    return texts


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the merges as pairs of tokens; older files store a merge as one string."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def _tokens(
    tokenizer: Any, model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], size: int
) -> tuple[list[str], list[int]]:
    texts = _get_texts(model, added, size)
    tokens, types = [], []
    for index in range(size):
        text = texts.get(index)
        token_type = UNUSED
        if index in added:
            token_type = CONTROL if added[index]["special"] else USER_DEFINED
            if model["byte_fallback"]:
                # llama.cpp matches these before it replaces spaces.
                text = text.replace(SPACE, " ") if token_type == USER_DEFINED and text else text
                token_type = UNKNOWN if index == tokenizer.unk_token_id else token_type
        elif text is not None:
            is_byte = model["byte_fallback"] and re.fullmatch(r"<0x[0-9A-F]{2}>", text)
            token_type = BYTE if is_byte else NORMAL
        tokens.append(f"[PAD{index}]" if text is None else text)
        types.append(token_type)
    return tokens, types


def _special(tokenizer: Any) -> dict[str, int]:
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {name: index for name, index in ids.items() if index is not None}


def _flags(tokenizer: Any, special: Mapping[str, int]) -> dict[str, bool]:
    """Returns metadata flags for BOS and EOS; InputError if the tokenizer adds other tokens."""
    ids = tokenizer("a")["input_ids"]
    plain_ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = special.get("bos"), special.get("eos")
    added = {
        "add_bos_token": bos is not None and ids[:1] == [bos] and plain_ids[:1] != [bos],
        "add_eos_token": eos is not None and ids[-1:] == [eos] and plain_ids[-1:] != [eos],
    }
    if len(ids) - len(plain_ids) != sum(added.values()):
        raise InputError(
            f"its tokenizer puts {join_names(tokenizer.convert_ids_to_tokens(ids))} for 'a'; a "
            ".gguf file can only say whether a BOS comes before a text and an EOS after it."
        )
    return added


def _get_pre_tokenizer_name(tokenizer_json: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of the pre-tokenizer; InputError if llama.cpp lacks it."""
    model, steps = tokenizer_json["model"], _steps(tokenizer_json["pre_tokenizer"])
    normalizer = tokenizer_json["normalizer"] and tokenizer_json["normalizer"]["type"]
    for name, splittings in PRE_TOKENIZERS.items():
        if steps == list(splittings.steps):
            normalizers = splittings.normalizers
            if model["ignore_merges"] != splittings.whole_words or normalizer not in normalizers:
                raise InputError(
                    f"its tokenizer splits text like {name}, but ignore_merges is "
                    f"{model['ignore_merges']} and its normalizer {normalizer}; llama.cpp's "
                    f"{name} has {splittings.whole_words} and {join_names(map(str, normalizers))}."
                )
            return name
    raise InputError(
        "llama.cpp's name for how its tokenizer splits text is not known here: "
        f"{json.dumps(steps, ensure_ascii=False)}. A wrong name would split texts differently than "
        f"in training. Known: {', '.join(PRE_TOKENIZERS)}, and SentencePiece."
    )


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: v for key, v in step.items() if key != "trim_offsets"} for step in steps]


def _normalizer_notes(tokenizer_json: Mapping[str, Any]) -> list[str]:
    if tokenizer_json["normalizer"] is None:
        return []
    return ["llama.cpp does not compose characters (NFC): write é as one character, not as two"]


def _strip_notes(added: Mapping[int, Mapping[str, Any]]) -> list[str]:
    stripped = [t["content"] for t in added.values() if t["lstrip"] or t["rstrip"]]
    if not stripped:
        return []
    return [f"llama.cpp keeps spaces around {join_names(stripped, 3)}; the tokenizer drops them"]


def _space_prefix(tokenizer_json: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Returns whether a text gets a space before it, and notes on how llama.cpp differs."""
    steps, normalizers = (
        _steps(tokenizer_json["pre_tokenizer"]),
        _normalizers(tokenizer_json["normalizer"]),
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    gemma = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }  # no effect: the spaces are already replaced
    if normalizers == [prepend, replace] and not steps:
        return True, []
    if normalizers == [replace] and steps in ([], [gemma]):
        return False, []
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        step = steps[0]
        if step["replacement"] == SPACE and not step.get("split", True):
            return step["prepend_scheme"] != "never", _PREFIX_NOTES[step["prepend_scheme"]]
    raise InputError(
        "its tokenizer falls back to bytes as SentencePiece does, but its steps are not "
        f"SentencePiece's: {json.dumps([*normalizers, *steps], ensure_ascii=False)}."
    )


_AT_A_SPACE = "llama.cpp puts a space before a text that begins with one; the tokenizer does not"
_AFTER_SPECIAL = (
    "llama.cpp puts a space before text that follows a special token; the tokenizer does so at the "
    "beginning only"
)
_PREFIX_NOTES = {"never": [], "always": [_AT_A_SPACE], "first": [_AT_A_SPACE, _AFTER_SPECIAL]}


def _normalizers(normalizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if normalizer is None:
        return []
    return list(normalizer.get("normalizers", [normalizer]))


def _scores(model: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Returns the score of each token: minus the rank of the first merge that forms it.

    llama.cpp joins neighbors by score. InputError if that could differ from applying the merges.
    """
    rank: dict[str, int] = {}
    last = ""
    for left, right in _pairs(model):
        text = left + right
        if text != last and text in rank:
            raise InputError(_not_sentencepiece(f"the merges of {text!r} are apart"))
        rank.setdefault(text, len(rank))
        last = text
    merges = set(_pairs(model))
    single_tokens = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    missing = [
        (text[:cut], text[cut:])
        for text in single_tokens
        for cut in range(1, len(text))
        if text[:cut] in single_tokens
        and text[cut:] in single_tokens
        and (text[:cut], text[cut:]) not in merges
    ]
    if missing:
        first = " + ".join(map(repr, min(missing)))
        raise InputError(_not_sentencepiece(f"{len(missing):,} are missing, such as {first}"))
    minimum = float(-len(rank) - 1)
    return [float(-rank[text]) if text in rank else minimum for text in tokens]


def _not_sentencepiece(message: str) -> str:
    return (
        f"its merges are not those of a SentencePiece model ({message}), and llama.cpp would join "
        "tokens differently than in training."
    )
