"""Small functions that read other tools' values; ValueError says why one has no counterpart."""

from __future__ import annotations

import json
import re

GLUE = ("ax", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")

ON, OFF = ("true", "1", "yes", "on", "y", "t"), ("false", "0", "no", "off", "n", "f", "none")
"""What a switch may be given, in small letters."""

_THOUSANDS = re.compile(r"(\d+(?:\.\d+)?)([km])", re.IGNORECASE)
_FACTORS = {"k": (1024, 1000), "m": (1024**2, 1000**2)}


def number_hint(text: str) -> str:
    """Return "Did you mean 2048 or 2000?" for `2k`; empty for what is no such number."""
    found = _THOUSANDS.fullmatch(text.strip())
    if found is None:
        return ""
    two, ten = (round(float(found[1]) * factor) for factor in _FACTORS[found[2].lower()])
    return f"numbers are written out. Did you mean {two} or {ten}?"


def read_percent(text: str) -> str:
    """Return a percentage as a share: `5` is `0.05`."""
    try:
        return f"{float(text) / 100:g}"
    except ValueError:
        raise ValueError("expected a percentage, as in 5") from None


def read_share(text: str) -> str:
    """Return a share as it is; a number of rows or steps is none."""
    if _number(text) >= 1:
        raise ValueError("a share is below 1, as in 0.1; a number of rows cannot be given")
    return text


def read_ratio(text: str) -> str:
    """Return a share of the steps, which would be a number of them from 1 on."""
    if _number(text) >= 1:
        raise ValueError("a ratio is below 1; --warmup-steps N takes a number of steps")
    return text


def read_lowest_share(text: str) -> str:
    """Return a cosine that ends at a share of the peak, which is Axolotl's word for it."""
    _number(text)
    return f"cosine_with_min_lr --lr-scheduler-kwargs min_lr_rate={text}"


def read_pairs(flag: str, text: str) -> str:
    """Return settings one by one: `a=1,b=2`, or JSON as transformers takes it."""
    if not text.lstrip().startswith("{"):
        return f" {flag} ".join(pair.strip() for pair in text.split(",") if pair.strip())
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    return f" {flag} ".join(f"{name}={str(value).strip()}" for name, value in found.items())


def read_once_an_epoch(text: str) -> str:
    """Return `epoch` for once an epoch; more often is a share of the run."""
    if _number(text) == 1:
        return "epoch"
    raise ValueError(
        f"{text} times in each of E epochs is every 1/({text} × E) of the run: give that share to "
        "--eval-steps or --save-steps, as in --eval-steps 0.25"
    )


def read_template(text: str) -> str:
    """Return the chat template of a name of LLaMA-Factory's or Unsloth's."""
    known = {"llama3": "llama-3", "llama-3": "llama-3", "mistral": "mistral", "gemma": "gemma",
             "qwen": "qwen", "chatml": "chatml"}  # fmt: skip
    name = text.strip().lower()
    if name not in known and not name.endswith((".jinja", ".jinja2")):
        raise ValueError(
            "the chat template is the model's own. Drop it, or give one by --chat-template, which "
            f"takes {', '.join(dict.fromkeys(known.values()))}, or a Jinja file"
        )
    return known.get(name, text)


def read_glue(text: str) -> str:
    """Return the data set of a GLUE task, or a task such as `ner`."""
    name = text.strip().lower()
    if name in GLUE:
        return f"nyu-mll/glue --subset {name} --task text-classification"
    if name in ("ner", "pos"):
        raise ValueError(f"it is a task: --task {name}")
    raise ValueError(f"expected one of GLUE's: {', '.join(GLUE)}. Else --dataset names the data")


def refuse_checkpoint(_: str) -> str:
    """Say that a run goes on from its newest checkpoint, whichever is named."""
    raise ValueError(
        "a run goes on from its newest whole checkpoint. Use: --output-dir RUN --resume"
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("expected a number") from None
