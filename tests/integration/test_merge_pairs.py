"""Every base × every use of the merged model; `make sweeps` has both precisions."""

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

TinyModelDir = Callable[..., Path]
BASES = {
    "float": ("st", []),
    "4-bit": ("st", ["--method", "qlora"]),
    "8-bit": ("st", ["--method", "qlora", "--quant", "8bit"]),
    "gguf": ("x.gguf", []),
    "gguf, 4-bit": ("x.gguf", ["--method", "qlora"]),
}
BECOMES = ("merge", "merge --dtype", "export", "quantize")
OTHER = {"bfloat16": "float32", "float32": "bfloat16"}


@pytest.fixture(scope="module")
def runs(
    tiny_model_dir: TinyModelDir, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Return a factory of runs by base and precision; the bases are one model."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"text": f"the module number {i} of the list is {i * 7}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "st").symlink_to(tiny_model_dir("qwen2", num_hidden_layers=1))
    export_to(str(folder / "x.gguf"), folder / "st", outtype="f32", verify=False)
    made: dict[tuple[str, str], Path] = {}

    def make(base: str, dtype: str) -> Path:
        key = base, dtype
        if key not in made:
            model, method = BASES[base]
            made[key] = folder / f"run{len(made)}"
            assert run(["train", "--model", str(folder / model), "--max-steps", "1",
                        "--dataset", str(folder / "rows.jsonl"), "--task", "text-generation",
                        "--set", "data.max_eval_samples=2", "--learning-rate", "2e-2",
                        "--dtype", dtype, "--quiet", "--output-dir", str(made[key]),
                        *method]) == 0  # fmt: skip
        return made[key]

    return make


def describe(source: Path) -> str:
    kind = load_card(source / "adapter").quantization["kind"]
    return "floating point" if kind == "none" else "quantized"


def become(how: str, source: Path, dtype: str, out: Path) -> dict[str, Any]:
    """Return the summary of the merge in it."""
    if how == "export":
        summary = export_to(str(out / "x.gguf"), source).summary
        return dict(summary["merged"])
    wish = OTHER[dtype] if how == "merge --dtype" else "auto"
    onto = "dequantized" if "quantized" in describe(source) else "auto"
    result = merge(MergeConfig(adapters=[str(source)], output_dir=out / "merged", dtype=wish,
                               onto=onto))  # fmt: skip
    if how == "quantize":
        kind = QuantizeConfig(model=str(result.path), out=out / "packed", quant="4bit",
                              measure=False)  # fmt: skip
        assert quantize(kind).summary["quantized_linears"] == 7
        asked = ["--prompt", "the", "--max-new-tokens", "1"]
        assert run(["generate", str(out / "packed"), *asked]) == 0
    return result.summary


CELLS = [
    pytest.param(base, dtype, how, marks=pytest.mark.sweep if (i + j + k) % 4 else [])
    for i, base in enumerate(BASES)
    for j, dtype in enumerate(OTHER)
    for k, how in enumerate(BECOMES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "dtype", "how"), CELLS)
def test_every_pair_becomes_the_model_that_was_trained(
    base: str, dtype: str, how: str, runs: Callable[[str, str], Path], tmp_path: Path
) -> None:
    found = become(how, runs(base, dtype), dtype, tmp_path)
    assert found["verified"]
    assert found["agreement"]["kl"] < 1e-3
    assert found["onto"] == ("original" if base in ("float", "gguf") else "dequantized")
    if how != "export":  # whose summary is shorter
        exact = found["before_rounding"]
        assert exact["mean_difference"] <= 1e-6 * exact["scale"]
        assert found["agreement"]["kl"] < 1e-3 * found["effect"]["kl"] + 1e-5
        assert found["written"]["merged"] == 10  # three of the linears have biases
