"""`merge --quant`: a quantized merged model that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from command_line import Cli
from export_cases import export_to
from ftlevel import MergeConfig, merge
from ftlevel.artifacts.cards import load_card
from ftlevel.cli.app import run
from ftlevel.errors import RunError
from ftlevel.weights import quantize_shards
from run_files import ModelDir
from sampling import sample

Runs = Callable[[str, str], Path]
BASES = {
    "float": ("st", []),
    "4-bit": ("st", ["--quant", "4bit", "--double-quant"]),
    "gguf": ("x.gguf", []),
    "8-bit": ("st", ["--quant", "8bit"]),
}
METHODS = {
    "lora": [],
    "dora": ["--dora"],
    "rslora": ["--rslora"],
    "full": ["--method", "full"],
}
PAIRS = [
    *(
        (base, method, "4bit")
        for base in ("float", "4-bit", "gguf")
        for method in ("lora", "dora", "rslora")
    ),
    *((base, "lora", "8bit") for base in ("float", "8-bit", "gguf")),
    ("4-bit", "lora", "8bit"),
    ("8-bit", "lora", "4bit"),
]
TEXTS = [f"the module number {i} of the list is {i * 7}" for i in range(24)]


@pytest.fixture(scope="module")
def runs(tiny_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a function that trains a run, once per base and method; all bases are one model."""
    folder = tmp_path_factory.mktemp("low-bits")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "st").symlink_to(tiny_model_dir("qwen2", num_hidden_layers=1))
    export_to(str(folder / "x.gguf"), folder / "st", outtype="f32", verify=False)
    trained_runs: dict[tuple[str, str], Path] = {}

    def train(base: str, method: str) -> Path:
        key = base, method
        if key not in trained_runs:
            model, flags = BASES[base]
            trained_runs[key] = folder / f"run{len(trained_runs)}"
            assert run(["train", "--model", str(folder / model), "--max-steps", "3",
                        "--dataset", str(folder / "rows.jsonl"), "--task", "text-generation",
                        "--set", "data.max_eval_samples=4", "--learning-rate", "1e-2",
                        "--dtype", "float32", "--quiet", "--output-dir", str(trained_runs[key]),
                        *flags, *METHODS[method]]) == 0  # fmt: skip
        return trained_runs[key]

    return train


def merge_to(source: Path, out: Path, quant: str, **options: Any) -> dict[str, Any]:
    """Merge and return the summary."""
    return merge(
        MergeConfig(adapters=[str(source)], output_dir=out, quant=quant, **options)
    ).summary


def kl(reference: Any, other: Any, tokenizer_dir: Path) -> float:
    """Return the mean KL divergence of two models, computed with transformers and torch."""
    tokenizer, total = transformers.AutoTokenizer.from_pretrained(tokenizer_dir), []
    for text in TEXTS[:8]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            p, q = (m(ids).logits[0].float().log_softmax(-1) for m in (reference, other))
        total.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(total).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("base", "method", "quant"), sample(PAIRS))
def test_quantized_merge_keeps_training_effect(
    base: str, method: str, quant: str, runs: Runs, tmp_path: Path
) -> None:
    summary = merge_to(runs(base, method), tmp_path / "m", quant)
    assert summary["verified"]
    # 8-bit weights represent a run on 4 bits without loss.
    max_ratio = 1e-4 if (base, quant) == ("4-bit", "8bit") else 0.1
    assert summary["served"]["kl"] < max_ratio * summary["effect"]["kl"]
    assert summary["quantization"]["double_quant"] == (base == "4-bit" and quant == "4bit")
    assert load_card(tmp_path / "m").quantization["kind"] == quant
    # Loaded without ftlevel, it is close to the floating-point merge and not to its base.
    onto = "auto" if base in ("float", "gguf") else "dequantized"
    float_merge = merge(
        MergeConfig(adapters=[str(runs(base, method))], output_dir=tmp_path / "whole", onto=onto)
    )
    reference, quantized, base_model = (
        transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        for model_dir in (float_merge.path, tmp_path / "m", runs(base, method).parent / "st")
    )
    assert quantized.config.quantization_config.load_in_4bit == (quant == "4bit")
    assert kl(reference, quantized, float_merge.path) < 0.1 * kl(
        reference, base_model, float_merge.path
    )


@pytest.mark.slow
@pytest.mark.parametrize("base", [pytest.param("float", marks=pytest.mark.sweep), "4-bit", "gguf"])
def test_q4_0_export_with_calibration_keeps_training_effect(
    base: str, runs: Runs, tmp_path: Path
) -> None:
    source, kl_by_rows = runs(base, "lora"), {}
    for rows in (0, 20):
        path = tmp_path / f"{rows}.gguf"
        check = export_to(str(path), source, outtype="q4_0", calibration_rows=rows).summary["check"]
        kl_by_rows[rows] = check["beside_run"]["kl"]
    assert kl_by_rows[20] < 0.5 * kl_by_rows[0]
    # transformers reads the file with gguf's own code, without ftlevel.
    merge(MergeConfig(adapters=[str(source)], output_dir=tmp_path / "whole",
                      onto="dequantized" if base == "4-bit" else "auto"))  # fmt: skip
    calibrated, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name).eval()
        for name in ("20.gguf", "0.gguf")
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    merged_dir = tmp_path / "whole"
    assert kl(reference, calibrated, merged_dir) < kl(reference, rounded, merged_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "outtype"),
    [pytest.param("full", "q4_0", marks=pytest.mark.sweep), ("model", "q4_0"), ("full", "q5_0")],
)
def test_calibrated_export_of_full_model_is_closer_than_rounding(
    kind: str, outtype: str, runs: Runs, tmp_path: Path
) -> None:
    run_dir = runs("float", "full")
    source = run_dir if kind == "full" else run_dir.parent / "st"
    model_dir = run_dir / "adapter" if kind == "full" else source
    for rows in (0, 20):
        path = tmp_path / f"{rows}.gguf"
        check = export_to(str(path), source, outtype=outtype, calibration_rows=rows).summary[
            "check"
        ]
        assert (check["beside_run"] is not None) == bool(rows)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    calibrated, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name).eval()
        for name in ("20.gguf", "0.gguf")
    )
    assert kl(reference.eval(), calibrated, model_dir) < 0.7 * kl(reference, rounded, model_dir)


@pytest.mark.slow
def test_commands_accept_quantized_merged_model(runs: Runs, tmp_path: Path, cli: Cli) -> None:
    source, out = runs("4-bit", "lora"), str(tmp_path / "m")
    flags = ["--quant", "4bit", "--quant-type", "fp4", "--no-double-quant", "--calibration-rows"]
    output = cli(f"merge {source} --out {out}", *flags, "8")
    assert "in 4-bit fp4, compared with the run: " in output
    rows = source.parent / "rows.jsonl"
    result = cli.json(f"evaluate {out} --dataset {rows} --against {source} --no-base --json -q")
    assert result["against"]["rows"]["kl"] < 0.01
    cli(f"generate {out} --prompt the --max-new-tokens 2")
    (tmp_path / "new.jsonl").write_text('{"text": "the module"}\n')
    cli(
        f"predict {out} --dataset {tmp_path / 'new.jsonl'} --max-new-tokens 2 --output "
        f"{tmp_path / 'answers.jsonl'}"
    )
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_corrupted_quantized_weights_raise(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = quantize_shards.pack_4bit

    def pack_with_fault(codes: torch.Tensor, *rest: Any) -> Any:
        faulty = codes.clone()
        faulty[0, 0] = 15 - faulty[0, 0]
        return original(faulty, *rest)

    monkeypatch.setattr(quantize_shards, "pack_4bit", pack_with_fault)
    with pytest.raises(RunError, match=r"reloaded, has different weights\. Nothing was saved\."):
        merge_to(runs("4-bit", "lora"), tmp_path / "m", "4bit")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant-type", "fp4"], "--quant-type fp4 needs --quant 4bit (it is none)."),
        (["--quant", "8bit", "--double-quant"], "--double-quant needs --quant 4bit"),
        (["--quant", "4bit", "--onto", "original"], "cannot be used with --quant"),
        (["--onto", "4bit"], "Use --quant 4bit, which chooses the codes by what was trained"),
        (["--quant", "4bit", "--calibration-rows", "-1"], "--calibration-rows"),
    ],
)
def test_invalid_quantization_options_are_rejected(
    flags: list[str], message: str, cli: Cli
) -> None:
    assert message in " ".join(cli.fails("merge absent --out out", *flags).split())
