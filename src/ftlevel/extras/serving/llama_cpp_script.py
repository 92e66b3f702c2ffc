"""Run llama.cpp through xllamacpp: python llama_cpp_script.py REQUEST.json RESULT.json.

Must not import ftlevel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a JSON request from file argv[1]; write answers or embeddings to file argv[2].

    The KV cache is float32, because the base's weights may be.
    """
    import xllamacpp

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answered: dict[str, Any] = {}
    if "texts" in request:
        answered["vectors"] = _embed(request)
    for adapter in request.get("adapters", ()):
        params = _params(request)
        if adapter["place"]:
            lora = xllamacpp.CommonAdapterLoraInfo()
            lora.path, lora.scale = adapter["place"], 1.0
            params.lora_adapters = [lora]
        server = xllamacpp.Server(params)
        answered[adapter["name"]] = [
            _answer(server, ids, request["tokens"]) for ids in adapter["prompts"]
        ]
        del server
    Path(sys.argv[2]).write_text(json.dumps(answered), encoding="utf-8")


def _params(request: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["base"]
    params.n_ctx, params.n_parallel, params.warmup = request["length"], 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    return params


def _embed(request: dict[str, Any]) -> list[list[float]]:
    import xllamacpp

    params = _params(request)
    params.embedding = True
    rows = xllamacpp.Server(params).handle_embeddings({"input": request["texts"]})["data"]
    return [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]


def _answer(server: Any, ids: list[int], tokens: int) -> dict[str, Any]:
    body = {
        "prompt": ids,
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": 1,
        "cache_prompt": False,
    }
    choice = server.handle_completions(body)["choices"][0]
    rows = choice["logprobs"]["content"]
    return {
        "text": choice["text"],
        "ids": [row["id"] for row in rows],
        "logprobs": [row["logprob"] for row in rows],
    }


if __name__ == "__main__":
    main()
