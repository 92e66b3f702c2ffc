"""Every base × every conversion of a run; `make sweeps` has both precisions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export_cases import export_to
from ftlevel import MergeConfig, merge
from ftlevel.artifacts.cards import load_card
from ftlevel.cli.app import run
from ftlevel.commands.quantize import quantize
from ftlevel.config import QuantizeConfig
from run_files import ModelDir

BASES = {
    "float": ("st", []),
    "4-bit": ("st", ["--method", "qlora"]),
    "8-bit": ("st", ["--method", "qlora", "--quant", "8bit"]),
    "gguf": ("x.gguf", []),
    "gguf, 4-bit": ("x.gguf", ["--method", "qlora"]),
}
CONVERSIONS = ("merge", "merge --dtype", "export", "quantize")
OTHER_DTYPE = {"bfloat16": "float32", "float32": "bfloat16"}


@pytest.fixture(scope="module")
def runs(
    tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Return a function that trains a run, once per base and precision; all bases are one model."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"text": f"the module number {i} of the list is {i * 7}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "st").symlink_to(tiny_model_dir("qwen2", num_hidden_layers=1))
    export_to(str(folder / "x.gguf"), folder / "st", outtype="f32", verify=False)
    trained_runs: dict[tuple[str, str], Path] = {}

    def train(base: str, dtype: str) -> Path:
        key = base, dtype
        if key not in trained_runs:
            model, method = BASES[base]
            trained_runs[key] = folder / f"run{len(trained_runs)}"
            assert run(["train", "--model", str(folder / model), "--max-steps", "1",
                        "--dataset", str(folder / "rows.jsonl"), "--task", "text-generation",
                        "--set", "data.max_eval_samples=2", "--learning-rate", "2e-2",
                        "--dtype", dtype, "--quiet", "--output-dir", str(trained_runs[key]),
                        *method]) == 0  # fmt: skip
        return trained_runs[key]

    return train


def describe_precision(source: Path) -> str:
    kind = load_card(source / "adapter").quantization["kind"]
    return "floating point" if kind == "none" else "quantized"


def convert(conversion: str, source: Path, dtype: str, out: Path) -> dict[str, Any]:
    """Convert a run and return the summary of its merge."""
    if conversion == "export":
        summary = export_to(str(out / "x.gguf"), source).summary
        return dict(summary["merged"])
    to_dtype = OTHER_DTYPE[dtype] if conversion == "merge --dtype" else "auto"
    onto = "dequantized" if "quantized" in describe_precision(source) else "auto"
    result = merge(MergeConfig(adapters=[str(source)], output_dir=out / "merged", dtype=to_dtype,
                               onto=onto))  # fmt: skip
    if conversion == "quantize":
        config = QuantizeConfig(model=str(result.path), out=out / "packed", quant="4bit",
                                measure=False)  # fmt: skip
        assert quantize(config).summary["quantized_linears"] == 7
        prompt_options = ["--prompt", "the", "--max-new-tokens", "1"]
        assert run(["generate", str(out / "packed"), *prompt_options]) == 0
    return result.summary


CELLS = [
    pytest.param(base, dtype, how, marks=pytest.mark.sweep if (i + j + k) % 4 else [])
    for i, base in enumerate(BASES)
    for j, dtype in enumerate(OTHER_DTYPE)
    for k, how in enumerate(CONVERSIONS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "dtype", "conversion"), CELLS)
def test_converted_model_matches_run(
    base: str, dtype: str, conversion: str, runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    summary = convert(conversion, runs(base, dtype), dtype, tmp_path)
    assert summary["verified"]
    assert summary["agreement"]["kl"] < 1e-3
    assert summary["onto"] == ("original" if base in ("float", "gguf") else "dequantized")
    if conversion != "export":  # the summary of export is shorter
        before_rounding = summary["before_rounding"]
        assert before_rounding["mean_difference"] <= 1e-6 * before_rounding["scale"]
        assert summary["agreement"]["kl"] < 1e-3 * summary["effect"]["kl"] + 1e-5
        assert summary["written"]["merged"] == 10  # three of the linears have biases
