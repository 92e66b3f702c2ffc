"""`merge --quant`: a quantized merged model that transformers loads."""

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
from ftlevel.artifacts.cards import load_card
from ftlevel.cli.app import run
from ftlevel.errors import RunError
from ftlevel.weights import quantize_shards
from sampling import sample

TinyModelDir = Callable[..., Path]
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
def runs(tiny_model_dir: TinyModelDir, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return a factory of runs by base and method; the bases are one model."""
    folder = tmp_path_factory.mktemp("low-bits")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (folder / "st").symlink_to(tiny_model_dir("qwen2", num_hidden_layers=1))
    export_to(str(folder / "x.gguf"), folder / "st", outtype="f32", verify=False)
    made: dict[tuple[str, str], Path] = {}

    def make(base: str, method: str) -> Path:
        key = base, method
        if key not in made:
            model, flags = BASES[base]
            made[key] = folder / f"run{len(made)}"
            assert run(["train", "--model", str(folder / model), "--max-steps", "3",
                        "--dataset", str(folder / "rows.jsonl"), "--task", "text-generation",
                        "--set", "data.max_eval_samples=4", "--learning-rate", "1e-2",
                        "--dtype", "float32", "--quiet", "--output-dir", str(made[key]),
                        *flags, *METHODS[method]]) == 0  # fmt: skip
        return made[key]

    return make


def merge_into(source: Path, out: Path, quant: str, **more: Any) -> dict[str, Any]:
    """Return the summary of a merge."""
    return merge(MergeConfig(adapters=[str(source)], output_dir=out, quant=quant, **more)).summary


def kl(reference: Any, found: Any, place: Path) -> float:
    """Return how far one model is from another by transformers and torch alone."""
    tokenizer, total = transformers.AutoTokenizer.from_pretrained(place), []
    for text in TEXTS[:8]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            p, q = (m(ids).logits[0].float().log_softmax(-1) for m in (reference, found))
        total.append((p.exp() * (p - q)).sum(-1))
    return float(torch.cat(total).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("base", "method", "quant"), sample(PAIRS))
def test_every_pair_keeps_what_was_trained(
    base: str, method: str, quant: str, runs: Runs, tmp_path: Path
) -> None:
    found = merge_into(runs(base, method), tmp_path / "m", quant)
    assert found["verified"]
    # In 8 bits nothing that was trained on 4 bits is lost: it is rounded as it was trained.
    most = 1e-4 if (base, quant) == ("4-bit", "8bit") else 0.1
    assert found["served"]["kl"] < most * found["effect"]["kl"]
    assert found["quantization"]["double_quant"] == (base == "4-bit" and quant == "4bit")
    assert load_card(tmp_path / "m").quantization["kind"] == quant
    # Without ftlevel it is the model in floating point, nearly, and not its base.
    onto = "auto" if base in ("float", "gguf") else "dequantized"
    whole = merge(
        MergeConfig(adapters=[str(runs(base, method))], output_dir=tmp_path / "whole", onto=onto)
    )
    reference, served, plain = (
        transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        for place in (whole.path, tmp_path / "m", runs(base, method).parent / "st")
    )
    assert served.config.quantization_config.load_in_4bit == (quant == "4bit")
    assert kl(reference, served, whole.path) < 0.1 * kl(reference, plain, whole.path)


@pytest.mark.slow
@pytest.mark.parametrize("base", [pytest.param("float", marks=pytest.mark.sweep), "4-bit", "gguf"])
def test_a_gguf_in_4_bits_keeps_what_was_trained(base: str, runs: Runs, tmp_path: Path) -> None:
    source, found = runs(base, "lora"), {}
    for rows in (0, 20):
        path = tmp_path / f"{rows}.gguf"
        check = export_to(str(path), source, outtype="q4_0", calibration_rows=rows).summary["check"]
        found[rows] = check["beside_run"]["kl"]
    assert found[20] < 0.5 * found[0]
    # transformers reads the file with gguf's own code, without ftlevel.
    merge(MergeConfig(adapters=[str(source)], output_dir=tmp_path / "whole",
                      onto="dequantized" if base == "4-bit" else "auto"))  # fmt: skip
    chosen, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name).eval()
        for name in ("20.gguf", "0.gguf")
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    place = tmp_path / "whole"
    assert kl(reference, chosen, place) < kl(reference, rounded, place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "outtype"),
    [pytest.param("full", "q4_0", marks=pytest.mark.sweep), ("model", "q4_0"), ("full", "q5_0")],
)
def test_a_whole_model_in_few_bits_is_nearer_than_rounded(
    kind: str, outtype: str, runs: Runs, tmp_path: Path
) -> None:
    run_of = runs("float", "full")
    source = run_of if kind == "full" else run_of.parent / "st"
    place = run_of / "adapter" if kind == "full" else source
    for rows in (0, 20):
        path = tmp_path / f"{rows}.gguf"
        check = export_to(str(path), source, outtype=outtype, calibration_rows=rows).summary[
            "check"
        ]
        assert (check["beside_run"] is not None) == bool(rows)
    reference = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    chosen, rounded = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name).eval()
        for name in ("20.gguf", "0.gguf")
    )
    assert kl(reference.eval(), chosen, place) < 0.7 * kl(reference, rounded, place)


@pytest.mark.slow
def test_it_is_nearer_to_plain_peft_than_merging_as_peft_does(runs: Runs, tmp_path: Path) -> None:
    """The reference is PEFT's model on bitsandbytes' base, without ftlevel."""
    source = runs("4-bit", "lora")
    merge_into(source, tmp_path / "m", "4bit")

    def trained() -> Any:
        form = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
        base = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent / "st", quantization_config=form, dtype=torch.float32
        )
        return PeftModel.from_pretrained(base, source / "adapter").eval()

    with pytest.warns(UserWarning, match="rounding errors"):
        trained().merge_and_unload().save_pretrained(tmp_path / "peft")
    served, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        for place in (tmp_path / "m", tmp_path / "peft")
    )
    place = source / "adapter"
    assert kl(trained(), served, place) < 0.5 * kl(trained(), theirs, place)


@pytest.mark.slow
def test_the_commands_take_it_as_a_model(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = runs("4-bit", "lora"), str(tmp_path / "m")
    flags = ["--quant", "4bit", "--quant-type", "fp4", "--no-double-quant", "--calibration-rows"]
    assert run(["merge", str(source), "--out", out, *flags, "8"]) == 0
    said = capsys.readouterr().out
    assert "in 4-bit fp4, compared with the run: " in said
    rows = source.parent / "rows.jsonl"
    assert run(["evaluate", out, "--dataset", str(rows), "--against", str(source), "--no-base",
                "--json", "-q"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["against"]["rows"]["kl"] < 0.01
    assert run(["generate", out, "--prompt", "the", "--max-new-tokens", "2"]) == 0
    (tmp_path / "new.jsonl").write_text('{"text": "the module"}\n')
    assert run(["predict", out, "--dataset", str(tmp_path / "new.jsonl"), "--max-new-tokens", "2",
                "--output", str(tmp_path / "answers.jsonl")]) == 0  # fmt: skip
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_files_that_are_read_as_other_weights_are_refused(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quantize_shards.pack_4bit

    def with_a_fault(codes: torch.Tensor, *rest: Any) -> Any:
        wrong = codes.clone()
        wrong[0, 0] = 15 - wrong[0, 0]
        return whole(wrong, *rest)

    monkeypatch.setattr(quantize_shards, "pack_4bit", with_a_fault)
    with pytest.raises(RunError, match=r"reloaded, has different weights\. Nothing was saved\."):
        merge_into(runs("4-bit", "lora"), tmp_path / "m", "4bit")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--quant-type", "fp4"], "--quant-type belongs to --quant 4bit, and --quant is none."),
        (["--quant", "8bit", "--double-quant"], "--double-quant belongs to --quant 4bit"),
        (["--quant", "4bit", "--onto", "original"], "cannot be used with --quant"),
        (["--onto", "4bit"], "Use --quant 4bit, which chooses the codes by what was trained"),
        (["--quant", "4bit", "--calibration-rows", "-1"], "--calibration-rows"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", "absent", "--out", "out", *flags]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
