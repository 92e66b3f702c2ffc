"""Compare a server's embeddings with those recorded when its files were exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.errors import InputError, RunError
from ftlevel.extras.serving.client import Client, RequestRefusedError
from ftlevel.extras.serving.config import CheckServedConfig
from ftlevel.extras.serving.recorded import served_path

_BOUND = 1e-3
_COARSE = {"q8_0": 1e-2, "q5_0": 5e-2, "q4_0": 1e-1}
"""Largest 1 - cosine by the type of a .gguf file, whose activations llama.cpp rounds as well."""


def read_vectors(out: Path) -> dict[str, Any] | None:
    """Read the recorded embeddings of the export at `out`; None if it is no embedding model."""
    path = served_path(out)
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return record if record.get("type") == "embeddings" else None


def check_vectors(config: CheckServedConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Return the cosine of each of the server's embeddings with the recorded one.

    Raises:
        InputError: `--in` is given, or the server returns no embeddings.
        RunError: an embedding differs from the trained model's.
    """
    if config.url is None:
        raise InputError(
            f"--in {config.inside}: {config.out} is an embedding model, which is checked on a "
            "server. Start it, and pass its address with --url."
        )
    client = Client(config.url, float(config.timeout))
    listed = client.models()
    name = config.model or (listed[0] if listed else config.out.stem)
    texts = [row["text"] for row in record["texts"]]
    try:
        heard = np.array(client.embed(name, texts), dtype=np.float64)
    except RequestRefusedError as refused:
        raise InputError(f"--url {config.url}: {refused}.") from None
    expected = np.array([row["vector"] for row in record["texts"]], dtype=np.float64)
    if heard.shape != expected.shape:
        raise RunError(
            f"the server's embeddings have shape {heard.shape}, and those of training "
            f"{expected.shape}. Does it serve {config.out}?"
        )
    norms = np.linalg.norm(heard, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (heard * expected).sum(1) / norms
    bound = config.tolerance or _COARSE.get(str(record["dtype"]), _BOUND)
    if not cosines.min() >= 1 - bound:
        raise RunError(
            f"the server's embeddings are not those of training: cosine {cosines.min():.4f} for "
            f"{texts[int(cosines.argmin())]!r}, expected at least {1 - bound:.4f}. Check its "
            "pooling, and that it applies no prompt by default."
        )
    return {"texts": len(texts), "min_cosine": float(cosines.min()), "bound": 1 - bound}
