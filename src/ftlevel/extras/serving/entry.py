"""One adapter to be served: its base, prompts, start commands for servers, and README."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import join, quote
from typing import Any

import yaml

from ftlevel.artifacts.cards import code, one_line, plain
from ftlevel.data.encoding.prompts import PromptFormat, encode_prompt, load_prompt_format
from ftlevel.errors import ConfigError, InputError, join_names, with_article
from ftlevel.extras.serving.config import Server
from ftlevel.merging.normal_form import NormalForm
from ftlevel.methods.merging import load_peft_config
from ftlevel.models.loading import load_tokenizer
from ftlevel.safe_io import save_text
from ftlevel.trained.model_ref import ModelRef
from ftlevel.weights.checkpoint import Checkpoint, open_base


@dataclass(frozen=True)
class ServedAdapter:
    """Adapter as a server's start command names it; `template` is a chat template file, or None."""

    name: str
    path: Path
    rank: int
    template: Path | None


def rank_limit(server: Server, rank: int) -> int:
    """Returns the maximum rank with which to start the server for an adapter of `rank`."""
    return next((limit for limit in server.ranks if limit >= rank), rank)


def build_adapter_commands(
    server: Server, base: str, adapters: Sequence[ServedAdapter]
) -> list[str]:
    """Returns the commands, in order, that start `server` with `base` and `adapters`."""
    rank = rank_limit(server, max(part.rank for part in adapters))
    pairs = [_pair(server, part) for part in adapters]
    template = next((part.template for part in adapters if part.template is not None), None)
    if server.name == "llama.cpp":
        return _llama(base, adapters, template)
    if server.name == "openvino":
        return _openvino(base, f"{Path(base).name}-openvino", adapters)
    if server.name == "tgi":
        command = ["text-generation-launcher", "--model-id", base]
        return [join([*command, "--lora-adapters", ",".join(pairs)])]
    if server.name == "mlx":
        return [join(["mlx_lm.server", "--model", base, "--adapter-path", str(adapters[0].path)])]
    if server.name == "vllm":
        command = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(rank)]
        command += ["--max-loras", str(len(adapters))] * (len(adapters) > 1)
        command += ["--lora-modules", *pairs]
    else:
        command = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora"]
        command += ["--max-lora-rank", str(rank), "--lora-paths", *pairs]
    return [join(command + (["--chat-template", str(template)] if template else []))]


def check_command(summary: Mapping[str, Any]) -> str:
    """Returns the `ftlevel check-served` command for the export that `summary` describes."""
    inside = summary["server"] == "openvino"  # a library without a server
    target = "--in openvino --python PYTHON" if inside else "--url http://127.0.0.1:PORT"
    return f"ftlevel check-served {quote(summary['out'])} {target}"


def check_separators(server: Server, names: Sequence[str], out: Path) -> None:
    """Raise ConfigError if a name or `out` contains a separator of the server's command line."""
    forbidden = {"tgi": "=,", "llama.cpp": ","}.get(server.name, "")
    for option, text in (*(("the name", name) for name in names), ("--out", str(out))):
        if separators := [sign for sign in forbidden if sign in text]:
            raise ConfigError(
                f"{option} {text} has a {separators[0]!r}, which {server.title} uses as a "
                f"separator on its command line. Choose another."
            )


def _pair(server: Server, adapter: ServedAdapter) -> str:
    """Returns the adapter as NAME=PATH, or for vLLM and SGLang as JSON if a separator is in it."""
    pair = f"{adapter.name}={adapter.path}"
    if (pair.count("=") == 1 and "," not in pair) or server.name not in ("vllm", "sglang"):
        return pair
    keys = ("name", "path") if server.name == "vllm" else ("lora_name", "lora_path")
    return json.dumps(dict(zip(keys, (adapter.name, str(adapter.path)), strict=True)))


def _llama(base: str, adapters: Sequence[ServedAdapter], template: Path | None) -> list[str]:
    file = base if base.endswith(".gguf") else f"{Path(base).name}.gguf"
    first = [] if base.endswith(".gguf") else [join(["ftlevel", "export", base, "--out", file])]
    command = ["llama-server", "-m", file]
    for part in adapters:
        command += ["--lora", str(part.path)]
    if len(adapters) > 1:
        # Requests select adapters with {"lora": [{"id": 0, "scale": 1.0}]}. The prompt cache would
        # be shared between adapters (xllamacpp 2026.10.11549).
        command += ["--lora-init-without-apply", "--cache-ram", "0"]
    if template:
        command += ["--jinja", "--chat-template-file", str(template)]
    return [*first, join(command)]


def _openvino(model: str, path: str, adapters: Sequence[ServedAdapter] = ()) -> list[str]:
    """Returns commands that convert `model` to OpenVINO in `path`, and run it with each adapter."""
    files = [str(part.path / "adapter_model.safetensors") for part in adapters]
    kwargs_text = '"Hello", max_new_tokens=8'
    code = [f'pipe = ov.LLMPipeline({path!r}, "CPU")', f"print(pipe.generate({kwargs_text}))"]
    if files:
        code = [
            f"own = [ov.Adapter(file) for file in {files!r}]",
            f'pipe = ov.LLMPipeline({path!r}, "CPU", adapters=ov.AdapterConfig(own))',
            f"print([str(pipe.generate({kwargs_text}, adapters=ov.AdapterConfig(one))) "
            "for one in own])",
        ]
    task = ["text-generation-with-past", "--weight-format", "fp16"]
    return _convert_and_run(model, task, path, code)


def _convert_and_run(model: str, task: list[str], path: str, code: list[str]) -> list[str]:
    """Returns commands that convert `model` to OpenVINO in `path`, and run Python's `code`."""
    convert = ["optimum-cli", "export", "openvino", "--model", model, "--task", *task, path]
    run = "; ".join(["import openvino_genai as ov", *code])
    return [join(convert), join(["python", "-c", run])]


def build_embedding_commands(
    server: Server, model_path: Path, name: str, format_: Any
) -> list[str]:
    """Returns the commands that serve the embedding model at `model_path` as `name`."""
    path = str(model_path)
    if server.name == "vllm":
        return [join(["vllm", "serve", path, "--runner", "pooling"])]
    if server.name == "tei":
        prompt = ["--default-prompt-name", "query"] if format_.query_prompt else []
        return [join(["text-embeddings-router", "--model-id", path, *prompt])]
    if server.name == "llama.cpp":
        batch = ["-ub", str(format_.max_length)] if (format_.max_length or 0) > _UBATCH else []
        return [join(["llama-server", "-m", path, "--embeddings", *batch])]
    converted = f"{name}-openvino"
    pooling = {"mean": "MEAN", "cls": "CLS", "last": "LAST_TOKEN"}[format_.pooling]
    kwargs = {
        "normalize": format_.normalize,
        "max_length": format_.max_length,
        "query_instruction": format_.query_prompt,
        "embed_instruction": format_.document_prompt,
    }
    kwargs_text = [f"{key}={value!r}" for key, value in kwargs.items() if value not in (None, "")]
    pooling_arg = f"pooling_type=ov.TextEmbeddingPipeline.PoolingType.{pooling}"
    code = [
        f"pipe = ov.TextEmbeddingPipeline({converted!r}, 'CPU', "
        f"{', '.join([pooling_arg, *kwargs_text])})",
        "print(pipe.embed_query('Hello'))",
    ]
    return _convert_and_run(path, ["feature-extraction"], converted, code)


_UBATCH = 512
"""llama.cpp's default of -ub; a text that is pooled has to fit into it."""


def build_model_commands(server: Server, model_path: Path, name: str) -> list[str]:
    """Returns the commands that serve the full model at `model_path` as `name`."""
    path = str(model_path)
    if server.name == "openvino":
        return _openvino(path, f"{name}-openvino")
    commands = {
        "vllm": ["vllm", "serve", path],
        "sglang": ["python", "-m", "sglang.launch_server", "--model-path", path],
        "tgi": ["text-generation-launcher", "--model-id", path],
        "tei": ["text-embeddings-router", "--model-id", path],
        "llama.cpp": ["llama-server", "-m", path],
        "ollama": ["ollama", "create", name, "-f", str(model_path.with_suffix(".Modelfile"))],
        "mlx": ["mlx_lm.server", "--model", path],
    }
    ollama_run = [["ollama", "run", name]] if server.name == "ollama" else []
    return [join(command) for command in [commands[server.name], *ollama_run]]


TEXTS = (
    "Write a sentence about rain.",
    "What does this function return?",
    "Name three animals that can swim.",
    "The list is sorted, and then",
    "Explain why the sky is blue.",
    "Summarize: The bridge was closed for two days, as the river had risen.",
)
"""Prompts for the trained model and for the server; short, so that a check is cheap."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, as text, token ids and chat messages; messages are empty without a template.

    `rendered` is text that encodes to `ids`, for servers that take text only; empty if none does.
    `stop` are texts that end the answer.
    """

    text: str
    ids: list[int]
    messages: list[dict[str, str]]
    rendered: str
    stop: Sequence[str]


@dataclass(frozen=True)
class ServedModel:
    """An adapter, or a whole model, to be served under `name`."""

    name: str
    ref: ModelRef

    @cached_property
    def peft_config(self) -> dict[str, Any]:
        """The adapter's adapter_config.json."""
        return load_peft_config(self.ref.adapter_path)

    @property
    def answers(self) -> bool:
        """Whether the model is a decoder that generates text."""
        return self.ref.model_kind == "decoder" and self.ref.configured_task.generates_text

    @property
    def base_name(self) -> str:
        """Hub id of the base, or its absolute path."""
        source = self.ref.source
        if source.kind == "hub":
            return source.name
        return str(Path(source.location, source.gguf_file or "").resolve())

    @cached_property
    def base(self) -> Checkpoint:
        """Reader of the base's weights."""
        return open_base(self.ref.source, self.ref.model_config, self.ref.auto_class)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer that the adapter was trained with."""
        return self.ref.load_tokenizer()

    @cached_property
    def base_tokenizer(self) -> Any:
        """Tokenizer of the base, which servers use."""
        return load_tokenizer(self.ref.source)

    @property
    def added_tokens(self) -> list[str]:
        """Tokens of the adapter's tokenizer that the base's tokenizer lacks."""
        return sorted(set(self.tokenizer.get_vocab()) - set(self.base_tokenizer.get_vocab()))

    @property
    def custom_chat_template(self) -> str | None:
        """Chat template of training, if it differs from the base's; else None."""
        template = getattr(self.tokenizer, "chat_template", None)
        base_template = getattr(self.base_tokenizer, "chat_template", None)
        return template if isinstance(template, str) and template != base_template else None

    def prompts(self) -> list[Prompt]:
        """Returns prompts to compare export and trained model with, formatted as in training."""
        format_ = load_prompt_format(self.ref.card) or PromptFormat("plain")
        chats = format_.kind == "chat-template"
        prompts = []
        for text in TEXTS:
            turn = {"role": "user", "content": format_.user_text(text)}
            messages = format_.with_system([turn]) if chats else []
            ids = encode_prompt(self.tokenizer, format_, text)
            rendered = self.tokenizer.decode(ids)
            same = self.tokenizer(rendered)["input_ids"] == ids
            stop = self.ref.configured_task.stop_texts
            prompts.append(Prompt(text, ids, messages, rendered if same else "", stop))
        return prompts

    def in_float32(self, *, with_adapter: bool = True) -> ModelRef:
        """Returns a `ModelRef` that loads in float32 and does not quantize the base on loading."""
        ref = self.ref.with_card(dtype="float32")
        if not ref.is_prequantized:
            ref = ref.with_card(quantization={"kind": "none"})
        return ref if with_adapter else replace(ref, directory=None)


def adapter_name(ref: ModelRef) -> str:
    """Returns the name under which to serve an adapter: that of its run or directory."""
    path = ref.run or ref.directory
    return path.resolve().name if path is not None else ref.base


def create_served_model(name: str, ref: ModelRef, server: Server | None) -> ServedModel:
    """Returns `ref` as a `ServedModel`; raises InputError unless PEFT can load it as an adapter."""
    if ref.directory is None:
        fact = f"{name} is a full model without an adapter"
        if server is not None and "merged" in server.formats and ref.source.kind != "gguf":
            path = Path(ref.base if ref.source.kind == "hub" else ref.source.location)
            raise InputError(
                f"{fact}. {server.title} loads it as it is: "
                f"{' && '.join(build_model_commands(server, path, path.name))}"
            )
        raise InputError(f"{fact}. For one file name --format gguf.")
    return ServedModel(name, ref)


def check_server_support(adapter: ServedModel, server: Server | None) -> list[str]:
    """Returns notes; raises InputError if `server` would compute other outputs than in training."""
    notes = []
    quantization = adapter.ref.quantization.get("kind", "none")
    if quantization != "none" and not adapter.ref.is_prequantized:
        notes.append(
            f"{adapter.name} was trained on a base in {quantization}; a server that loads "
            f"{adapter.base_name} in 16 or 32 bits uses other base weights than training did. To "
            f"serve exactly what was trained, run ftlevel merge --onto dequantized"
        )
    if server is None:
        return notes
    if not adapter.answers:
        run = quote(str(adapter.ref.run or adapter.ref.adapter_path))
        raise InputError(
            f"it was trained for {adapter.ref.task} on {with_article(adapter.ref.model_kind)}, and "
            f"{server.title} serves only adapters of decoders that generate text. Merge it: "
            f"ftlevel merge {run} --out DIR; or write PEFT's files: --format peft without --for"
        )
    family = adapter.ref.model_config.model_type
    if server.families and family not in server.families:
        raise InputError(
            f"{server.title} is not known to name the modules of {family} as transformers "
            f"does (known: {join_names(server.families)}). Merge it"
        )
    if adapter.ref.source.kind == "gguf" and "gguf" not in server.formats:
        raise InputError(
            f"its base is the file {adapter.base_name}, and {server.title} serves adapters only on "
            f"bases in transformers format. Merge it"
        )
    if added := adapter.added_tokens:
        raise InputError(
            f"it was trained with {len(added):,} more tokens than its base has "
            f"({join_names(map(repr, added), 3)}), and {server.title} reads the tokenizer of "
            f"the base only. Merge it"
        )
    return notes + [server.note] * bool(server.note)


def merged_format(server: Server | None) -> str:
    """Returns the export format of merged models that `server` loads: merged or gguf."""
    formats = server.formats if server else ()
    return next((name for name in formats if name in ("merged", "gguf")), "merged")


def check_lora(lora: NormalForm, adapter: ServedModel, server: Server | None) -> NormalForm:
    """Returns `lora`, with zero updates added if `server` needs all layers to be adapted.

    Raises InputError if the server would not serve it as trained.
    """
    if server is None:
        return lora
    if lora.whole_modules:
        raise InputError(
            f"{server.title} does not load fully trained modules, here "
            f"{join_names(lora.whole_modules, 2)}. Merge it"
        )
    if not server.vocabulary and (modules := lora.vocab_modules):
        raise InputError(
            f"{server.title} does not serve LoRA on {join_names(modules, 3)} as it was trained. "
            "Merge it"
        )
    if server.ranks and lora.rank > server.ranks[-1]:
        raise InputError(
            f"it needs rank {lora.rank}, and {server.title} allows {server.ranks[-1]}. Merge it"
        )
    return lora.on_every_layer(adapter.base.model) if server.every_layer else lora


def save_readme(path: Path, summary: Mapping[str, Any]) -> None:
    """Write README.md of the exported adapters into `path`."""
    names = [adapter["name"] for adapter in summary["adapters"]]
    lines = [
        "---",
        yaml.safe_dump({"base_model": summary["base"]}, width=10**6, allow_unicode=True).strip(),
        "library_name: peft",
        "tags: [ftlevel, lora]",
        "---",
        "",
        f"# {plain(', '.join(names))}",
        "",
        f"Plain LoRA on {code(summary['base'])}, written by ftlevel "
        f"{summary['versions'].get('ftlevel', '')} from {code(summary['model'])}. B includes the "
        "scale, and alpha equals the rank of every module. So programs that ignore scales or "
        "patterns compute the same outputs.",
        "",
    ]
    for adapter in summary["adapters"]:
        lines += [
            f"- **{plain(adapter['name'])}** ({adapter['method']}): rank {adapter['rank']}, "
            f"{adapter['modules']:,} modules",
            *(f"  - {plain(said)}" for said in adapter["changes"]),
        ]
        if (check := adapter["check"]) is not None:
            lines.append(
                f"  - read back: logits within {check['max_difference']:.2g} of the run's (largest "
                f"{check['largest_logit']:.3g}; the adapter moves them by {check['effect']:.2g})"
            )
    lines.append("")
    lines += [f"{plain(note)}.\n" for note in summary["notes"]]
    lines += serving_lines(summary)
    save_text(path / "README.md", "\n".join(lines))


def serving_lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns Markdown on serving and checking the export; [] if no server was named."""
    if not summary["start"]:
        return []
    lines = ["## Serve", "", "```sh", *map(one_line, summary["start"]), "```", ""]
    if summary.get("recorded", summary["verified"]):
        lines += [
            "served.json has the expected answers. Check a server with",
            "",
            "```sh",
            one_line(check_command(summary)),
            "```",
            "",
        ]
    return lines
