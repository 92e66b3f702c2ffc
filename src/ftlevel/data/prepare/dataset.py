"""Prepare the rows of a run, or load them from the cache of prepared rows.

Each cache key has a folder, complete or absent, under the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.checkpoints import certify, detect_corruption
from ftlevel.artifacts.files import Workspace, file_fingerprint
from ftlevel.config import IN_MEMORY, DataConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import render
from ftlevel.data.encoding.prompts import PROMPT_VERSION, PromptFormat
from ftlevel.data.encoding.row import Encoded
from ftlevel.data.encoding.store import RowStore, rows_to_batches, write_store
from ftlevel.data.gate import Finding
from ftlevel.data.prepare.encoder import EncodingContext, PreparedData, Progress
from ftlevel.data.prepare.loading import encode_data, load_data
from ftlevel.data.sources.hub import is_saved_directory
from ftlevel.data.sources.readers import data_files, is_pattern, match_files
from ftlevel.data.sources.table import Part, Table
from ftlevel.errors import InputError
from ftlevel.safe_io import open_new, save_text

KEEP_DAYS = 30


def cache_root() -> Path:
    """Returns the cache directory: `$XDG_CACHE_HOME/ftlevel/rows`, or under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftlevel" / "rows"


def is_writable() -> bool:
    """Returns whether the cache directory, created if missing, is writable; never raises."""
    cache_dir = cache_root()
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(cache_dir, os.W_OK | os.X_OK)


def resolve_files(name: str, format_: str | None = None) -> list[Path] | None:
    """Returns the sorted files of dataset `name`; None for rows in memory and Hub datasets."""
    if name == IN_MEMORY:
        return None
    if is_pattern(name):
        return match_files(name, format_)
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir() and not is_saved_directory(path):
        return [path / file for file in data_files(path)]
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else None


@dataclass(frozen=True)
class CacheDir:
    """Directory of the prepared rows of one cache key.

    `publish` moves a new directory into the cache; it is None if the cache already has the rows.
    `damage` describes corrupted cached rows.
    """

    path: Path
    publish: Callable[[], Path] | None = None
    damage: str = ""


@contextmanager
def open_cache_dir(key: str) -> Iterator[CacheDir]:
    """Yields the cache directory of `key` if its checksums match, else an empty one to write to.

    Other processes with the same key wait for its lock.
    """
    from filelock import FileLock

    cache_dir = cache_root()
    final, partial = cache_dir / key, cache_dir / f".{key}.partial"
    with FileLock(cache_dir / f".{key}.lock"):
        damage = detect_corruption(final) if final.is_dir() else ""
        if damage is None:
            os.utime(final)
            yield CacheDir(final)
            return
        for unusable in (final, partial):
            shutil.rmtree(unusable, ignore_errors=True)
        partial.mkdir()

        def publish() -> Path:
            certify(partial)
            return partial.replace(final)

        try:
            yield CacheDir(partial, publish, damage)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            remove_unused(cache_dir)


def remove_unused(root: Path) -> None:
    """Remove folders and files of `root` that were not used for `KEEP_DAYS` days."""
    oldest = time.time() - KEEP_DAYS * 24 * 3600
    for path in root.iterdir():
        with suppress(FileNotFoundError):  # another process removed or renamed it
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


MIN_CACHED_ROWS = 1_000
"""Minimum number of rows to store on disk and cache."""
SMALL_BYTES = 200_000
"""Datasets with fewer bytes are not cached: preparing them takes no longer than a lookup."""
_LINES = 1 << 16  # written at once
_UNRELATED = ("num_proc", "cache")  # config fields that do not affect rows


def prepare_data(config: DataConfig, context: EncodingContext, progress: Progress) -> PreparedData:
    """Returns the encoded and checked rows of `config`, from the cache if possible.

    `progress` is called while encoding. Raises `InputError` if the data cannot be read, converted
    or fitted to the length limit.
    """
    key = _key(config, context) if config.cache else None
    return context.task.finish_data(_prepare(config, context, key, progress), config, context)


def _prepare(
    config: DataConfig, context: EncodingContext, key: str | None, progress: Progress
) -> PreparedData:
    def prepare(cache_dir: Path) -> PreparedData:
        data = load_data(config, context.task, context.seed, lenient=context.lenient)
        large = len(data.train) >= MIN_CACHED_ROWS
        return encode_data(data, config, context, cache_dir if large else None, progress)

    if key is None or not is_writable():
        workspace = Workspace("rows")
        prepared = prepare(Path(workspace.name))
        if key is not None:
            reason = f"{cache_root()} cannot be written"
            prepared.choices.append(Choice("rows", "not cached", reason))
        return replace(prepared, workspace=workspace)
    with open_cache_dir(key) as cache_dir:
        if cache_dir.publish is None:
            return _load(cache_dir.path, "prepared before")
        prepared = prepare(cache_dir.path)
        if len(prepared.train) < MIN_CACHED_ROWS:
            train, validation = list(prepared.train), list(prepared.validation)
            corpus = list(prepared.corpus)
            return replace(prepared, train=train, validation=validation, corpus=corpus)
        _save(prepared, cache_dir.path)
        path = cache_dir.publish()
    if cache_dir.damage:
        return _load(path, "prepared anew", f"the cache was damaged: {cache_dir.damage}; ")
    return _load(path, "kept for the next run")


def _key(config: DataConfig, context: EncodingContext) -> str | None:
    """Returns the cache key, a digest of all that affects the rows; None if they are not cached."""
    files: list[Path] = []
    names = [config.dataset, *config.also, config.validation_file, config.qrels, config.corpus]
    names += context.task.list_files(config)
    for name in filter(None, names):
        paths = resolve_files(str(name), config.input_format)
        if paths is None:
            return None
        files += paths
    if sum(file.stat().st_size for file in files) < SMALL_BYTES:
        return None
    template = getattr(context.tokenizer, "chat_template", None)
    bounds = context.bounds
    if config.max_length != "auto":  # memory matters only for "auto"
        bounds = replace(bounds, memory=None)
    content = {
        "format": 2,
        "data": config.model_dump(mode="json", exclude=set(_UNRELATED)),
        "files": [[str(file), file_fingerprint(file)] for file in files],
        "task": [
            context.task.name,
            context.task.instruction,
            context.task.answer_cue,
            context.task.encoding_config,
            PROMPT_VERSION,
        ],
        "model": [context.kind, context.vocabulary, asdict(bounds)],
        "seed": context.seed,
        "lenient": context.lenient,
        "tokenizer": _tokenizer_digest(context.tokenizer),
        "template": [template, _render_question(context.tokenizer) if template else ""],
        "versions": library_versions(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    model = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    text = json.dumps([model, tokenizer.special_tokens_map, tokenizer.padding_side], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _render_question(tokenizer: Any) -> str:
    try:
        return render(tokenizer, [{"role": "user", "content": "?"}], generation_prompt=True)
    except InputError as error:
        return str(error)


def _save(prepared: PreparedData, cache_dir: Path) -> None:
    prompt = prepared.prompt_format
    for digests in (*cache_dir.glob("*.digests"), *cache_dir.glob("*.words")):
        digests.unlink()
    content = {
        "train": _save_rows(prepared.train, cache_dir, "train"),
        "validation": _save_rows(prepared.validation, cache_dir, "validation"),
        "corpus": _save_rows(prepared.corpus, cache_dir, "corpus"),
        "prompt_format": prompt.to_dict() if prompt else None,
        "max_length": prepared.max_length,
        "facts": prepared.info,
        "choices": [asdict(choice) for choice in prepared.choices],
        "findings": [asdict(finding) for finding in prepared.findings],
        "table": _save_table(prepared.table, cache_dir / "lines.npy"),
        "validation_table": _save_table(prepared.validation_table, cache_dir / "held_out.npy"),
    }
    text = json.dumps(content, ensure_ascii=False, default=str)
    save_text(cache_dir / "prepared.json", text)


def _save_table(table: Table, path: Path) -> Mapping[str, Any]:
    """Save the locations of the rows of `table`; returns its description for `_load_table`."""
    _save_lines(table.lines, path)
    parts = [[part.base, part.table.source, part.table.unit] for part in table.parts]
    return {"source": table.source, "unit": table.unit, "parts": parts}


def _load_table(content: Mapping[str, Any], path: Path) -> Table:
    parts = tuple(Part(base, Table([], [], name, unit)) for base, name, unit in content["parts"])
    lines = np.load(path, mmap_mode="r")
    return Table([], lines, content["source"], content["unit"], parts=parts)


def _save_lines(lines: Sequence[int], path: Path) -> None:
    header = {"descr": "<i8", "fortran_order": False, "shape": (len(lines),)}
    with open_new(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(lines), _LINES):
            file.write(np.array(lines[start : start + _LINES], dtype="<i8").tobytes())


def _save_rows(rows: Sequence[Encoded], cache_dir: Path, name: str) -> Mapping[str, Any] | None:
    if not len(rows):
        return None
    if not isinstance(rows, RowStore):
        rows = write_store(cache_dir / f"{name}.arrow", rows_to_batches(rows))
    if rows.indices is not None:
        np.save(cache_dir / f"{name}.npy", rows.indices)
    return {"file": rows.path.name, "chosen": rows.indices is not None}


def _load(cache_dir: Path, note: str, reason: str = "") -> PreparedData:
    content = json.loads((cache_dir / "prepared.json").read_text(encoding="utf-8"))
    choice = Choice("rows", note, f"{reason}{cache_dir}; --no-cache prepares them again")
    return PreparedData(
        _load_rows(cache_dir, "train", content),
        _load_rows(cache_dir, "validation", content),
        PromptFormat(**content["prompt_format"]) if content["prompt_format"] else None,
        content["max_length"],
        _load_table(content["table"], cache_dir / "lines.npy"),
        content["facts"],
        [*(Choice(**fields) for fields in content["choices"]), choice],
        tuple(Finding(**{**f, "places": tuple(f["places"])}) for f in content["findings"]),
        corpus=_load_rows(cache_dir, "corpus", content),
        validation_table=_load_table(content["validation_table"], cache_dir / "held_out.npy"),
    )


def _load_rows(cache_dir: Path, name: str, content: Mapping[str, Any]) -> Sequence[Encoded]:
    entry = content[name]
    if entry is None:
        return []
    indices = np.load(cache_dir / f"{name}.npy") if entry["chosen"] else None
    return RowStore(cache_dir / entry["file"], indices)
