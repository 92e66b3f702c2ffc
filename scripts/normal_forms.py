"""Write docs/normal_forms.csv: conversion of each PEFT method to plain LoRA, exact or refused.

    python scripts/normal_forms.py            every method, a minute of CPU time
    python scripts/normal_forms.py HIRA MISS  some; other rows are not changed

Plain PEFT creates each adapter with random weights; ftlevel writes it as plain LoRA, and plain PEFT
compares the logits of both. `python scripts/write_docs.py serving` writes docs/serving.md from the
table.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import peft  # noqa: E402 - the tests' modules are found first
from peft import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

from export_cases import create_ids  # noqa: E402
from ftlevel.errors import FtlevelError  # noqa: E402
from ftlevel.extras.serving.config import ExportConfig  # noqa: E402
from ftlevel.extras.serving.exporting import export  # noqa: E402
from ftlevel.merging.normal_form import PLAIN_FORMS  # noqa: E402
from ftlevel.methods import METHODS  # noqa: E402
from ftlevel.methods.lora_conversion import LoraConversion  # noqa: E402
from ftlevel.methods.merging import get_merge_error  # noqa: E402
from page_parts import update_csv  # noqa: E402
from served_cases import CASES, LINEARS, peft_logits, write_adapter  # noqa: E402
from tiny_models import save_tiny  # noqa: E402

MAX_RANK = 32
"""Half of the model's width."""
COLUMNS = ("method", "peft_type", "way", "rank", "difference", "largest", "effect", "merges", "why")
_EXTRA_SETTINGS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 64},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HRA": {"r": 4},
    "LN_TUNING": {"target_modules": ["norm"]},
    "OFT": {"oft_block_size": 16},
    "PSOFT": {"r": 8},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TINYLORA": {"r": 2},
    "VBLORA": {"r": 2, "num_vectors": 16, "vector_length": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 64},
}


def all_settings() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return name → (PEFT type, settings): the cases of the tests, and every other method."""
    settings_by_name = {}
    for name, case in CASES.items():
        cls = case.settings.get("cls", "LoraConfig")
        kind = str(getattr(peft, cls)(**_only_type(cls)).peft_type.value)
        settings_by_name[name] = (kind, case.settings)
    kinds = {kind for kind, _ in settings_by_name.values()}
    for member, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        kind = str(getattr(member, "value", member))
        if kind in kinds or not cls.__module__.startswith("peft."):
            continue
        settings = {"cls": cls.__name__, "target_modules": LINEARS, **_EXTRA_SETTINGS.get(kind, {})}
        settings_by_name[kind.lower().replace("_", " ")] = (kind, settings)
    return settings_by_name


def _only_type(cls: str) -> dict[str, Any]:
    return {"total_step": 10, "tinit": 1, "tfinal": 1} if cls == "AdaLoraConfig" else {}


def measure(base: Path, folder: Path, name: str, kind: str, settings: dict[str, Any]) -> list[str]:
    """Return the row of one method."""
    adapter_dir = folder / re.sub(r"\W", "-", name)
    merges = "no" if get_merge_error({"peft_type": kind}) else "yes"
    try:
        write_adapter(base, adapter_dir, settings)
    except Exception as error:  # noqa: BLE001 - PEFT raises many errors for random adapters
        if conversion_error := PLAIN_FORMS.get(kind, LoraConversion()).error:
            return [name, kind, "refused", "", "", "", "", merges, f"{kind} {conversion_error}."]
        reason = " ".join(str(error).split())[:120]
        return [name, kind, "not made", "", "", "", "", merges, f"{type(error).__name__}: {reason}"]
    try:
        config = ExportConfig(model=str(adapter_dir), out=folder / f"{adapter_dir.name}-out",
                              format="peft", max_rank=MAX_RANK)  # fmt: skip
        adapter = export(config).summary["adapters"][0]
    except FtlevelError as error:
        reason = str(error).removeprefix(f"{adapter_dir.name} cannot be written as peft: ")
        return [name, kind, "refused", "", "", "", "", merges, reason]
    except Exception as error:  # noqa: BLE001 - PEFT's layers raise many errors
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return [name, kind, "not loaded", "", "", "", "", merges, reason]
    ids = create_ids()
    expected, actual = peft_logits(base, adapter_dir, ids), peft_logits(base, config.out, ids)
    effect = float((expected - peft_logits(base, None, ids)).abs().max())
    difference, largest = float((actual - expected).abs().max()), float(expected.abs().max())
    values = [f"{value:.2g}" for value in (difference, largest, effect)]
    return [name, kind, adapter["way"], str(adapter["rank"]), *values, merges, ""]


def main(names: list[str]) -> int:
    """Measure and write the table."""
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = save_tiny(folder / "base", "llama", tie_word_embeddings=True)
        for name, (kind, settings) in all_settings().items():
            if names and kind not in names and name not in names:
                continue
            rows.append(measure(base, folder, name, kind, settings))
            print(" | ".join(rows[-1]).replace(str(folder), ""), flush=True)
    rows += [row for row in get_ftlevel_rows() if not names or row[1] in names or row[0] in names]
    update_csv(
        "normal_forms.csv", (dict(zip(COLUMNS, row, strict=True)) for row in rows), ["method"]
    )
    return 0


def get_ftlevel_rows() -> list[list[str]]:
    """Return the rows of ftlevel's methods that PEFT does not have."""
    peft_types = {str(getattr(member, "value", member)) for member, cls in
             PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls.__module__.startswith("peft.")}  # fmt: skip
    return [
        [f"ftlevel's {name}", kind, "refused", "", "", "", "", "no",
         f"{kind} {PLAIN_FORMS[kind].error}."]
        for name, method in METHODS.items()
        for kind in method.merge_info.peft_types
        if kind not in peft_types
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
