"""Tests that the embedding format of a Hub model is read like that of a local directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ftlevel.artifacts.sentence_transformers import FILES, EmbeddingFormat, save_embedding_format
from ftlevel.models.sources import ModelSource
from ftlevel.tasks.embedding.task import TASKS
from tiny_tokenizers import build_tokenizer


def _load_format(source: ModelSource) -> EmbeddingFormat:
    task, _ = TASKS[0].for_model(source, "encoder", 64, build_tokenizer("bert"), 8)
    return task.format  # type: ignore[attr-defined]


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
