"""Tests that the embedding format of a Hub model is read like that of a local directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ftlevel.extras.retrieval.config import EmbeddingConfig
from ftlevel.extras.retrieval.embedding import TASKS
from ftlevel.extras.retrieval.sentence_transformers import (
    FILES,
    EmbeddingFormat,
    save_embedding_format,
)
from ftlevel.models.sources import ModelSource
from tiny_tokenizers import build_tokenizer


def _load_format(source: ModelSource) -> EmbeddingFormat:
    task, _ = TASKS[0].for_model(source, "encoder", 64, build_tokenizer("bert"), 8)
    return task.format  # type: ignore[attr-defined]


def test_max_length_of_version_6_is_read_from_tokenizer(tmp_path: Path) -> None:
    save_embedding_format(tmp_path, EmbeddingFormat(), 64)
    tokenizer, source = build_tokenizer("bert"), ModelSource("m", "directory", str(tmp_path))
    for length, expected in ((32, 32), (10**30, None)):
        tokenizer.model_max_length = length
        task, _ = TASKS[0].for_model(source, "encoder", 64, tokenizer, 8)
        assert task.format.max_length == expected  # type: ignore[attr-defined]
        card = TASKS[0].card_defaults(source, None, tokenizer, "encoder")
        assert card["options"]["embedding"]["form"]["max_length"] == expected


@pytest.mark.parametrize(("family", "expected"), [("bert", False), ("roberta", True)])
def test_do_lower_case_lowercases_texts_of_cased_tokenizer(
    family: str, expected: bool, tmp_path: Path
) -> None:
    save_embedding_format(tmp_path, EmbeddingFormat(max_length=64, lowercase=True), 64)
    tokenizer, source = build_tokenizer(family), ModelSource("m", "directory", str(tmp_path))
    lower = tokenizer("the cat")["input_ids"]
    task, _ = TASKS[0].for_model(source, "encoder", 64, tokenizer, 8)
    assert task.format.lowercase is expected  # type: ignore[attr-defined]
    assert tokenizer("The CAT")["input_ids"] == lower


@pytest.mark.parametrize(
    ("own", "flags", "has_end"),
    [(None, {}, True), ("mean", {}, False), ("mean", {"pooling": "last"}, True),
     ("last", {}, False), ("last", {"pooling": "last"}, False)],
)  # fmt: skip
def test_eos_is_appended_only_to_texts_of_bare_decoder(
    own: str | None, flags: dict[str, Any], has_end: bool, tmp_path: Path
) -> None:
    """A SentenceTransformer pools the last token of its tokenizer."""
    if own is not None:
        save_embedding_format(tmp_path, EmbeddingFormat(own, True), 64)
    tokenizer, source = build_tokenizer("llama"), ModelSource("m", "directory", str(tmp_path))
    expected = tokenizer("the cat")["input_ids"] + [tokenizer.eos_token_id] * has_end
    card = TASKS[0].card_defaults(source, None, tokenizer, "decoder")
    task = replace(TASKS[0], config=EmbeddingConfig(**flags))
    task, _ = task.for_model(source, "decoder", 64, tokenizer, 8)
    assert (task.end is not None) is has_end  # type: ignore[attr-defined]
    assert tokenizer("the cat")["input_ids"] == expected
    if not flags:
        assert card["options"]["embedding"]["end"] == task.end  # type: ignore[attr-defined]


def test_only_small_files_of_hub_model_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_embedding_format(tmp_path, EmbeddingFormat("cls", True, query_prompt="query: "), 64)
    calls: list[dict[str, Any]] = []

    def download(repo: str, **arguments: Any) -> str:
        calls.append({"repo": repo, **arguments})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    embedding_format = _load_format(ModelSource("me/model", "hub", "me/model", revision="abc"))
    assert (embedding_format.pooling, embedding_format.query_prompt) == ("cls", "query: ")
    assert calls[0]["repo"] == "me/model"
    assert calls[0]["revision"] == "abc"
    assert calls[0]["allow_patterns"] == list(FILES)  # no weights

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert _load_format(ModelSource("me/model", "hub", "me/model")).pooling == "mean"
