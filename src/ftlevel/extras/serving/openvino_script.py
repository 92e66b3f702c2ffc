"""Run OpenVINO GenAI: python openvino_script.py REQUEST.json RESULT.json.

Must not import ftlevel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def main() -> None:
    """Read a JSON request from file argv[1]; write answers or embeddings to file argv[2].

    Computes in float32. A model in transformers' format is first converted to OpenVINO's.
    """
    import openvino_genai as genai

    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    base = Path(request["base"])
    if not (base / "openvino_model.xml").is_file():
        kind = "feature-extraction" if "texts" in request else "text-generation-with-past"
        base = _write_openvino(base, Path(sys.argv[2]).with_name("openvino"), kind)
    if "texts" in request:
        vectors = _embed(base, Path(request["base"]), request)
        Path(sys.argv[2]).write_text(json.dumps({"vectors": vectors}), encoding="utf-8")
        return
    answered: dict[str, Any] = {}
    every, adapters = genai.AdapterConfig(), {}
    for adapter in request["adapters"]:
        if adapter["place"]:
            try:
                file = str(Path(adapter["place"], "adapter_model.safetensors"))
                adapters[adapter["name"]] = genai.Adapter(file)
            except Exception as error:  # noqa: BLE001 - any error while loading an adapter
                answered[adapter["name"]] = f"{type(error).__name__}: {error}"
                continue
            every.add(adapters[adapter["name"]], 1.0)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    # The pipeline silently ignores adapters that it was not constructed with.
    answers = {"adapters": every} if adapters else {}
    pipeline = genai.ContinuousBatchingPipeline(
        str(base),
        scheduler,
        "CPU",
        {**_FLOAT32, "INFERENCE_NUM_THREADS": request["threads"], **answers},
    )
    for adapter in request["adapters"]:
        if adapter["name"] not in answered:
            answered[adapter["name"]] = _answers(
                pipeline, adapters.get(adapter["name"]), adapter["prompts"], request["tokens"]
            )
    Path(sys.argv[2]).write_text(json.dumps(answered), encoding="utf-8")


def _embed(converted: Path, model: Path, request: dict[str, Any]) -> list[list[float]]:
    """Returns the embeddings of the texts in `request`, pooled as the model's files specify."""
    import openvino_genai as genai

    modes = json.loads((model / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    config = genai.TextEmbeddingPipeline.Config()
    for name, key in (("CLS", "cls_token"), ("MEAN", "mean_tokens"), ("LAST_TOKEN", "lasttoken")):
        if modes.get(f"pooling_mode_{key}"):
            config.pooling_type = getattr(genai.TextEmbeddingPipeline.PoolingType, name)
    config.normalize = "Normalize" in (model / "modules.json").read_text(encoding="utf-8")
    pipeline = genai.TextEmbeddingPipeline(
        str(converted), "CPU", config, **{"INFERENCE_PRECISION_HINT": "f32"}
    )
    return [list(vector) for vector in pipeline.embed_documents(request["texts"])]


def _write_openvino(model: Path, directory: Path, kind: str) -> Path:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        str(model),
        directory,
        task=kind,
        local_files_only=True,
        ov_config=OVConfig(dtype="fp32"),
        convert_tokenizer=True,
        library_name="transformers",
    )
    return directory


def _answers(pipeline: Any, own: Any, prompts: list[list[int]], count: int) -> list[dict[str, Any]]:
    """Returns answers of up to `count` tokens with the adapter `own` (None: the base).

    `generate` returns one log-probability per answer, so each token is generated again from the
    tokens before. `add_request` returns one per token, but uses the adapters of the last call of
    `generate` (2026.4.1).
    """
    answers = _generate(pipeline, own, prompts, count)
    before = [
        [*ids, *answer[:length]]
        for ids, (answer, _) in zip(prompts, answers, strict=True)
        for length in range(len(answer))
    ]
    scores = iter(_generate(pipeline, own, before, 1) if before else [])
    tokenizer = pipeline.get_tokenizer()
    return [
        {
            "text": tokenizer.decode(answer),
            "ids": answer,
            "logprobs": [next(scores)[1] for _ in answer],
        }
        for answer, _ in answers
    ]


def _generate(
    pipeline: Any, own: Any, prompts: list[list[int]], count: int
) -> list[tuple[list[int], float]]:
    """Returns, for each prompt, up to `count` greedy tokens and their log-probability."""
    import numpy
    import openvino
    import openvino_genai as genai

    expected = pipeline.get_config()
    expected.max_new_tokens, expected.do_sample, expected.logprobs = count, False, 1
    expected.apply_chat_template = False
    expected.adapters = genai.AdapterConfig() if own is None else genai.AdapterConfig(own, 1.0)
    request = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
    outputs = pipeline.generate(request, [expected] * len(request))
    return [(list(one.m_generation_ids[0]), float(one.m_scores[0])) for one in outputs]


if __name__ == "__main__":
    main()
