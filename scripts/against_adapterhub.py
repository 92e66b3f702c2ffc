"""Compare bottleneck adapters with AdapterHub's `adapters`, both ways, on tiny models.

`adapters` needs another transformers than ftlevel, so two processes exchange files:

    python3 -m venv adapterhub && adapterhub/bin/pip install adapters==1.3.0 torch
    python scripts/against_adapterhub.py --python adapterhub/bin/python

There bases and adapters are filled with made-up weights, and saved with their logits; ftlevel reads
them. Then ftlevel writes adapters of its own, and the package reads those.
Prints the largest difference of the logits, of the largest logit where that is over 1, and how far
the adapter moves them from the base's.
`--record tests/unit/trained/adapterhub_figures.json` writes what tests are held against.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from adapterhub_cases import (
    CLASSIFIER,
    FAMILIES,
    HEAD_CLASS,
    LABELS,
    NAME,
    READER,
    RECORDED,
    TAGGER,
    Case,
    cases,
    class_settings,
    fill,
    logits_of,
    own_cases,
)

BOUND = 1e-5
# In the environment of `adapters`.


def make(work: Path, small: bool) -> None:
    """Make bases, adapters and logits."""
    import torch
    import transformers

    for family, (auto_class, sizes) in FAMILIES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes)
        model = getattr(transformers, auto_class).from_config(config)
        for name, parameter in model.named_parameters():
            fill(name, parameter)
        model.save_pretrained(work / "bases" / family)
    for case in cases(small):
        _make_case(case, work)


def _make_case(case: Case, work: Path) -> None:
    import adapters  # type: ignore[import-not-found]  # of the other environment
    import torch
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(case.number + 1)
    base, folder = work / "bases" / case.family, work / str(case.number)
    name, fields = case.config or ("", {})
    if case.head is None:
        loader = getattr(transformers, case.auto_class)
        model = loader.from_pretrained(base, **class_settings(case))
        adapters.init(model)
    else:
        model = adapters.AutoAdapterModel.from_pretrained(base)
        labels = {} if case.auto_class == READER else {
            "num_labels": len(LABELS), "id2label": dict(enumerate(LABELS))}  # fmt: skip
        head = getattr(adapters, HEAD_CLASS[case.auto_class])
        model.add_prediction_head(head(model, NAME, **labels, **case.head))
    before = logits_of(model, case)
    model.add_adapter(NAME, config=getattr(adapters, name)(**fields))
    model.set_active_adapters(NAME)
    for key, parameter in model.named_parameters():
        in_head = case.auto_class in HEAD_CLASS and not key.startswith(model.base_model_prefix)
        if f".adapters.{NAME}." in key or in_head:
            fill(key, parameter)
    model.save_adapter(str(folder), NAME, with_head=case.auto_class in HEAD_CLASS)
    save_file({"logits": logits_of(model, case), "before": before}, folder / "logits")


def check(work: Path, small: bool) -> None:
    """Read what ftlevel wrote, and print the differences as JSON."""
    import adapters
    import transformers
    from safetensors.torch import load_file

    found = []
    for case in own_cases(small):
        folder = work / str(case.number)
        if not (folder / "logits").is_file():
            continue
        expected = load_file(folder / "logits")
        loader = getattr(transformers, case.auto_class)
        model = loader.from_pretrained(work / "bases" / case.family, **class_settings(case))
        adapters.init(model)
        model.load_adapter(str(folder / "hub"), set_active=True)
        found.append(_row(case, logits_of(model, case), expected))
    sys.stdout.write(json.dumps(found))


def _row(case: Case, logits: Any, expected: dict[str, Any]) -> list[Any]:
    scale = expected["logits"].abs().max().clamp(min=1)
    difference = ((logits - expected["logits"]).abs().max() / scale).item()
    moved = (expected["logits"] - expected["before"]).abs().max().item()
    return [case.family, case.auto_class, case.style, difference, moved]


# In the environment of ftlevel.


def _load_base(case: Case, work: Path) -> Any:
    import transformers

    loader = getattr(transformers, case.auto_class)
    return loader.from_pretrained(work / "bases" / case.family, **class_settings(case))


def read(case: Case, work: Path) -> list[Any]:
    """Read an adapter of AdapterHub's, and compare."""
    from safetensors.torch import load_file

    from ftlevel.trained.adapt import load_adapter

    expected = load_file(work / str(case.number) / "logits")
    model = load_adapter(_load_base(case, work), work / str(case.number))
    return _row(case, logits_of(model, case), expected)


def write(case: Case, work: Path) -> str:
    """Write a random adapter of ftlevel's for AdapterHub; return why it cannot be, if so."""
    import torch
    from peft import get_peft_model
    from safetensors.torch import save_file

    from ftlevel.artifacts.cards import AdapterCard
    from ftlevel.config import ExportConfig
    from ftlevel.errors import InputError
    from ftlevel.events import NullListener
    from ftlevel.merging.formats.adapterhub import plan_export
    from ftlevel.merging.formats.base import MergeOutput
    from ftlevel.methods.bottleneck.layer import BottleneckConfig
    from ftlevel.models.sources import resolve_source
    from ftlevel.models.targets import find_heads
    from ftlevel.trained.model_ref import ModelRef

    base, folder = work / "bases" / case.family, work / str(case.number)
    torch.manual_seed(case.number)
    model = _load_base(case, work)
    before = logits_of(model, case)
    heads = find_heads(model) if case.auto_class in HEAD_CLASS else []
    try:
        config = BottleneckConfig(placement=case.style, bottleneck_dim=5, non_linearity="gelu",
                                  modules_to_save=heads or None, init_weights=False)  # fmt: skip
        adapted = get_peft_model(model, config)
        for key, parameter in adapted.named_parameters():
            if "bottleneck_" in key or "modules_to_save" in key:
                fill(key, parameter)
        adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        tasks = {CLASSIFIER: "text-classification", TAGGER: "token-classification",
                 READER: "question-answering", "AutoModelForMaskedLM": "masked-lm"}  # fmt: skip
        card = AdapterCard(
            method="adapter", task=tasks.get(case.auto_class, "text-generation"),
            base={"name": str(base)}, quantization={"kind": "none"}, dtype="float32",
            max_length=32, labels=LABELS if case.auto_class in (CLASSIFIER, TAGGER) else [],
            heads=heads,
        )  # fmt: skip
        found = ModelRef(resolve_source(str(base)), folder / "adapter", card)
        asked = ExportConfig(model=str(folder), format="adapterhub", out=folder / "hub")
        planned = plan_export(asked, found)
        (folder / "hub").mkdir()
        planned.write(folder / "hub", "cpu", NullListener(), lambda _: MergeOutput({}))
    except (InputError, ValueError) as error:
        return str(error)
    save_file({"logits": logits_of(adapted, case), "before": before}, folder / "logits")
    return ""


def record(work: Path, file: Path) -> None:
    """Write what tests are held against without `adapters`: settings, shapes and some logits."""
    import torch
    from safetensors.torch import load_file

    kept = []
    for case in cases(small=True):
        if case.auto_class in HEAD_CLASS or case.style not in RECORDED or case.family == "roberta":
            continue
        folder = work / str(case.number)
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        logits = load_file(folder / "logits")["logits"][:, -1, :6]
        kept.append(
            {
                "family": case.family,
                "style": case.style,
                "auto_class": case.auto_class,
                "settings": {**settings, "model_name": "base"},
                "shapes": {name: list(tensor.shape) for name, tensor in weights.items()},
                "logits": [[round(number, 6) for number in row] for row in logits.tolist()],
            }
        )
    lines = ",\n".join(json.dumps(case) for case in kept)
    note = (
        "adapters 1.3.0, by scripts/against_adapterhub.py --record; weights are what fill() gives"
    )
    file.write_text(f'{{"made by": "{note}", "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def report(title: str, rows: list[list[Any]]) -> float:
    """Print a table, and return the largest difference in it."""
    print(f"\n## {title}\n\n| model | class | style | largest difference | moved |")
    print("|---|---|---|---:|---:|")
    for family, auto_class, style, difference, moved in rows:
        kind = auto_class.removeprefix("AutoModelFor")
        print(f"| {family} | {kind} | {style} | {difference:.1e} | {moved:.2f} |")
    return float(max(row[3] for row in rows))


def main() -> int:
    """Run one side, or both; return 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--python", help="of an environment with adapters 1.3.0")
    parser.add_argument("--small", action="store_true", help="six families")
    parser.add_argument("--record", type=Path, help="write cases for the tests")
    parser.add_argument("--side", choices=["make", "check"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        {"make": make, "check": check}[given.side](given.work, given.small)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)

        def theirs(side: str) -> str:
            command = [given.python, __file__, "--side", side, "--work", str(work)]
            command += ["--small"] * given.small
            return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

        theirs("make")
        worst = report("read by ftlevel", [read(case, work) for case in cases(given.small)])
        for case in own_cases(given.small):
            if refused := write(case, work):
                print(f"{case.family} {case.style}: {refused}", file=sys.stderr)
        worst = max(worst, report("written by ftlevel", json.loads(theirs("check"))))
        if given.record:
            record(work, given.record)
    print(f"\nlargest difference {worst:.1e}, bound {BOUND:.0e}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
