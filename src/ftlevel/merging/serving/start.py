"""The command that starts a server with what was written for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote
from typing import Any

from ftlevel.config.commands.servers import Server
from ftlevel.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One adapter of those that are served.

    Attributes:
        name: what the server calls it.
        place: its file or directory.
        rank: of its normal form.
        template: the file of its chat template, where that is not the base's.
    """

    name: str
    place: Path
    rank: int
    template: Path | None = None


def rank_limit(server: Server, rank: int) -> int:
    """Return the smallest limit of ranks that `server` may have and that `rank` is within."""
    return next((limit for limit in server.ranks if limit >= rank), rank)


def start_adapters(server: Server, base: str, parts: Sequence[Part]) -> list[str]:
    """Return the commands, in their order, that serve `parts` beside `base`."""
    rank = rank_limit(server, max(part.rank for part in parts))
    named = [_pair(server, part) for part in parts]
    template = next((part.template for part in parts if part.template is not None), None)
    several = len(parts) > 1
    if server.name == "vllm":
        command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--max-loras", str(len(parts))] * several + ["--lora-modules", *named]
        return [join(command + (["--chat-template", str(template)] if template else []))]
    if server.name == "sglang":
        command = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
        command += ["--max-lora-rank", str(rank), "--lora-paths", *named]
        return [join(command + (["--chat-template", str(template)] if template else []))]
    if server.name == "tgi":
        return [join(["text-generation-launcher", "--model-id", base,
                      "--lora-adapters", ",".join(named)])]  # fmt: skip
    if server.name == "mlx":
        return [join(["mlx_lm.server", "--model", base, "--adapter-path", str(parts[0].place)])]
    if server.name == "llama.cpp":
        return _llama(base, parts, template)
    return _openvino(base, f"{Path(base).name}-openvino", parts)


def check_command(summary: Mapping[str, Any]) -> str:
    """Return the command that holds what serves it to what was written, as `summary` says."""
    inside = summary["server"] == "openvino"  # a library, with no server of its own
    where = "--in openvino --python PYTHON" if inside else "--url http://127.0.0.1:PORT"
    return f"ftlevel check-served {quote(summary['out'])} {where}"


def check_signs(server: Server, names: Sequence[str], out: Path) -> None:
    """Refuse names and a place that the server's command line would take apart.

    Raises:
        ConfigError: naming the first.
    """
    signs = {"tgi": "=,", "llama.cpp": ","}.get(server.name, "")
    for what, text in (*(("the name", name) for name in names), ("--out", str(out))):
        if found := [sign for sign in signs if sign in text]:
            raise ConfigError(
                f"{what} {text} has a {found[0]!r}, at which {server.title} takes its command line "
                "apart. Choose another."
            )


def _pair(server: Server, part: Part) -> str:
    """Return NAME=PLACE; as JSON where a sign in one of them would be read as that between them."""
    pair = f"{part.name}={part.place}"
    if (pair.count("=") == 1 and "," not in pair) or server.name not in ("vllm", "sglang"):
        return pair
    keys = ("name", "path") if server.name == "vllm" else ("lora_name", "lora_path")
    return json.dumps(dict(zip(keys, (part.name, str(part.place)), strict=True)))


def _llama(base: str, parts: Sequence[Part], template: Path | None) -> list[str]:
    file = base if base.endswith(".gguf") else f"{Path(base).name}.gguf"
    first = [] if base.endswith(".gguf") else [join(["ftlevel", "export", base, "--out", file])]
    command = ["llama-server", "-m", file]
    for part in parts:
        command += ["--lora", str(part.place)]
    if len(parts) > 1:
        # Each request names those it wants, {"lora": [{"id": 0, "scale": 1.0}]}. What the server
        # keeps of a prompt in memory it gives to other adapters too (xllamacpp 2026.10.11549).
        command += ["--lora-init-without-apply", "--cache-ram", "0"]
    if template:
        command += ["--jinja", "--chat-template-file", str(template)]
    return [*first, join(command)]


def _openvino(model: str, place: str, parts: Sequence[Part] = ()) -> list[str]:
    """Return what writes `model` in OpenVINO's format, and asks it: by each of `parts`, if any."""
    files = [str(part.place / "adapter_model.safetensors") for part in parts]
    said = '"Hello", max_new_tokens=8'
    script = [f'pipe = ov.LLMPipeline({place!r}, "CPU")', f"print(pipe.generate({said}))"]
    if files:
        script = [
            f"own = [ov.Adapter(file) for file in {files!r}]",
            f'pipe = ov.LLMPipeline({place!r}, "CPU", adapters=ov.AdapterConfig(own))',
            f"print([str(pipe.generate({said}, adapters=ov.AdapterConfig(one))) for one in own])",
        ]
    convert = ["optimum-cli", "export", "openvino", "--model", model,
               "--task", "text-generation-with-past", "--weight-format", "fp16"]  # fmt: skip
    run = "; ".join(["import openvino_genai as ov", *script])
    return [join([*convert, place]), join(["python", "-c", run])]


def start_model(server: Server, place: Path, name: str) -> list[str]:
    """Return the commands that serve the whole model at `place`."""
    path = str(place)
    if server.name == "openvino":
        return _openvino(path, f"{name}-openvino")
    commands = {
        "vllm": ["vllm", "serve", path],
        "sglang": ["python", "-m", "sglang.launch_server", "--model-path", path],
        "tgi": ["text-generation-launcher", "--model-id", path],
        "llama.cpp": ["llama-server", "-m", path],
        "ollama": ["ollama", "create", name, "-f", str(place.with_suffix(".Modelfile"))],
        "mlx": ["mlx_lm.server", "--model", path],
    }
    more = [["ollama", "run", name]] if server.name == "ollama" else []
    return [join(command) for command in [commands[server.name], *more]]
