"""Malicious files that try to run code, leave their directory, hang or fill memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture_rows.lab import BAD, EXECUTED, GOOD, HANG, OUTSIDE, TOO_LONG, Case, Ended, Lab
from torture_rows.strangers import ADAPTERS, CONFIGS, HEADERS, JSONS, SHARDS, TEMPLATES, YAMLS

from torture_rows.lab import warm_up  # isort: skip

Make = Callable[[Path], list[str]]
"""Spoils a folder that has base/, run/, rows.jsonl and recipe.yaml; returns what is asked of it."""

CANARY = "canary"
_FEW = 20


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


def _makes() -> dict[str, Make]:
    """Return every hostile thing by its name."""
    return {
        **_of_weights(),
        **_of_configs(),
        **_of_texts(),
        **_of_json(),
        **_of_kinds_of_files(),
        **_of_code(),
    }


def _word(asked: Callable[[Path], list[str]]) -> str:
    return asked.__name__.strip("_")


def _of_weights() -> dict[str, Make]:
    makes = {}
    for name, content in HEADERS.items():
        for asked in _OF_BASE:
            made = _write("base/model.safetensors", content, asked)
            makes[f"{_word(asked)}: a header with {name}"] = made
        for asked in _OF_RUN:
            made = _write("run/adapter/adapter_model.safetensors", content, asked)
            makes[f"{_word(asked)}: an adapter's header with {name}"] = made
    for shard in SHARDS:
        index = json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": shard}})
        for asked in (_train, _quantize, _targets):
            made = _write("base/model.safetensors.index.json", index, asked)
            makes[f"{_word(asked)}: a shard named {shard!r}"] = made
    return makes


def _of_configs() -> dict[str, Make]:
    makes = {}
    for name, fields in CONFIGS.items():
        for asked in (_train, _evaluate, _quantize, _targets, _export):
            makes[f"{_word(asked)}: config with {name}"] = _edit("base/config.json", fields, asked)
    for name, fields in ADAPTERS.items():
        for asked in (_evaluate, _merge):
            made = _edit("run/adapter/adapter_config.json", fields, asked)
            makes[f"{_word(asked)}: adapter with {name}"] = made
    return makes


def _of_texts() -> dict[str, Make]:
    makes = {}
    for name, text in TEMPLATES.items():
        made = _write("base/chat_template.jinja", text, _train_on_chats)
        makes[f"template: {name}"] = made
        made = _write("run/adapter/chat_template.jinja", text, _generate)
        makes[f"template in a run: {name}"] = made
    for name, yaml in YAMLS.items():
        makes[f"recipe: {name}"] = _write("recipe.yaml", yaml, _train)
    return makes


def _of_json() -> dict[str, Make]:
    makes = {}
    of_adapter = ("adapter_config.json", "ftlevel.json", "tokenizer.json", "tokenizer_config.json")
    of_base = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
               "special_tokens_map.json", "model.safetensors.index.json")  # fmt: skip
    for name, text in JSONS.items():
        data = text.encode(errors="surrogateescape")
        for asked in _OF_RUN:
            for file in of_adapter:
                made = _write(f"run/adapter/{file}", data, asked)
                makes[f"{_word(asked)}: {file} {name}"] = made
        for file in of_base:
            makes[f"base {file} {name}"] = _write(f"base/{file}", data, _train)
        for file in ("checkpoints/origin.json", "config.yaml"):
            makes[f"{file} {name}"] = _write(f"run/{file}", data, _resume)
        makes[f"rows {name}"] = _write("rows.jsonl", data, _train)
    return makes


def _of_kinds_of_files() -> dict[str, Make]:
    makes = {}
    of_train = ("base/config.json", "base/model.safetensors", "base/tokenizer.json",
                "base/chat_template.jinja", "rows.jsonl", "recipe.yaml")  # fmt: skip
    for kind in ("pipe", "zero", "socket", "folder", "loop"):
        for name in of_train:
            makes[f"{kind} as {name}"] = _special(name, kind, _train)
        for name in ("adapter_config.json", "ftlevel.json", "adapter_model.safetensors"):
            made = _special(f"run/adapter/{name}", kind, _merge)
            makes[f"{kind} as {name} of a run"] = made
    return makes


def _of_code() -> dict[str, Make]:
    weights = "base/model.safetensors"
    makes = {
        f"a pickle as {name}": _pickled(f"base/{name}", weights, _train)
        for name in ("pytorch_model.bin", "model.bin", "model.pt")
    }
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        makes[f"a pickle as {name}, not as in the manifest"] = _in_a_checkpoint(name)
    makes["a pickle as the adapter"] = _pickled(
        "run/adapter/adapter_model.bin", "run/adapter/adapter_model.safetensors", _merge
    )
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
                if isinstance(path, (str, os.PathLike)) and not str(
                    Path(path).absolute()
                ).startswith(allowed):
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
    if count > _FEW:  # else their imports cost less in each
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
