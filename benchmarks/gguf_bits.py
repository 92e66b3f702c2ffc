#!/usr/bin/env python3
"""What a few bits of GGUF keep of a model: by llama.cpp's own quantizer, beside ftlevel's codes.

    ftlevel export MODEL --outtype f32 --out whole.gguf
    npm install --ignore-scripts node-llama-cpp          # llama.cpp's libraries, built
    python benchmarks/gguf_bits.py whole.gguf --model MODEL --data data/wordnet-define \
        --llama node_modules/@node-llama-cpp/linux-x64/bins/linux-x64 --beside chosen.gguf

llama.cpp quantizes `whole.gguf` as `llama-quantize` does, by rounding and with an importance
matrix: the mean square of each linear's inputs over 96 training rows, by which it weighs the error
of each column. Every file is then held to the model in full precision by `ftlevel evaluate
--against`, on validation rows and on documentation; `--beside` are files that others wrote.

    python benchmarks/gguf_bits.py --model MODEL --run RUN --types q4_0,q5_0 --shrinkages 0,0.3,0.6

chooses codes as `ftlevel export` does, by second moments that are shrunk so far to their diagonal,
on 96 training rows of RUN, a run of MODEL that needs to have learned nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlevel.weights.gguf.file import name_map

FTYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q4_k_m": 15, "q5_k_m": 17}
"""`llama_ftype` of llama.h."""


class _Importance(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Told(ctypes.Structure):
    """`llama_model_quantize_params` of llama.h (2026), with room behind it."""

    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("output_type", ctypes.c_int32),
        ("embedding_type", ctypes.c_int32), ("flags", ctypes.c_bool * 8),
        ("imatrix", ctypes.c_void_p), ("rest", ctypes.c_void_p * 11),
    ]  # fmt: skip


class Quantizer:
    """llama.cpp's, in its shared library."""

    def __init__(self, folder: Path) -> None:
        """Load the libraries of a folder."""
        for name in ("libggml-base.so*", "libggml-cpu-x64.so", "libggml.*so*"):
            for path in sorted(folder.glob(name)):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(next(folder.glob("libllama.*so*"))))
        self._library.llama_model_quantize_default_params.restype = _Told
        self._library.llama_model_quantize.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Told)]  # fmt: skip

    def write(
        self, source: Path, out: Path, ftype: str, importance: dict[str, numpy.ndarray] | None
    ) -> None:
        """Quantize a file."""
        told = self._library.llama_model_quantize_default_params()
        told.ftype, told.nthread = FTYPES[ftype], 1
        if importance is not None:
            entries = (_Importance * (len(importance) + 1))()
            for entry, (name, values) in zip(entries, importance.items(), strict=False):
                entry.name, entry.data, entry.size = name.encode(), values.ctypes.data, len(values)
            told.imatrix = ctypes.cast(entries, ctypes.c_void_p).value
        code = self._library.llama_model_quantize(
            str(source).encode(), str(out).encode(), ctypes.byref(told)
        )
        if code:
            raise RuntimeError(f"llama_model_quantize gave {code}")


def measure_importance(model_path: str, rows: list[dict[str, Any]]) -> dict[str, numpy.ndarray]:
    """Return the mean square of every linear's inputs, by the names of GGUF."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def watch(place: str) -> Any:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].square().sum((0, 1), dtype=torch.float64)
            sums[place] = sums.get(place, 0) + squares

        return add

    names = name_map(model.config)
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(f"{names.get_name(name)}.weight"))
    with torch.inference_mode():
        for row in rows:
            talk = [
                {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"},
                {"role": "assistant", "content": row["output"]},
            ]
            ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)
            model(**ids)
            tokens += ids["input_ids"].numel()
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def hold(file: Path, model: str, data: str) -> tuple[float, float, float]:
    """Return the KL and the equal first choices on the rows, and the KL on documentation."""
    done = subprocess.run(
        [sys.executable, "-m", "ftlevel", "evaluate", str(file), "--against", model,
         "--dataset", data, "--task", "text-generation", "--max-eval-samples", "32",
         "--max-generate-samples", "1", "--max-new-tokens", "1", "--resamples", "0", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)["against"]
    return found["rows"]["kl"], found["rows"]["top1"], found["text"]["kl"]


def shrink(options: argparse.Namespace) -> None:
    """Print what is left of the model in each type with each share of shrinkage."""
    from ftlevel.config import MergeConfig
    from ftlevel.data.encoding.encode import Encoded
    from ftlevel.evaluation.two_models import Probe, compare_rows, cut_windows, read_eval_text
    from ftlevel.merging.low_bits import WeightsAsLoaded, choose_gguf_codes
    from ftlevel.merging.merge_input import choose_rows, resolve_merge_input
    from ftlevel.trained.load import load_ref
    from ftlevel.trained.model_ref import resolve_model
    from ftlevel.weights import codes

    inputs = resolve_merge_input(MergeConfig(adapters=[options.run], output_dir=Path("none")))
    rows = choose_rows(inputs, 32, 96)
    text = cut_windows(inputs.tokenizer, read_eval_text(None, 1024).content, 1024, 128)
    windows = [
        Encoded(ids, inputs.task.probe_labels(ids, inputs.card.labels, inputs.card.options), index)
        for index, ids in enumerate(text)
    ]
    on_rows, on_text, calibration = (
        Probe(part, inputs.objective, inputs.tokenizer.pad_token_id or 0, inputs.device)
        for part in (rows.compared, windows, rows.calibration)
    )

    def load() -> Any:
        return load_ref(resolve_model(options.model, device=inputs.device), inputs.device).model

    own = load()
    reference = [probe.score(own, inputs.dtype) for probe in (on_rows, on_text)]
    print("| type | shrinkage | rows: KL | same first choice | documentation: KL |")
    print("|---|--:|--:|--:|--:|")
    for outtype in options.types.split(","):
        for share in map(float, options.shrinkages.split(",")):
            codes.SHRINKAGE = share
            model = load()
            choose = choose_gguf_codes(
                own, WeightsAsLoaded(own), calibration, inputs.dtype, outtype
            )
            with torch.no_grad():
                for name, module in model.named_modules():
                    if isinstance(module, torch.nn.Linear) and name != "lm_head":
                        module.weight.copy_(choose(f"{name}.weight").value(outtype))
            found = [
                compare_rows(was, probe.score(model, inputs.dtype))
                for was, probe in zip(reference, (on_rows, on_text), strict=True)
            ]
            print(f"| {outtype} | {share:g} | {found[0].kl:.4f} | {found[0].top1:.1%} | "
                  f"{found[1].kl:.4f} |", flush=True)  # fmt: skip


def main() -> None:
    """Quantize, measure and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("whole", type=Path, nargs="?")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="data/wordnet-define")
    parser.add_argument("--run", help="a run of the model, for --shrinkages")
    parser.add_argument("--shrinkages", help="shares to try, with commas between")
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--types", default="q4_0,q4_k_m,q5_0,q8_0")
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    options = parser.parse_args()
    if options.shrinkages:
        shrink(options)
        return
    print("| file | MB | rows: KL | same first choice | documentation: KL |\n|---|--:|--:|--:|--:|")

    def show(name: str, file: Path) -> None:
        kl, top1, text = hold(file, options.model, options.data)
        size = file.stat().st_size / 1e6
        print(f"| {name} | {size:.0f} | {kl:.4f} | {top1:.1%} | {text:.4f} |", flush=True)

    for file in options.beside:
        show(file.name, file)
    if options.llama:
        lines = (Path(options.data) / "train.jsonl").read_text(encoding="utf-8").splitlines()
        importance = measure_importance(options.model, [json.loads(line) for line in lines[:96]])
        quantizer = Quantizer(options.llama)
        with tempfile.TemporaryDirectory() as folder:
            for ftype in options.types.split(","):
                for name, weighs in (("rounded", None), ("importance matrix", importance)):
                    out = Path(folder) / f"{ftype}.gguf"
                    quantizer.write(options.whole, out, ftype, weighs)
                    show(f"{ftype}, llama.cpp, {name}", out)


if __name__ == "__main__":
    main()
