#!/usr/bin/env python3
"""What of a QLoRA run is left in 4 bits: as PEFT merges, rounded rightly, and by chosen codes.

    python benchmarks/merge_into_4bit.py RUN… --rows 24 --calibration-rows 64
    python benchmarks/merge_into_4bit.py RUN… --quant 8bit --rows 24 --calibration-rows 64
    python benchmarks/merge_into_4bit.py RUN… --gguf --rows 24 --calibration-rows 64

KL and first choices are those of each model beside the run as trained, on validation rows; codes
are chosen on training rows. PEFT rounds the sum of the dequantized weights and the update;
`ftlevel merge --quant 4bit --calibration-rows 0` that of the original weights and the update. Every
figure is of a checkpoint that was written and loaded afresh; docs/merge.md has the table. With
--gguf those of `export --outtype` are, and q4_0 is made in memory alone.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftlevel.commands.export import export
from ftlevel.commands.merge import ask_trained, write_onto
from ftlevel.config import ExportConfig, MergeConfig
from ftlevel.evaluation.two_models.compare import Agreement, compare_rows
from ftlevel.evaluation.two_models.on_rows import Probe
from ftlevel.events import Silence
from ftlevel.merging.calibration import InputMoments
from ftlevel.merging.low_bits import measure_low_bits, resolve_low_bits, write_low_bits
from ftlevel.merging.merge_input import MergeInput, choose_rows, resolve_merge_input
from ftlevel.merging.verify import load_merged
from ftlevel.models.loading import load_config, load_model, quiet_libraries
from ftlevel.models.sources import resolve_source
from ftlevel.weights.codes import Grid, choose_codes


def merge_as_peft_does(inputs: MergeInput, out: Path) -> None:
    """Write the run's base in 4 bits with its adapter merged into them by `merge_and_unload`."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=inputs.quant.quant_type,
        bnb_4bit_use_double_quant=inputs.quant.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, inputs.dtype),
    )
    base = AutoModelForCausalLM.from_pretrained(
        inputs.source.location, quantization_config=quantization, dtype=getattr(torch, inputs.dtype)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "rounding errors": what is measured here
        merged = PeftModel.from_pretrained(base, str(inputs.directory)).merge_and_unload()
    merged.save_pretrained(out)  # before any forward pass, which may repack the weights


def ways(
    run: str, rows: int, calibration: int, place: Path, quant: str, *, only_chosen: bool
) -> Iterator[tuple[str, Agreement, float]]:
    """Yield what is served, how far it is from the run, and the processor time of writing it."""
    config = MergeConfig(adapters=[run], output_dir=place / "out", quant=quant)
    inputs = resolve_merge_input(config)
    low = resolve_low_bits(config, inputs)
    if low is None:
        raise ValueError("something is quantized here")
    chosen = choose_rows(inputs, rows, calibration)
    pad_id = inputs.tokenizer.pad_token_id or 0
    probe = Probe(chosen.compared, inputs.objective, pad_id, inputs.device)
    trained, effect = ask_trained(inputs, probe)
    yield "the base without the adapter", effect, 0.0
    if not only_chosen and quant == "4bit":
        began = time.process_time()
        merge_as_peft_does(inputs, place / "peft")
        spent = time.process_time() - began
        found = probe.score(load_merged(place / "peft", inputs), inputs.dtype)
        yield "merged as PEFT does", compare_rows(trained, found), spent
    whole = write_onto(config, inputs, "dequantized", place / "whole")
    kept = place / "kept"
    shutil.copytree(whole.directory, kept)
    on = Probe(chosen.calibration, inputs.objective, pad_id, inputs.device)
    written_ways = [(f"{quant}: rounded", None), (f"{quant}: codes chosen", on)]
    if not chosen.calibration:
        written_ways = written_ways[:1]
    for name, some in written_ways[-1:] if only_chosen else written_ways:
        if not whole.directory.is_dir():
            shutil.copytree(kept, whole.directory)
        began = time.process_time()
        written, bits = write_low_bits(whole, inputs, low, some, Silence())
        spent = time.process_time() - began
        yield name, measure_low_bits(written, bits, inputs, probe, trained), spent
        shutil.rmtree(written.directory)


def gguf_ways(
    run: str, rows: int, calibration: int, place: Path
) -> Iterator[tuple[str, Agreement, float]]:
    """Yield the same of GGUF's types: as `export` writes them, and with codes chosen in memory."""
    config = MergeConfig(adapters=[run], output_dir=place / "out")
    inputs = resolve_merge_input(config)
    chosen = choose_rows(inputs, rows, calibration)
    pad_id = inputs.tokenizer.pad_token_id or 0
    probe = Probe(chosen.compared, inputs.objective, pad_id, inputs.device)
    trained, _ = ask_trained(inputs, probe)
    for outtype in ("bf16", "q8_0"):
        path = place / f"{outtype}.gguf"
        began = time.process_time()
        export(ExportConfig(model=run, out=path, outtype=outtype, verify=False))
        spent = time.process_time() - began
        source = resolve_source(str(path))
        model, _ = load_model(source, load_config(source), inputs.auto_class,
                              dtype=torch.float32, device=inputs.device)  # fmt: skip
        found = probe.score(model.eval(), inputs.dtype)
        yield f"export --outtype {outtype}", compare_rows(trained, found), spent
    onto = "original" if inputs.quant.kind == "none" else "dequantized"
    whole = write_onto(config, inputs, onto, place / "whole")
    on = Probe(chosen.calibration, inputs.objective, pad_id, inputs.device)
    for name, levels in (("q8_0", 127), ("q4_0", 8)):
        for way in ("rounded", "codes chosen")[: 2 if chosen.calibration and levels == 8 else 1]:
            model = load_merged(whole.directory, inputs).float()
            linears = {
                n: m for n, m in model.named_modules()
                if isinstance(m, torch.nn.Linear) and n != "lm_head"
            }  # fmt: skip
            sizes = {n: m.in_features for n, m in linears.items()}
            began = time.process_time()
            if way == "codes chosen":
                asked = load_merged(whole.directory, inputs)
                moments = InputMoments(asked, on, inputs.dtype, sizes)
            for linear, module in linears.items():
                weight = whole.merger.unrounded(f"{linear}.weight").float()
                grid = gguf_grid(levels, weight)
                scales = grid.stored(grid.scales_of(weight))
                codes = grid.nearest(weight, scales)
                if way == "codes chosen":
                    moment = moments.of(linear)
                    change = weight - whole.merger.base(f"{linear}.weight").float()
                    codes = choose_codes(weight, change, codes, scales, moment, grid)
                with torch.no_grad():
                    module.weight.copy_(grid.value(codes, scales))
            spent = time.process_time() - began
            found = probe.score(model, inputs.dtype)
            yield f"{name} (linears, in memory): {way}", compare_rows(trained, found), spent


def gguf_grid(levels: int, weight: torch.Tensor) -> Grid:
    """Return q8_0's grid, or q4_0's, whose scale has the sign that makes its largest a -8."""
    if levels == 127:
        values, signs = torch.arange(-127.0, 128.0) / 127, 1
    else:
        blocks = weight.reshape(-1, 32)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
        values, signs = torch.arange(-8.0, 8.0) / 8, torch.where(largest > 0, -1.0, 1.0)
    return Grid(values, 32, lambda scales: (scales * signs / levels).half().float() * levels)


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rows", type=int, default=48, help="validation rows to compare on")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--only-chosen", action="store_true", help="leave the others out")
    parser.add_argument("--quant", default="4bit", choices=["4bit", "8bit"])
    parser.add_argument("--gguf", action="store_true", help="measure GGUF's types instead")
    arguments = parser.parse_args()
    print("| run | what is served | KL | same first choice | loss | as trained | targets | "
          "processor s |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for run in arguments.runs:
        with tempfile.TemporaryDirectory(prefix="ftlevel-merge-") as folder, quiet_libraries():
            place = Path(folder)
            asked = (run, arguments.rows, arguments.calibration_rows, place)
            found_ways = gguf_ways(*asked) if arguments.gguf else ways(
                *asked, arguments.quant, only_chosen=arguments.only_chosen
            )  # fmt: skip
            for name, found, spent in found_ways:
                print(f"| {Path(run).name} | {name} | {found.kl:.4f} | {found.top1:.1%} | "
                      f"{found.loss:.4f} | {found.loss_reference:.4f} | {found.targets} | "
                      f"{spent:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
