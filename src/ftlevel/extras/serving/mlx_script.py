"""Run mlx-lm: python mlx_script.py REQUEST.json RESULT.json. Must not import ftlevel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a JSON request from file argv[1]; write answers, in float32, to file argv[2]."""
    import mlx.core as mx
    from mlx_lm import load

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answered: dict[str, Any] = {}
    for adapter in request["adapters"]:
        try:
            model, tokenizer = load(request["base"], adapter_path=adapter["place"] or None)
        except Exception as error:  # noqa: BLE001 - any error while loading an adapter
            answered[adapter["name"]] = f"{type(error).__name__}: {error}"
            continue
        model.set_dtype(mx.float32)
        answered[adapter["name"]] = [
            _answer(model, tokenizer, ids, request["tokens"]) for ids in adapter["prompts"]
        ]
    Path(sys.argv[2]).write_text(json.dumps(answered), encoding="utf-8")


def _answer(model: Any, tokenizer: Any, ids: list[int], count: int) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, step = make_prompt_cache(model), mx.array([ids])
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < count:
        row = model(step, cache=cache)[0, -1]
        row = row - mx.logsumexp(row)
        tokens.append(int(mx.argmax(row).item()))
        logprobs.append(float(row[tokens[-1]].item()))
        if tokens[-1] in tokenizer.eos_token_ids:
            break
        step = mx.array([[tokens[-1]]])
    return {"text": tokenizer.decode(tokens), "ids": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main()
