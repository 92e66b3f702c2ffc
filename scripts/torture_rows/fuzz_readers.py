"""Readers of fuzzed files: the functions that a run uses."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import read_card
from ftlevel.artifacts.checkpoints import find_damage
from ftlevel.artifacts.run_directory import RunDirectory, is_run
from ftlevel.config import DataConfig
from ftlevel.config.layers import build_config, read_recipe, read_settings
from ftlevel.data.encoding.chat import render_chat
from ftlevel.data.prepare.loading import load_examples
from ftlevel.methods.merging import read_peft_config
from ftlevel.models.loading import load_config, load_tokenizer
from ftlevel.models.sources import resolve_source
from ftlevel.tasks import TASKS
from ftlevel.trained.resolve import read_plain_adapter
from ftlevel.training.origin import read_origin
from ftlevel.weights.checkpoint import read_header
from torture_rows.lab import Lab

Read = Callable[[Any], object]
"""Reads one thing; raises FtlevelError where it is refused."""


def encoded(text: str) -> bytes:
    """Return any text of hypothesis as bytes, lone surrogates too."""
    return text.encode(errors="surrogatepass")


def as_json(value: Any) -> bytes:
    """Return a value as a program would write it."""
    return encoded(json.dumps(value, ensure_ascii=False))


class Reader:
    """Reads one thing after another, from files that it writes into a folder."""

    def __init__(self, lab: Lab) -> None:
        """Train a run, whose files are those that are changed."""
        self.run = lab.root / "run"
        lab.run(lab.training(self.run))
        self.newest = max(self.run.glob("checkpoints/checkpoint-*"))
        self.folder = lab.root / "fuzzed"
        self.folder.mkdir()
        base = resolve_source(str(lab.base))
        self.tokenizer = load_tokenizer(base)
        self.origin = self.json("checkpoints/origin.json")
        self.adapter = (self.run / "adapter/adapter_model.safetensors").read_bytes()
        self.write("tokenizer.json", (lab.base / "tokenizer.json").read_bytes())
        self.write("adapter_model.safetensors", self.adapter)
        (self.folder / "model.safetensors").symlink_to(lab.base / "model.safetensors")

    def json(self, name: str) -> Any:
        """Return what a file of the run holds."""
        return json.loads((self.run / name).read_text())

    def write(self, name: str, content: bytes) -> Path:
        """Write a file into the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def recipe(self, text: str) -> object:
        """Read a recipe."""
        return build_config([read_recipe(self.write("r.yaml", encoded(text)))])

    def setting(self, text: str) -> object:
        """Read a `--set`."""
        return build_config([read_settings([text])])

    def rows(self, suffix: str) -> Read:
        """Return what reads rows from a file of this suffix."""

        def read(content: bytes) -> object:
            path = self.write(f"rows{suffix}", content)
            return load_examples(DataConfig(dataset=str(path)), TASKS["text-generation"], 0)

        return read

    def adapter_config(self, value: Any) -> object:
        """Read adapter_config.json as of plain PEFT, and as merge reads it."""
        self.write("adapter_config.json", as_json(value))
        read_plain_adapter(self.folder)
        return read_peft_config(self.folder)

    def card(self, value: Any) -> object:
        """Read ftlevel.json."""
        self.write("ftlevel.json", as_json(value))
        return read_card(self.folder)

    def manifest(self, value: Any) -> object:
        """Read a manifest, which is that of another checkpoint."""
        self.write("one/x", b"x")
        self.write("one/manifest.json", as_json(value))
        found = find_damage(self.folder / "one")
        if not isinstance(found, str):
            raise AssertionError("a manifest that is another is taken for whole")
        return found

    def state(self, value: Any) -> object:
        """Read the files of a run that say how it goes on."""
        text = as_json(value)
        for name in (".ftlevel.json", "summary.json", "checkpoints/origin.json"):
            self.write(f"r/{name}", text)
        for name in ("metrics.jsonl", "checkpoints/notes.jsonl"):
            self.write(f"r/{name}", text + b"\n" + text[:-1])
        run = RunDirectory(self.folder / "r")
        is_run(run.path)
        run.read_summary()
        run.read_log(3)
        run.read_notes()
        return read_origin(run, self.origin)

    def header(self, value: Any) -> object:
        """Read the header of a safetensors file."""
        text = value if isinstance(value, bytes) else as_json(value)
        whole = text if isinstance(value, bytes) else struct.pack("<Q", len(text)) + text
        return read_header(self.write("x.safetensors", whole + b"\0" * 64))

    def gguf(self, value: bytes) -> object:
        """Read tokenizer and configuration of a .gguf file."""
        found = resolve_source(str(self.write("x.gguf", value)))
        load_tokenizer(found)
        return load_config(found)

    def config(self, value: Any) -> object:
        """Read the config.json of a base."""
        self.write("config.json", as_json(value))
        return load_config(resolve_source(str(self.folder)))

    def template(self, text: str) -> object:
        """Render a chat template."""
        self.tokenizer.chat_template = text
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        return render_chat(self.tokenizer, turns)
