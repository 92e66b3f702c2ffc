"""Settings and files by hypothesis: whatever they are, they are read, or refused by our errors."""

from __future__ import annotations

import contextlib
import json
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import strategies as st

from ftlevel.errors import FtlevelError
from torture_rows.lab import BAD, GOOD, HANG, TOO_LONG, Case, Lab

Read = Callable[[Any], object]
"""Reads one thing; raises FtlevelError where it is refused."""

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "auto", "lora", "../..", "1e400", "-1", "nan", "\x00", "é", "4bit"]),
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _changed(whole: Any) -> st.SearchStrategy[Any]:
    """Return `whole` with some of its values replaced, taken away or put elsewhere."""

    @st.composite
    def changed(draw: Any) -> Any:
        value = json.loads(json.dumps(whole))
        for _ in range(draw(st.integers(1, 3))):
            part, places = value, []
            while isinstance(part, (dict, list)) and part:
                keys = list(part) if isinstance(part, dict) else list(range(len(part)))
                key = draw(st.sampled_from(keys))
                places.append((part, key))
                part = part[key]
                if draw(st.integers(0, 3)) == 0:
                    break
            if not places:
                break
            part, key = places[-1]
            if isinstance(part, dict) and draw(st.integers(0, 4)) == 0:
                del part[key]
            elif isinstance(part, dict) and draw(st.integers(0, 4)) == 0:
                part[draw(st.text(max_size=8))] = part.pop(key)
            else:
                part[key] = draw(_VALUES)
        return value

    return changed()


def _texts(whole: str) -> st.SearchStrategy[str]:
    """Return `whole` cut, doubled, or with a piece replaced."""
    pieces = st.sampled_from(list("{}[]:,'\"\\\n\t#&*!|>-?%@`0") + ["!!", "<<", "{{", "}}", "{%", "%}", "\x00", "é"])  # fmt: skip

    @st.composite
    def changed(draw: Any) -> str:
        text = whole
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(text)))
            to = min(len(text), at + draw(st.integers(0, 12)))
            text = text[:at] + draw(st.one_of(pieces, st.text(max_size=6))) + text[to:]
        return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 5)) == 0 else text

    return changed()


def _bytes_of(whole: bytes, first: int) -> st.SearchStrategy[bytes]:
    """Return `whole` with bytes of its first ones changed, or cut."""

    @st.composite
    def changed(draw: Any) -> bytes:
        content = bytearray(whole)
        for _ in range(draw(st.integers(1, 6))):
            at = draw(st.integers(0, min(first, len(content)) - 1))
            content[at] = draw(st.integers(0, 255))
        cut = draw(st.integers(0, 9)) == 0
        return bytes(content[: draw(st.integers(0, len(content)))] if cut else content)

    return changed()


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _targets(lab: Lab) -> dict[str, tuple[float, st.SearchStrategy[Any], Read]]:
    """Return name → (share of the tries, what is read, how)."""
    from ftlevel.artifacts.cards import read_card
    from ftlevel.artifacts.checkpoints import find_damage
    from ftlevel.artifacts.ownership import is_run
    from ftlevel.artifacts.run_directory import RunDirectory
    from ftlevel.config import DataConfig
    from ftlevel.config.layers import build_config, read_recipe, read_settings
    from ftlevel.data.encoding.chat import render_chat
    from ftlevel.data.prepare.loading import load_examples
    from ftlevel.models.loading import load_config, load_tokenizer
    from ftlevel.models.sources import resolve_source
    from ftlevel.tasks import TASKS
    from ftlevel.trained.plain_peft import read_plain_adapter
    from ftlevel.training.going_on.resume import read_origin
    from ftlevel.weights.tensor_files import read_header

    run = lab.root / "run"
    lab.run(lab.training(run))
    folder = lab.root / "fuzzed"
    folder.mkdir()
    source = resolve_source(str(lab.base))
    tokenizer = load_tokenizer(source)
    config = json.loads((lab.base / "config.json").read_text())
    card = json.loads((run / "adapter" / "ftlevel.json").read_text())
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    newest = max(run.glob("checkpoints/checkpoint-*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    header = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    parts = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    recipe = (run / "config.yaml").read_text()
    few = "".join(lab.rows.read_text().splitlines(keepends=True)[:4])
    origin = json.loads((run / "checkpoints" / "origin.json").read_text())
    task = TASKS["text-generation"]
    paths = st.sampled_from([
        "train.seed", "train.learning_rate", "method.r", "method", "method.kind", "data.dataset",
        "data.mix", "model.name_or_path", "quant.kind", "output.dir", "task", "train",
        "train.lr_scheduler_kwargs", "method.rank_pattern", "speed.verify", "data.gate", "a.b.c", "",
    ])  # fmt: skip

    def at(name: str, content: bytes) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    def config_of(value: Any) -> object:
        at("config.json", value if isinstance(value, bytes) else _json(value))
        return load_config(resolve_source(str(folder)))

    def template_of(text: str) -> object:
        tokenizer.chat_template = text
        return render_chat(tokenizer, turns)

    def rows_of(suffix: str) -> Callable[[bytes], object]:
        def read(content: bytes) -> object:
            path = at(f"rows{suffix}", content)
            return load_examples(DataConfig(dataset=str(path)), task, 0)

        return read

    def manifest_of(value: Any) -> object:
        checkpoint = folder / "checkpoint"
        if not checkpoint.exists():
            checkpoint.symlink_to(newest)
        (folder / "one").mkdir(exist_ok=True)
        (folder / "one" / "x").write_text("x")
        (folder / "one" / "manifest.json").write_bytes(_json(value))
        found = find_damage(folder / "one")
        if not isinstance(found, str):
            raise AssertionError("a manifest that is another is taken for whole")
        return found

    def origin_of(value: Any) -> object:
        (folder / "r" / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "r" / "checkpoints" / "origin.json").write_bytes(_json(value))
        (folder / "r" / ".ftlevel.json").write_bytes(_json(value))
        (folder / "r" / "summary.json").write_bytes(_json(value))
        (folder / "r" / "metrics.jsonl").write_bytes(_json(value) + b"\n" + _json(value)[:-1])
        opened = RunDirectory(folder / "r")
        is_run(folder / "r")
        opened.read_summary()
        opened.read_log(3)
        return read_origin(opened, origin)

    def header_of(value: Any) -> object:
        if isinstance(value, bytes):
            return read_header(at("x.safetensors", value))
        text = _json(value)
        return read_header(at("x.safetensors", struct.pack("<Q", len(text)) + text + b"\0" * 64))

    def gguf_of(value: bytes) -> object:
        path = at("x.gguf", value)
        found = resolve_source(str(path))
        return load_tokenizer(found) and load_config(found)

    base = replace(source)
    shutil_copy = (lab.base / "tokenizer.json").read_bytes()
    at("tokenizer.json", shutil_copy)
    (folder / "model.safetensors").symlink_to(lab.base / "model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(header)
    csv = b"prompt,completion\n" + b"one two,three\n" * 4
    targets: dict[str, tuple[float, st.SearchStrategy[Any], Read]] = {
        "recipes": (0.06, _texts(recipe) | _VALUES.map(lambda v: json.dumps(v)),
                    lambda t: build_config([read_recipe(at("r.yaml", t.encode(errors="surrogatepass")))])),
        "--set": (0.25, st.tuples(paths, st.one_of(st.text(max_size=20), _VALUES.map(json.dumps))).map("=".join),
                  lambda text: build_config([read_settings([text])])),
        "rows, JSON lines": (0.10, _texts(few).map(lambda t: t.encode(errors="surrogatepass")) | st.lists(_changed(json.loads(few.splitlines()[0])), min_size=1, max_size=4).map(
            lambda rows: b"\n".join(map(_json, rows))), rows_of(".jsonl")),
        "rows, CSV": (0.05, _bytes_of(csv, len(csv)), rows_of(".csv")),
        "adapter configs": (0.13, _changed(adapter) | _VALUES,
                            lambda v: (at("adapter_config.json", _json(v)), read_plain_adapter(folder, base_source=base))[1]),
        "cards": (0.14, _changed(card) | _VALUES, lambda v: (at("ftlevel.json", _json(v)), read_card(folder))[1]),
        "manifests": (0.06, _changed(manifest) | _VALUES, manifest_of),
        "files of a run": (0.04, _VALUES, origin_of),
        "safetensors headers": (0.08, _changed(parts) | _VALUES | _bytes_of(header, 2000), header_of),
        "base configs": (0.04, _changed(config) | _VALUES, config_of),
        "templates": (0.05, _texts(tokenizer.chat_template) | st.text(max_size=30), template_of),
    }  # fmt: skip
    if (gguf := _gguf(lab)) is not None:
        targets["GGUF headers"] = (0.01, _bytes_of(gguf, 20_000), gguf_of)
    return targets


def _gguf(lab: Lab) -> bytes | None:
    out = lab.root / "whole.gguf"
    ended = lab.run(["export", str(lab.base), "--out", str(out), "--quiet"])
    return out.read_bytes() if ended.code == 0 else None


class _Hang(BaseException):
    """It took too long."""


def fuzz_everything(lab: Lab, count: int) -> Iterator[Case]:
    """Each target its share of the tries."""

    def end(_: int, __: FrameType | None) -> None:
        raise _Hang

    signal.signal(signal.SIGVTALRM, end)
    for name, (share, strategy, read) in _targets(lab).items():
        tries = max(1, round(share * count))
        began = time.monotonic()
        found = _fuzz(strategy, read, tries, lab.random.randrange(2**32))
        bad = sum(n for (verdict, _), n in found.items() if verdict != GOOD)
        print(f"fuzz: {name}: {tries:,} in {time.monotonic() - began:,.0f} s, {bad:,} bad", flush=True)
        for (verdict, why), times in found.items():
            yield Case(verdict, name, why, name, times)


def _fuzz(
    strategy: st.SearchStrategy[Any], read: Read, tries: int, seed: int
) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=tries, database=None, deadline=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def one(value: Any) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, TOO_LONG)
        try:
            read(value)
            found[GOOD, ""] += 1
        except FtlevelError as error:
            is_line = str(error).strip() != ""
            found[GOOD if is_line else BAD, "" if is_line else "no message"] += 1
        except _Hang:
            found[HANG, repr(value)[:500]] += 1
        except Exception as error:  # noqa: BLE001 - each is a finding
            where = [f for f in traceback.extract_tb(error.__traceback__) if "ftlevel" in f.filename]
            last = where[-1] if where else None
            place = f"{Path(last.filename).name}:{last.lineno}" if last else "?"
            found[BAD, f"{type(error).__name__} at {place}: {str(error)[:100]!r} of {repr(value)[:150]}"
                  if (BAD, place + type(error).__name__) not in seen else seen[BAD, place + type(error).__name__]] += 1  # fmt: skip
            if (key := (BAD, place + type(error).__name__)) not in seen:
                seen[key] = next(reversed(found))[1]
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    seen: dict[tuple[str, str], str] = {}
    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        one()
    return found
