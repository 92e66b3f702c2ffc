"""Files that a stranger made: to run code, to leave their directory, to hang, to fill memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture_rows.lab import BAD, EXECUTED, GOOD, HANG, OUTSIDE, TOO_LONG, Case, Ended, Lab

from torture_rows.lab import warm_up  # isort: skip

Make = Callable[[Path], list[str]]
"""Spoils a folder that has base/, run/, rows.jsonl and recipe.yaml; returns what is asked of it."""

CANARY = "canary"


class _Payload:
    """What a pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def _train(folder: Path) -> list[str]:
    return ["train", "--quiet", "--recipe", str(folder / "recipe.yaml")]


def _evaluate(folder: Path) -> list[str]:
    return ["evaluate", str(folder / "run"), "--dataset", str(folder / "rows.jsonl"), "--quiet"]


def _merge(folder: Path) -> list[str]:
    return ["merge", str(folder / "run"), "--out", str(folder / "merged"), "--quiet"]


def _quantize(folder: Path) -> list[str]:
    return [
        "quantize",
        str(folder / "base"),
        "--quant",
        "4bit",
        "--out",
        str(folder / "q"),
        "--quiet",
    ]


def _export(folder: Path) -> list[str]:
    return ["export", str(folder / "base"), "--out", str(folder / "x.gguf"), "--quiet"]


def _generate(folder: Path) -> list[str]:
    return ["generate", str(folder / "run"), "--prompt", "one", "--max-new-tokens", "2"]


def _targets(folder: Path) -> list[str]:
    return ["list-targets", str(folder / "base")]


def _resume(folder: Path) -> list[str]:
    return ["train", "--quiet", "--output-dir", str(folder / "run"), "--resume"]


_OF_BASE = (_train, _evaluate, _merge, _quantize, _export, _generate, _targets)
_OF_RUN = (_evaluate, _merge, _generate, _resume)


def _write(name: str, content: str | bytes | Any, asked: Callable[[Path], list[str]]) -> Make:
    def make(folder: Path) -> list[str]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(data.replace(b"CANARY", str(folder / CANARY).encode()))
        return asked(folder)

    return make


def _edit(name: str, fields: dict[str, Any], asked: Callable[[Path], list[str]]) -> Make:
    def make(folder: Path) -> list[str]:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        return asked(folder)

    return make


def _special(name: str, kind: str, asked: Callable[[Path], list[str]]) -> Make:
    """A pipe, a device, a socket, a directory or a link where a file is expected."""

    def make(folder: Path) -> list[str]:
        path = folder / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        else:
            with socket.socket(socket.AF_UNIX) as server:
                here = Path.cwd()
                os.chdir(path.parent)
                server.bind(path.name)
                os.chdir(here)
        return asked(folder)

    return make


def _pickled(name: str, remove: str, asked: Callable[[Path], list[str]]) -> Make:
    def make(folder: Path) -> list[str]:
        (folder / remove).unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps(_Payload(folder / CANARY)))
        return asked(folder)

    return make


def _header(content: Any, size: int | None = None, rest: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + rest


HEADERS: dict[str, bytes] = {
    "no bytes": b"",
    "seven bytes": b"1234567",
    "a size of 2**63": _header({}, 2**63),
    "a size beyond the file": _header({}, 10**6),
    "not JSON": _header(b"{{{{"),
    "a list": _header([1, 2]),
    "a number": _header(7),
    "a string for a tensor": _header({"a": "b"}),
    "no offsets": _header({"a": {"dtype": "F32", "shape": [2]}}),
    "offsets outside": _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "offsets backwards": _header(
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, rest=b"12345678"
    ),
    "offsets overlap": _header(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, rest=b"12345678"
    ),
    "another dtype": _header(
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "a negative shape": _header(
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "a shape of 2**62": _header(
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "deep": _header(b"[" * 100_000),
    "a strange name": _header(
        {"../../x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, rest=b"12345678"
    ),
    "metadata of another kind": _header(
        {"__metadata__": [1], "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
        rest=b"12345678",
    ),
}

JSONS: dict[str, str] = {
    "empty": "",
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a string": '"x"',
    "cut": '{"a": ',
    "deep": "[" * 100_000,
    "deep objects": '{"a":' * 50_000,
    "twice": '{"a": 1, "a": 2}',
    "NaN": '{"a": NaN}',
    "a large number": '{"a": ' + "9" * 5_000 + "}",
    "not UTF-8": "\udcff",
    "a zero byte": "\0",
    "empty object": "{}",
}

TEMPLATES = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "an indent of 10**9": "{{ messages | tojson(indent=10**9) }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a long string": "{{ 'a' * 10 ** 10 }}",
    "1/0": "{{ 1/0 }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "namespace": "{{ namespace.__init__.__globals__['__builtins__'].open('CANARY', 'w') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "not closed": "{% for m in messages %}",
    "a filter": "{{ messages | nothing }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "an exception": "{{ raise_exception('x') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "no text": "",
    "a list": "{{ [1] * 10 ** 9 }}",
    "ranges": "{{ range(10 ** 12) | list }}",
}

CONFIGS: dict[str, dict[str, Any]] = {
    "10**9 layers": {"num_hidden_layers": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "-1 layers": {"num_hidden_layers": -1},
    "half a layer": {"num_hidden_layers": 0.5},
    "layers as text": {"num_hidden_layers": "2"},
    "hidden 2**31": {"hidden_size": 2**31},
    "hidden 0": {"hidden_size": 0},
    "hidden as list": {"hidden_size": [64]},
    "vocabulary 10**12": {"vocab_size": 10**12},
    "vocabulary 0": {"vocab_size": 0},
    "no heads": {"num_attention_heads": 0},
    "heads 3": {"num_attention_heads": 3},
    "head_dim 10**9": {"head_dim": 10**9},
    "a kernel": {"attn_implementation": "evil/kernel"},
    "a private kernel": {"_attn_implementation": "evil/kernel"},
    "code of its own": {
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        "model_type": "evil",
    },
    "code beside a known type": {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    "type of nothing": {"model_type": None},
    "type as a list": {"model_type": ["qwen2"]},
    "type as a path": {"model_type": "../../evil"},
    "act as code": {"hidden_act": "__import__('os')"},
    "act as a list": {"hidden_act": ["silu"]},
    "eps as text": {"rms_norm_eps": "x"},
    "rope as text": {"rope_parameters": "x"},
    "rope factor 0": {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
    "rope of nothing": {"rope_parameters": {"rope_type": "nothing"}},
    "layer types": {"layer_types": ["x"] * 2},
    "dtype of nothing": {"dtype": "float7", "torch_dtype": "float7"},
    "quantized by nothing": {"quantization_config": {"quant_method": "evil"}},
    "quantized by a list": {"quantization_config": [1]},
    "quantized by code": {"quantization_config": {"quant_method": "gptq", "backend": "x"}},
    "another architecture": {"architectures": ["os.system"]},
    "architectures as a number": {"architectures": 3},
    "a pad beyond": {"pad_token_id": 10**6},
    "positions 10**12": {"max_position_embeddings": 10**12},
    "positions 0": {"max_position_embeddings": 0},
    "tied as text": {"tie_word_embeddings": "maybe"},
}

ADAPTERS: dict[str, dict[str, Any]] = {
    "r 0": {"r": 0},
    "r 10**9": {"r": 10**9},
    "r as text": {"r": "8"},
    "r as nothing": {"r": None},
    "alpha as text": {"lora_alpha": "x"},
    "type of nothing": {"peft_type": "EVIL"},
    "no type": {"peft_type": None},
    "type as a list": {"peft_type": ["LORA"]},
    "targets that backtrack": {"target_modules": r"(\w+\.?)+x"},
    "targets as a number": {"target_modules": 3},
    "targets of nothing": {"target_modules": ["nothing"]},
    "no targets": {"target_modules": []},
    "a pattern that backtracks": {"rank_pattern": {r"(\w+\.?)+x$": 4}},
    "a pattern of nothing": {"rank_pattern": [3]},
    "a base elsewhere": {"base_model_name_or_path": "../../../etc"},
    "a base as a number": {"base_model_name_or_path": 7},
    "an unknown field": {"evil": True},
    "modules of nothing": {"modules_to_save": ["nothing"]},
    "bias of nothing": {"bias": "evil"},
    "start by pissa": {"init_lora_weights": "evil"},
    "layers of nothing": {"layers_to_transform": [10**9]},
    "code": {"auto_mapping": {"base_model_class": "x", "parent_library": "os"}},
    "replicated": {"layer_replication": [[0, 10**6]]},
    "megatron": {"megatron_config": {}, "megatron_core": "os"},
}

YAMLS = {
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(
        f"{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]"
        for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "python objects": "model: !!python/object/apply:os.system ['touch CANARY']",
    "python names": "model: !!python/name:os.system",
    "a recursive alias": "train: &a {seed: *a}",
    "deep": "[" * 20_000,
    "deep maps": "{a: " * 20_000,
    "not UTF-8": b"\xff\xfe\x00",
    "a date": "train: {seed: 2024-13-45}",
    "a large number": "train: {seed: " + "9" * 6_000 + "}",
    "a tag": "train: {seed: !!int x}",
    "a merge": "train: {<<: 3}",
    "documents": "---\ntrain: {}\n---\nmodel: {}",
    "tabs": "\ttrain: {}",
    "a key as a list": "? [a]\n: b",
    "a zero byte": "a: \0",
    "binary": "train: {seed: !!binary aGVsbG8=}",
    "a set": "train: !!set {a, b}",
    "sexagesimal": "train: {seed: 1:99:99}",
}


def _makes() -> dict[str, Make]:
    """Return every hostile thing by its name."""
    makes: dict[str, Make] = {}
    for asked in _OF_BASE:
        what = asked.__name__.strip("_")
        for name, content in HEADERS.items():
            makes[f"{what}: a header with {name}"] = _write(
                "base/model.safetensors", content, asked
            )
    for asked in _OF_RUN:
        what = asked.__name__.strip("_")
        for name, content in HEADERS.items():
            where = "run/adapter/adapter_model.safetensors"
            makes[f"{what}: an adapter's header with {name}"] = _write(where, content, asked)
        for name, text in JSONS.items():
            for file in (
                "adapter_config.json",
                "ftlevel.json",
                "tokenizer.json",
                "tokenizer_config.json",
            ):
                data = text.encode(errors="surrogateescape")
                makes[f"{what}: {file} {name}"] = _write(f"run/adapter/{file}", data, asked)
    for name, fields in CONFIGS.items():
        for asked in (_train, _evaluate, _quantize, _targets, _export):
            makes[f"{asked.__name__.strip('_')}: config with {name}"] = _edit(
                "base/config.json", fields, asked
            )
    for name, fields in ADAPTERS.items():
        for asked in (_evaluate, _merge):
            makes[f"{asked.__name__.strip('_')}: adapter with {name}"] = _edit(
                "run/adapter/adapter_config.json", fields, asked
            )
    for name, text in TEMPLATES.items():
        makes[f"template: {name}"] = _write("base/chat_template.jinja", text, _train_on_chats)
        makes[f"template in a run: {name}"] = _write(
            "run/adapter/chat_template.jinja", text, _generate
        )
    for name, yaml in YAMLS.items():
        makes[f"recipe: {name}"] = _write("recipe.yaml", yaml, _train)
    for name, text in JSONS.items():
        data = text.encode(errors="surrogateescape")
        for file in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "generation_config.json",
            "special_tokens_map.json",
        ):
            makes[f"base {file} {name}"] = _write(f"base/{file}", data, _train)
        makes[f"an index {name}"] = _write("base/model.safetensors.index.json", data, _train)
        makes[f"origin.json {name}"] = _write("run/checkpoints/origin.json", data, _resume)
        makes[f"config.yaml {name}"] = _write("run/config.yaml", data, _resume)
        makes[f"rows {name}"] = _write("rows.jsonl", data, _train)
    for kind in ("pipe", "zero", "socket", "folder", "loop"):
        for name in (
            "base/config.json",
            "base/model.safetensors",
            "base/tokenizer.json",
            "base/chat_template.jinja",
            "rows.jsonl",
            "recipe.yaml",
        ):
            makes[f"{kind} as {name}"] = _special(name, kind, _train)
        for name in ("adapter_config.json", "ftlevel.json", "adapter_model.safetensors"):
            makes[f"{kind} as {name} of a run"] = _special(f"run/adapter/{name}", kind, _merge)
    for shard in (
        "../evil/model.safetensors",
        "/etc/passwd",
        "a/../../evil.safetensors",
        7,
        "",
        "nothing.safetensors",
    ):
        index = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}})
        for asked in (_train, _quantize, _targets):
            makes[f"{asked.__name__.strip('_')}: a shard named {shard!r}"] = _write(
                "base/model.safetensors.index.json", index, asked
            )
    for name in ("pytorch_model.bin", "model.bin", "model.pt"):
        makes[f"a pickle as {name}"] = _pickled(f"base/{name}", "base/model.safetensors", _train)
    makes["a pickle as the adapter"] = _pickled(
        "run/adapter/adapter_model.bin", "run/adapter/adapter_model.safetensors", _merge
    )
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        makes[f"a pickle as {name}, not in the manifest's sums"] = _in_a_checkpoint(name)
    makes["a git repository that runs a monitor"] = _git
    makes["code beside the base"] = _write("base/modeling_evil.py", "open('CANARY', 'w')", _train)
    return makes


def _in_a_checkpoint(name: str) -> Make:
    def make(folder: Path) -> list[str]:
        for checkpoint in (folder / "run" / "checkpoints").glob("checkpoint-*"):
            (checkpoint / name).write_bytes(pickle.dumps(_Payload(folder / CANARY)))
        (folder / "run" / "summary.json").unlink(missing_ok=True)
        return _resume(folder)

    return make


def _git(folder: Path) -> list[str]:
    """The recipe lies in a repository whose settings name a program."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (
        ["init"],
        ["add", "recipe.yaml"],
        [*who, "commit", "-m", "x"],
        ["config", "core.fsmonitor", f"touch {folder / CANARY}; false"],
        ["config", "filter.x.clean", f"touch {folder / CANARY}"],
    ):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    (folder / ".gitattributes").write_text("* filter=x\n")
    return _train(folder)


def _train_on_chats(folder: Path) -> list[str]:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (folder / "rows.jsonl").write_text(
        json.dumps({"messages": turns})
        + "\n"
        + (json.dumps({"messages": [*turns, *turns]}) + "\n") * 7
    )
    return _train(folder)


def watching(folder: Path) -> Callable[[], None]:
    """Return what makes a process write down what it does that it must not, into a file."""

    def begin() -> None:
        report = os.open(
            folder.parent / f"{folder.name}.seen", os.O_CREAT | os.O_APPEND | os.O_WRONLY
        )
        allowed = (str(folder), os.devnull, os.environ["XDG_CACHE_HOME"], "/proc/self", "/dev/")
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

        def watch(name: str, arguments: tuple[Any, ...]) -> None:
            if name == "open" and arguments[2] is not None and arguments[2] & writing:
                path = arguments[0]
                if isinstance(path, (str, os.PathLike)) and not os.path.abspath(path).startswith(
                    allowed
                ):
                    os.write(report, f"outside wrote {path}\n".encode())
            elif name in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
                if list(arguments[1])[3:4] in (["rev-parse"], ["hash-object"]):
                    return  # of git, which run nothing
                os.write(report, f"executed {name} {arguments[:2]}\n".encode())
            elif name == "socket.connect":
                os.write(report, f"outside connected {arguments[1:]}\n".encode())

        sys.addaudithook(watch)

    return begin


def read_hostile(lab: Lab, count: int) -> Iterator[Case]:
    """A random choice of them, each with the command that reads it."""
    whole = lab.root / "whole"
    whole.mkdir()
    shutil.copytree(lab.base, whole / "base")
    shutil.copy(lab.rows, whole / "rows.jsonl")
    lab.run(lab.training(whole / "run"))
    warm_up(lab, [_evaluate(whole), _merge(whole), _quantize(whole), _generate(whole)])
    for name in ("merged", "q"):
        shutil.rmtree(whole / name)
    makes = _makes()
    names = sorted(makes)
    lab.random.shuffle(names)
    for name in names[:count]:
        folder = lab.folder()
        _lay_out(lab, whole, folder)
        yield _judge(lab, name, folder, makes[name](folder))
        shutil.rmtree(folder, ignore_errors=True)


def _lay_out(lab: Lab, whole: Path, folder: Path) -> None:
    shutil.copytree(whole, folder)
    for path in (
        "run/config.yaml",
        "run/places.json",
        "run/adapter/ftlevel.json",
        "run/adapter/adapter_config.json",
        "run/checkpoints/origin.json",
    ):
        text = (folder / path).read_text()
        (folder / path).write_text(text.replace(str(lab.base), str(folder / "base")))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(folder / "base")},
                "data": {"dataset": str(folder / "rows.jsonl")},
                "task": "text-generation",
                "train": {"max_steps": 1, "per_device_train_batch_size": 4},
                "speed": {"verify": False},
                "output": {"dir": str(folder / "out")},
            }
        )
    )


def _judge(lab: Lab, name: str, folder: Path, asked: list[str]) -> Case:
    ended: Ended = lab.run(asked, watching(folder), seconds=max(lab.patience / 3, TOO_LONG))
    seen = folder.parent / f"{folder.name}.seen"
    wrong = seen.read_text() if seen.exists() else ""
    seen.unlink(missing_ok=True)
    if (folder / CANARY).exists() or "executed" in wrong:
        return Case(EXECUTED, name, wrong)
    if "outside" in wrong:
        return Case(OUTSIDE, name, wrong)
    if ended.hung:
        return Case(HANG, name, ended.last)
    if ended.is_raw or ended.code not in (0, 1, 2):
        return Case(BAD, name, f"exit {ended.code}: {ended.err[-600:]}")
    if ended.is_unforeseen:
        names_file = str(folder) in ended.err
        return Case(GOOD if names_file else BAD, name, ended.err[-500:], "unforeseen, named")
    return Case(GOOD, name, kind="read" if ended.code == 0 else "refused")
