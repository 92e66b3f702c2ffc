"""Write docs/normal_forms.csv: each PEFT method's normal form on a tiny model, exact or refused.

    python scripts/normal_forms.py            every method, a minute of processor time
    python scripts/normal_forms.py HIRA MISS  some; the others' rows stay as they are

Each adapter is made by plain PEFT and moved at random, so that every tensor counts; ftlevel writes
it as plain LoRA, and plain PEFT says how far apart the two are. docs/serving.md is made of the
table by `python scripts/write_docs.py serving`.
"""

from __future__ import annotations

import csv
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

from export_cases import some_ids  # noqa: E402
from ftlevel.commands.export import export  # noqa: E402
from ftlevel.config import ExportConfig  # noqa: E402
from ftlevel.errors import FtlevelError  # noqa: E402
from ftlevel.merging.normal_form import PLAIN_FORMS  # noqa: E402
from ftlevel.methods import METHODS  # noqa: E402
from ftlevel.methods.lora_conversion import LoraConversion  # noqa: E402
from ftlevel.methods.merging import get_merge_error  # noqa: E402
from served_cases import CASES, LINEARS, make_adapter, peft_logits  # noqa: E402
from tiny_models import save_tiny  # noqa: E402

MAX_RANK = 32
"""Half of the model's width: what needs more has no small rank."""
CSV = ROOT / "docs" / "normal_forms.csv"
COLUMNS = ("method", "peft_type", "way", "rank", "difference", "largest", "effect", "merges", "why")
_MORE: dict[str, dict[str, Any]] = {
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
    """Return name → (PEFT type, settings): the forms of the tests, and every other method."""
    found = {}
    for name, case in CASES.items():
        cls = case.settings.get("cls", "LoraConfig")
        kind = str(getattr(peft, cls)(**_only_type(cls)).peft_type.value)
        found[name] = (kind, case.settings)
    seen = {kind for kind, _ in found.values()}
    for member, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        kind = str(getattr(member, "value", member))
        if kind in seen or not cls.__module__.startswith("peft."):
            continue
        settings = {"cls": cls.__name__, "target_modules": LINEARS, **_MORE.get(kind, {})}
        found[kind.lower().replace("_", " ")] = (kind, settings)
    return found


def _only_type(cls: str) -> dict[str, Any]:
    return {"total_step": 10, "tinit": 1, "tfinal": 1} if cls == "AdaLoraConfig" else {}


def measure(base: Path, folder: Path, name: str, kind: str, settings: dict[str, Any]) -> list[str]:
    """Return the row of one method."""
    place = folder / re.sub(r"\W", "-", name)
    merges = "no" if get_merge_error({"peft_type": kind}) else "yes"
    try:
        make_adapter(base, place, settings)
    except Exception as error:  # noqa: BLE001 - whatever PEFT refuses a made-up adapter by
        if known := PLAIN_FORMS.get(kind, LoraConversion()).error:
            return [name, kind, "refused", "", "", "", "", merges, f"{kind} {known}."]
        reason = " ".join(str(error).split())[:120]
        return [name, kind, "not made", "", "", "", "", merges, f"{type(error).__name__}: {reason}"]
    try:
        config = ExportConfig(model=str(place), out=folder / f"{place.name}-out",
                              format="peft", max_rank=MAX_RANK)  # fmt: skip
        adapter = export(config).summary["adapters"][0]
    except FtlevelError as error:
        reason = str(error).removeprefix(f"{place.name} cannot be written as peft: ")
        return [name, kind, "refused", "", "", "", "", merges, reason]
    except Exception as error:  # noqa: BLE001 - PEFT's own layers fail where they are asked
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return [name, kind, "not loaded", "", "", "", "", merges, reason]
    ids = some_ids()
    wanted, got = peft_logits(base, place, ids), peft_logits(base, config.out, ids)
    effect = float((wanted - peft_logits(base, None, ids)).abs().max())
    difference, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    numbers = [f"{value:.2g}" for value in (difference, largest, effect)]
    return [name, kind, adapter["way"], str(adapter["rank"]), *numbers, merges, ""]


def main(wanted: list[str]) -> int:
    """Measure, and write the table."""
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = save_tiny(folder / "base", "llama", tie_word_embeddings=True)
        for name, (kind, settings) in all_settings().items():
            if wanted and kind not in wanted and name not in wanted:
                continue
            rows.append(measure(base, folder, name, kind, settings))
            print(" | ".join(rows[-1]).replace(str(folder), ""), flush=True)
    rows += [row for row in ours() if not wanted or row[1] in wanted or row[0] in wanted]
    write(rows)
    return 0


def ours() -> list[list[str]]:
    """Return the rows of methods that ftlevel has and PEFT has not."""
    known = {str(getattr(member, "value", member)) for member, cls in
             PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls.__module__.startswith("peft.")}  # fmt: skip
    return [
        [f"ftlevel's {name}", kind, "refused", "", "", "", "", "no",
         f"{kind} {PLAIN_FORMS[kind].error}."]
        for name, method in METHODS.items()
        for kind in method.merge_info.peft_types
        if kind not in known
    ]  # fmt: skip


def write(rows: list[list[str]]) -> None:
    """Write the table: rows of methods that were not measured stay as they were."""
    old: list[list[str]] = []
    if CSV.is_file():
        with CSV.open(encoding="utf-8", newline="") as file:
            old = list(csv.reader(file))[1:]
    new = {row[0]: row for row in rows}
    order = [row[0] for row in old] + [row[0] for row in rows]
    every = {row[0]: row for row in old} | new
    with CSV.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *(every[name] for name in dict.fromkeys(order))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
