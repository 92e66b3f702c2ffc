"""`check-served`: query a server with recorded prompts and verify that it applies the adapter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from ftlevel.extras.serving.inside.process import run_library
from ftlevel.extras.serving.recorded import AdapterRecord, ServingRecord, read_served
from ftlevel.extras.serving.vectors import check_vectors, read_vectors
from ftlevel.workspace import Workspace

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
    alone = {} if config.tolerance else _query_base(config, served)
    adapters = []
    for adapter in served.adapters:
        if adapter.prompts:
            tolerance = config.tolerance or tolerance_of(dtype)
            if adapter.name in alone:
                known = [prompt["base"] for prompt in adapter.prompts]
                tolerance = widen_tolerance(tolerance, alone[adapter.name], known)
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
    listener.stage(f"ask {config.url}")
    found = check_vectors(config, record)
    summary = {"out": str(config.out), "asked": config.url, "verdict": TRAINED, **found}
    summary["seconds"] = round(time.perf_counter() - began, 2)
    line = f"{TRAINED}: {found['texts']} embeddings, cosine {found['min_cosine']:.6f} or more"
    return CheckServedResult(summary, (line,))


@dataclass(frozen=True)
class _Rows:
    """Outputs for one adapter; `how` is the prompt form, `no_chat` why chat was not queried."""

    plain: list[ServerAnswer]
    chat: list[ServerAnswer | None]
    how: str
    no_chat: str = ""


def _ask_url(config: CheckServedConfig, served: ServingRecord) -> dict[str, _Rows]:
    client = Client(config.url or "", float(config.timeout))
    listed = client.models()
    found = {}
    for number, adapter in enumerate(served.adapters):
        name = config.model or _name_of(adapter, served, listed)
        several = served.facts.get("server") == "llama.cpp" and len(served.adapters) > 1
        more = {"lora": [{"id": number, "scale": 1.0}]} if several else {}
        found[adapter.name] = _ask_one(client, name, adapter, more, listed)
    return found


def _name_of(adapter: AdapterRecord, served: ServingRecord, listed: list[str]) -> str:
    """Return the model name under which the server lists `adapter`, if it can be found."""
    if adapter.name in listed or (len(listed) != 1 and served.facts.get("server") != "mlx"):
        return adapter.name
    # mlx-lm loads a model for any other name.
    return "default_model" if served.facts.get("server") == "mlx" else listed[0]


def _ask_one(
    client: Client, name: str, adapter: AdapterRecord, more: Mapping[str, Any], listed: list[str]
) -> _Rows:
    try:
        plain = [client.complete(name, prompt, more) for prompt in adapter.prompts]
    except RequestRefusedError as refused:
        known = f" It lists {join_names(listed, 4)}: name one by --model." if listed else ""
        raise InputError(f"--url {client.url}: {refused}.{known}") from None
    chat: list[ServerAnswer | None] = []
    reason = ""
    for prompt in adapter.prompts:
        if not prompt["messages"]:
            reason = "it was trained without a chat template"
        try:
            asks = prompt["messages"] and not reason
            chat.append(client.chat(name, prompt["messages"], more) if asks else None)
        except RequestRefusedError as refused:
            reason = str(refused)
            chat.append(None)
    return _Rows(plain, chat, "text" if client.by_text else "token ids", reason)


def _query_library(config: CheckServedConfig, served: ServingRecord) -> dict[str, _Rows]:
    library = str(config.inside)
    format_ = served.facts.get("file_format")
    if format_ not in _FORMATS[library]:
        raise InputError(
            f"--in {library}: {config.out} is written as {format_}, and {library} loads "
            f"{' or '.join(_FORMATS[library])}. Export it --for {library}."
        )
    place = config.out if config.out.is_dir() else config.out.parent
    server = SERVERS[library]
    adapters = [
        {
            "name": adapter.name,
            "place": str((place / adapter.place).resolve()) if adapter.rank else "",
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
        found = run_library(library, config.python, base, adapters, seconds)
    nothing = "chat is of servers; this is the library"
    rows = {}
    for name, heard in found.items():
        if isinstance(heard, str):
            raise InputError(f"--in {library} does not load {name}: {' '.join(heard.split())}")
        rows[name] = _Rows(heard, [None] * len(heard), "token ids", nothing)
    return rows


def _query_base(config: CheckServedConfig, served: ServingRecord) -> dict[str, list[ServerAnswer]]:
    """Return the outputs of a quantized base without adapters, by adapter name; may be empty.

    llama.cpp rounds activations with such a base; these outputs show by how much. A server is not
    queried, since its prompt cache could return base outputs for the adapter.
    """
    base = str(served.facts.get("base"))
    adapters = [a for a in served.adapters if a.prompts and "base" in a.prompts[0]]
    if served.facts.get("server") != "llama.cpp" or not base.endswith(".gguf") or not adapters:
        return {}
    asked = [
        {"name": a.name, "place": "", "rank_limit": 0, "prompts": [row["ids"] for row in a.prompts]}
        for a in adapters
    ]
    seconds = float(config.timeout * _SLOWER)
    try:
        found = run_library("llama.cpp", config.python, base, asked, seconds)
    except InputError:
        if config.inside:
            raise
        return {}
    return {name: heard for name, heard in found.items() if not isinstance(heard, str)}


def _judge(adapter: AdapterRecord, rows: _Rows, tolerance: float) -> dict[str, Any]:
    def verdicts(heard: list[ServerAnswer | None]) -> list[Verdict]:
        return [
            judge_answer(one, prompt["trained"], prompt.get("base"), tolerance)
            for one, prompt in zip(heard, adapter.prompts, strict=True)
            if one is not None
        ]

    found = {"weights": verdicts(list(rows.plain)), "chat": verdicts(rows.chat)}
    return {
        "name": adapter.name,
        "by": rows.how,
        "no_chat": rows.no_chat,
        "tolerance": round(tolerance, 4),
        **{
            what: {
                "answers": [verdict.word for verdict in said],
                "difference": max(
                    (v.difference for v in said if v.difference is not None), default=None
                ),
                "tokens": sum(verdict.tokens for verdict in said),
            }
            for what, said in found.items()
        },
    }


def _overall(adapters: list[dict[str, Any]]) -> str:
    """Return the worst verdict; TRAINED only if every adapter differs from its base."""
    words = [word for a in adapters for what in ("weights", "chat") for word in a[what]["answers"]]
    for bad in (ELSE, BASE):
        if bad in words:
            return bad
    told = all(TRAINED in adapter["weights"]["answers"] for adapter in adapters)
    return TRAINED if told else EITHER


def _lines(summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for adapter in summary["adapters"]:
        for what, by in (("weights", adapter["by"]), ("chat", "messages")):
            words = adapter[what]["answers"]
            if not words:
                lines.append(f"{adapter['name']}, chat: not asked ({adapter['no_chat']})")
                continue
            counts = [f"{words.count(w)} {w}" for w in (TRAINED, EITHER, BASE, ELSE) if w in words]
            far = adapter[what]["difference"]
            how = (
                "no logprobs were given, texts compared"
                if far is None
                else f"logprobs within {far:.2g} over {adapter[what]['tokens']} tokens"
            )
            lines.append(f"{adapter['name']}, {what} by {by}: {', '.join(counts)} ({how})")
    return lines


def _advice(summary: Mapping[str, Any], served: ServingRecord) -> str:
    verdict, place = summary["verdict"], summary["asked"]
    if verdict == BASE:
        return (
            f"{place} returns the base model's outputs: the adapter is not applied. Select the "
            f"adapter with --model, and start the server as export printed: "
            + " && ".join(served.facts.get("start") or ["see its README.md"])
        )
    if verdict == EITHER:
        return (
            "the adapter and its base give the same outputs on these prompts, so the check "
            "cannot tell whether the adapter is applied. Use prompts of its training task."
        )
    return (
        f"{place} answers neither as trained nor as the base. Is its base the same model, its "
        f"precision within {summary['tolerance']:g} (--tolerance), and does it set no sampling?"
    )
