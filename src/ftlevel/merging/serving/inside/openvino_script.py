"""OpenVINO GenAI: python openvino_script.py ASKED.json ANSWERED.json. Knows nothing of ftlevel."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

PRECISE = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def main() -> None:
    """Answer every prompt by every adapter, in float32."""
    import openvino_genai as genai
    from transformers import AutoTokenizer

    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answered: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="openvino-base-") as folder:
        base = asked["base"]
        tokenizer = AutoTokenizer.from_pretrained(base)
        if not (Path(base) / "openvino_model.xml").is_file():
            base = _convert(base, folder)
        for adapter in asked["adapters"]:
            more: dict[str, Any] = {}
            try:
                if adapter["place"]:
                    file = str(Path(adapter["place"]) / "adapter_model.safetensors")
                    more["adapters"] = genai.AdapterConfig(genai.Adapter(file), 1.0)
                pipe = genai.ContinuousBatchingPipeline(
                    base, genai.SchedulerConfig(), "CPU", {**PRECISE, **more}
                )
                answered[adapter["name"]] = [
                    _answer(pipe, tokenizer, ids, asked["tokens"], more)
                    for ids in adapter["prompts"]
                ]
            except Exception as error:  # noqa: BLE001 - whatever it refuses an adapter by
                answered[adapter["name"]] = f"{type(error).__name__}: {error}"
    Path(sys.argv[2]).write_text(json.dumps(answered), encoding="utf-8")


def _convert(base: str, folder: str) -> str:
    """Write the base in OpenVINO's own format, in float32."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(base, output=folder, task="text-generation-with-past", library_name="transformers",
                ov_config=OVConfig(dtype="fp32"))  # fmt: skip
    return folder


def _answer(
    pipe: Any, tokenizer: Any, ids: list[int], count: int, more: dict[str, Any]
) -> dict[str, Any]:
    import numpy as np
    import openvino
    import openvino_genai as genai

    greedy = genai.GenerationConfig()
    greedy.max_new_tokens, greedy.do_sample, greedy.logprobs = count, False, 1
    if "adapters" in more:  # a request that names none is answered by the base
        greedy.adapters = more["adapters"]
    if tokenizer.eos_token_id is not None:
        greedy.eos_token_id = tokenizer.eos_token_id
    asked = openvino.Tensor(np.array([ids], dtype=np.int64))
    handle = pipe.add_request(0, asked, greedy)
    while pipe.has_non_finished_requests():
        pipe.step()
    (found,) = handle.read_all()
    tokens = list(found.generated_ids)
    logprobs = [float(value) for value in found.generated_log_probs]
    return {"text": tokenizer.decode(tokens), "ids": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main()
