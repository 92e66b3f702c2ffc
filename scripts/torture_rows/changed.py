"""Inputs that change before `--resume`: refused with the name and both values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torture_rows.damage import _broken_off
from torture_rows.kills import Whole
from torture_rows.lab import BAD, GOOD, HANG, SILENT, Case, Ended, Lab

Change = Callable[[Path], None]
"""Changes the files in a folder that has base/ and rows.jsonl."""


@dataclass(frozen=True)
class _Changed:
    """One thing that is another.

    Attributes:
        field: what the refusal must name.
        flags: more of the command line.
        files: changes the base or the rows.
        before: is called by the process first.
    """

    field: str
    flags: tuple[str, ...] = ()
    files: Change | None = None
    before: Callable[[], None] | None = None


def _config(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _one_weight_bit(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def _swapped_ids(folder: Path) -> None:
    path = folder / "base" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    one, two = list(vocab)[300:302]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(content))


def _template(folder: Path) -> None:
    path = folder / "base" / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def _rows(change: Callable[[list[str]], list[str]]) -> Change:
    def act(folder: Path) -> None:
        path = folder / "rows.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return act


def _threads() -> None:
    import torch

    torch.set_num_threads(2)


def _versions() -> None:
    from ftlevel.artifacts.cards import library_versions
    from ftlevel.training import origin

    now = {**library_versions(), "torch": "2.7.0"}
    setattr(origin, "library_versions", lambda: now)  # noqa: B010 - it is no name of that module


CHANGES: dict[str, _Changed] = {
    "learning rate": _Changed("train.learning_rate", ("--learning-rate", "0.007")),
    "seed": _Changed("train.seed", ("--seed", "9")),
    "order of rows": _Changed("train.data_seed", ("--set", "train.data_seed=9")),
    "alpha": _Changed("method.lora_alpha", ("--lora-alpha", "3")),
    "rank": _Changed("method.r", ("--lora-r", "3")),
    "dropout": _Changed("method.lora_dropout", ("--lora-dropout", "0.2")),
    "targets": _Changed("method.target_modules", ("--target-modules", "q_proj,v_proj")),
    "method": _Changed("method", ("--method", "ia3")),
    "batch": _Changed("train.per_device_train_batch_size", ("--batch-size", "2")),
    "accumulation": _Changed("train.gradient_accumulation_steps",
                             ("--gradient-accumulation-steps", "2")),
    "schedule": _Changed("train.lr_scheduler_type", ("--lr-scheduler-type", "cosine")),
    "warm-up": _Changed("train.warmup_steps", ("--warmup-steps", "2")),
    "weight decay": _Changed("train.weight_decay", ("--weight-decay", "0.1")),
    "clipping": _Changed("train.max_grad_norm", ("--max-grad-norm", "0.5")),
    "precision": _Changed("model.dtype", ("--dtype", "float32")),
    "quantization": _Changed("quant", ("--quant", "4bit")),
    "the fast step": _Changed("speed", ("--no-fast",)),
    "longest row": _Changed("data.max_length", ("--max-length", "400")),
    "a word of a row": _Changed(
        "data.fingerprint", files=_rows(lambda r: [r[0].replace('": "', '": "a ', 1), *r[1:]])),
    "a row less": _Changed("data.fingerprint", files=_rows(lambda rows: rows[:-1])),
    "rows in another order": _Changed("data.fingerprint", files=_rows(lambda rows: rows[::-1])),
    "one bit of the base": _Changed("model.safetensors", files=_one_weight_bit),
    "rope_theta": _Changed("rope", files=_config(rope_theta=9e4, rope_parameters={
        "rope_type": "default", "rope_theta": 9e4})),
    "rms_norm_eps": _Changed("model.config.rms_norm_eps", files=_config(rms_norm_eps=1e-3)),
    "hidden_act": _Changed("model.config.hidden_act", files=_config(hidden_act="gelu")),
    "ids of the tokenizer": _Changed("model.tokenizer", files=_swapped_ids),
    "chat template": _Changed("model.chat_template", files=_template),
    "threads": _Changed("threads", before=_threads),
    "version of torch": _Changed("versions.torch", before=_versions),
}  # fmt: skip


def change_something(lab: Lab, count: int) -> Iterator[Case]:
    """Each is refused, and by --allow-change it goes on and is recorded."""
    whole = Whole(lab)
    broken = _broken_off(lab, whole)
    kept = lab.root / "kept"
    kept.mkdir()
    shutil.copytree(lab.base, kept / "base")
    shutil.copy(lab.rows, kept)
    names = list(CHANGES)
    lab.random.shuffle(names)
    for number in range(max(count, len(names)) if count >= 25 else count):
        name = names[number % len(names)]
        yield _try(lab, name, CHANGES[name], broken)
        shutil.rmtree(lab.base)
        shutil.copytree(kept / "base", lab.base)
        shutil.copy(kept / "rows.jsonl", lab.rows)


def _try(lab: Lab, name: str, changed: _Changed, broken: Path) -> Case:
    run = lab.folder()
    shutil.copytree(broken, run)
    if changed.files is not None:
        changed.files(lab.root)
        for path in lab.root.glob("base/*"):  # as if it were long ago
            os.utime(path, (1e9, 1e9))
    ended = lab.run(lab.training(run, *changed.flags, "--resume"), changed.before)
    shutil.rmtree(run)
    return _judge(name, changed, ended)


def _judge(name: str, changed: _Changed, ended: Ended) -> Case:
    if ended.hung:
        return Case(HANG, name)
    if ended.code == 0:
        return Case(SILENT, name, "it went on")
    if ended.code != 2 or ended.is_raw or changed.field not in ended.err:
        return Case(BAD, name, f"exit {ended.code}: {ended.err[-500:]}")
    has_values = " was " in ended.err or "bytes of" in ended.err or "weights" in ended.err
    return Case(GOOD if has_values else BAD, name, ended.err[-300:])
