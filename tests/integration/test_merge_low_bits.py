"""`merge --quant`: a merged model in the bits that are served, read by transformers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from export_cases import export_to
from ftlevel import MergeConfig, merge
from ftlevel.artifacts.cards import read_card
from ftlevel.cli.app import run
from ftlevel.errors import RunError
from ftlevel.merging import low_bits

TinyModelDir = Callable[..., Path]
Runs = Callable[[str, str], Path]
BASES = {
    "float": ("st", []),
    "4-bit": ("st", ["--method", "qlora", "--double-quant"]),
    "gguf": ("x.gguf", []),
    "gguf, 4-bit": ("x.gguf", ["--method", "qlora"]),
    "8-bit": ("st", ["--method", "qlora", "--quant", "8bit"]),
}
METHODS = {
    "lora": [],
    "dora": ["--use-dora"],
    "rslora": ["--rslora"],
    "ia3": ["--method", "ia3"],
    "ln-tuning": ["--method", "ln-tuning"],
}
IDS = torch.randint(0, 90, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def runs(tiny_model_dir: TinyModelDir, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a factory of runs by base and method; the bases are one model."""
    folder = tmp_path_factory.mktemp("low-bits")
    rows = [{"text": f"the module number {i} of the list is {i * 7}"} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "st").symlink_to(tiny_model_dir("qwen2", num_hidden_layers=1))
    export_to(str(folder / "x.gguf"), folder / "st", outtype="f32", verify=False)
    made: dict[tuple[str, str], Path] = {}

    def make(base: str, method: str) -> Path:
        key = base, method
        if key not in made:
            model, flags = BASES[base]
            made[key] = folder / f"run{len(made)}"
            more = METHODS[method]
            own = flags[2:] if "--method" in more else flags
            own = ["--quant", "4bit", *own] if "4-bit" in base and "--method" in more else own
            assert run(["train", "--model", str(folder / model), "--max-steps", "3",
                        "--dataset", str(folder / "rows.jsonl"), "--task", "text-generation",
                        "--set", "data.max_eval_samples=4", "--learning-rate", "1e-2",
                        "--dtype", "float32", "--quiet", "--output-dir", str(made[key]),
                        *own, *more]) == 0  # fmt: skip
        return made[key]

    return make


def merge_into(source: Path, out: Path, quant: str, **more: Any) -> dict[str, Any]:
    """Return the summary of a merge."""
    return merge(MergeConfig(adapters=[str(source)], output_dir=out, quant=quant, **more)).summary


def kl(reference: Any, found: Any) -> float:
    """Return how far one model is from another by transformers and torch alone."""
    with torch.no_grad():
        p, q = (m(IDS).logits.float().log_softmax(-1) for m in (reference, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["4bit", "8bit"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_every_pair_keeps_what_was_trained(
    base: str, method: str, quant: str, runs: Runs, tmp_path: Path
) -> None:
    found = merge_into(runs(base, method), tmp_path / "m", quant)
    assert found["verified"]
    print(base, method, quant, found["served"]["kl"], found["effect"]["kl"])
    assert found["quantization"]["double_quant"] == (base == quant.replace("4b", "4-b"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.quantization_config.load_in_4bit == (quant == "4bit")
