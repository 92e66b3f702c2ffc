"""Settings and files from hypothesis: each is read, or refused with one of our errors.

To draw one takes hypothesis longer than we take to read it, so each that it draws is read as it is
and in some variants, which are made by a seed that it draws too.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import struct
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
from hypothesis import strategies as st

from ftlevel.errors import FtlevelError
from torture_rows.fuzz_readers import Read, Reader, as_json, encoded
from torture_rows.lab import BAD, GOOD, HANG, TOO_LONG, Case, Lab

_READ_OF_EACH = 8  # that hypothesis draws

_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=12),
    st.sampled_from(["", "auto", "lora", "../..", "1e400", "-1", "nan", "\x00", "é", "4bit"]),
)  # fmt: skip
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
_PATHS = st.sampled_from(
    ["train.seed", "train.learning_rate", "method.r", "method", "method.kind", "data.dataset",
     "data.mix", "model.name_or_path", "quant.kind", "output.dir", "task", "train",
     "train.lr_scheduler_kwargs", "method.rank_pattern", "speed.verify", "data.gate", "a.b.c", ""]
)  # fmt: skip
_RECIPE = """\
# a recipe
task: text-generation
model: {name_or_path: "builtin:tiny-llama", dtype: auto}
data:
  dataset: rows.jsonl
  also: [one.csv, 'two.parquet']
  max_length: 256
method: &lora
  kind: lora
  r: 8
  rank_pattern: {q_proj: 4}
  target_modules: all-linear
train:
  learning_rate: 2.0e-4
  num_train_epochs: 3
  optim_args: {}
output:
  dir: runs/x
"""
_SIGNS = [*"{}[]:,'\"\\\n\t#&*!|>-?%@`0", "!!", "<<", "{{", "}}", "{%", "%}", "\x00", "é"]


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

    @st.composite
    def changed(draw: Any) -> str:
        text = whole
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(text)))
            to = min(len(text), at + draw(st.integers(0, 12)))
            piece = draw(st.sampled_from(_SIGNS) | st.text(max_size=6))
            text = text[:at] + piece + text[to:]
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


def _vary(value: Any, draw: random.Random) -> Any:
    """Return a value that is another in a place or two; what is no text or bytes is as JSON."""
    if isinstance(value, (str, bytes)):
        for _ in range(draw.randint(1, 3)):
            at = draw.randint(0, len(value))
            to = min(len(value), at + draw.randint(0, 12))
            if isinstance(value, str):
                value = value[:at] + draw.choice(_SIGNS) + value[to:]
            else:
                value = value[:at] + draw.randbytes(to - at) + value[to:]
        return value[: draw.randint(0, len(value))] if draw.random() < 0.1 else value
    if isinstance(value, tuple):
        return tuple(_vary(part, draw) for part in value)
    whole = json.loads(json.dumps([value]))
    for _ in range(draw.randint(1, 2)):
        part, key = whole, 0
        while isinstance(part[key], (dict, list)) and part[key] and draw.random() < 0.8:
            part = part[key]
            key = draw.choice(list(part)) if isinstance(part, dict) else draw.randrange(len(part))
        if part is not whole and isinstance(part, dict) and draw.random() < 0.2:
            del part[key]
        else:
            part[key] = draw.choice(_OTHERS)(part[key], draw)
    return whole[0]


_OTHERS: tuple[Callable[[Any, random.Random], Any], ...] = (
    lambda value, _: [value],
    lambda value, _: {"a": value},
    lambda value, _: str(value),
    lambda _, draw: draw.choice([None, True, "", [], {}, "auto", "../..", "\x00", "\ud800"]),
    lambda _, draw: draw.choice([0, -1, 1.5, 2**63, -(2**70), 1e308, float("inf"), float("nan")]),
    lambda value, draw: _vary(value, draw) if isinstance(value, str) else draw.randint(-9, 10**9),
)


def _targets(lab: Lab) -> dict[str, tuple[float, st.SearchStrategy[Any], Read]]:
    """Return name → (share of the tries, what is read, how)."""
    reader = Reader(lab)
    lines = lab.rows.read_text().splitlines(keepends=True)[:4]
    tables = st.lists(_changed(json.loads(lines[0])), min_size=1, max_size=4)
    rows = _texts("".join(lines)).map(encoded) | tables.map(
        lambda found: b"\n".join(map(as_json, found))
    )
    csv = b"prompt,completion\n" + b"one two,three\n" * 4
    header = reader.adapter
    parts = json.loads(header[8 : 8 + struct.unpack("<Q", header[:8])[0]])
    manifest = json.loads((reader.newest / "manifest.json").read_text())
    config = json.loads((lab.base / "config.json").read_text())
    settings = st.tuples(_PATHS, st.text(max_size=20) | _VALUES.map(json.dumps)).map("=".join)
    adapter = _changed(reader.json("adapter/adapter_config.json"))
    headers = _changed(parts) | _VALUES | _bytes_of(header, 2000)
    templates = _texts(reader.tokenizer.chat_template) | st.text(max_size=30)
    targets: dict[str, tuple[float, st.SearchStrategy[Any], Read]] = {
        "recipes": (0.06, _texts(_RECIPE) | _VALUES.map(json.dumps), reader.recipe),
        "--set": (0.24, settings, reader.setting),
        "rows, JSON lines": (0.10, rows, reader.rows(".jsonl")),
        "rows, CSV": (0.05, _bytes_of(csv, len(csv)), reader.rows(".csv")),
        "adapter configs": (0.13, adapter | _VALUES, reader.adapter_config),
        "cards": (0.14, _changed(reader.json("adapter/ftlevel.json")) | _VALUES, reader.card),
        "manifests": (0.06, _changed(manifest) | _VALUES, reader.manifest),
        "files of a run": (0.04, _VALUES | _changed(reader.origin), reader.state),
        "safetensors headers": (0.08, headers, reader.header),
        "base configs": (0.04, _changed(config) | _VALUES, reader.config),
        "templates": (0.05, templates, reader.template),
    }
    out = lab.root / "whole.gguf"
    if lab.run(["export", str(lab.base), "--out", str(out), "--quiet"]).code == 0:
        targets["GGUF headers"] = (0.01, _bytes_of(out.read_bytes(), 20_000), reader.gguf)
    return targets


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
        seconds = time.monotonic() - began
        print(f"fuzz: {name}: {tries:,} in {seconds:,.0f} s, {bad:,} bad", flush=True)
        for (verdict, why), times in found.items():
            yield Case(verdict, name, why, name, times)


def _fuzz(
    strategy: st.SearchStrategy[Any], read: Read, tries: int, seed: int
) -> Counter[tuple[str, str]]:
    """Return what became of the tries, and why; of like errors one stands for all."""
    found: Counter[tuple[str, str]] = Counter()
    seen: dict[str, str] = {}

    def one(value: Any) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, TOO_LONG)
        try:
            read(value)
            found[GOOD, ""] += 1
        except FtlevelError as error:
            is_line = bool(str(error).strip())
            found[(GOOD, "") if is_line else (BAD, "no message")] += 1
        except _Hang:
            found[HANG, repr(value)[:500]] += 1
        except Exception as error:  # noqa: BLE001 - each is a finding
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "src" in f.filename]
            key = f"{type(error).__name__} at {ours[-1] if ours else '?'}"
            seen.setdefault(key, f"{key}: {str(error)[:100]!r} of {repr(value)[:150]}")
            found[BAD, seen[key]] += 1
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=math.ceil(tries / _READ_OF_EACH), database=None, deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy, st.integers(0, 2**32))
    def several(value: Any, seed: int) -> None:
        draw = random.Random(seed)
        for number in range(_READ_OF_EACH):
            one(_vary(value, draw) if number else value)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):
        several()
    return found
