#!/usr/bin/env python3
"""What of a QLoRA run is left in 4 bits: as PEFT merges, rounded rightly, and by chosen codes.

    python benchmarks/merge_into_4bit.py RUN… --rows 24 --calibration-rows 64
    python benchmarks/merge_into_4bit.py RUN… --quant 8bit --rows 24 --calibration-rows 64

KL and first choices are those of each model beside the run as trained, on validation rows; codes
are chosen on training rows. PEFT rounds the sum of the dequantized weights and the update;
`ftlevel merge --quant 4bit --calibration-rows 0` that of the original weights and the update. Every
figure is of a checkpoint that was written and loaded afresh; docs/merge.md has the table.
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

from ftlevel.commands.merge import score_trained, write_onto
from ftlevel.config import MergeConfig
from ftlevel.evaluation.two_models import Agreement, Probe, compare_rows
from ftlevel.events import NullListener
from ftlevel.merging.low_bits import compare_quantized, quantize_merged, resolve_quantization
from ftlevel.merging.merge_input import MergeInput, choose_rows, resolve_merge_input
from ftlevel.merging.verify import load_merged
from ftlevel.models.loading import silence_loggers


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
    low = resolve_quantization(config, inputs)
    if low is None:
        raise ValueError("something is quantized here")
    chosen = choose_rows(inputs, rows, calibration)
    pad_id = inputs.tokenizer.pad_token_id or 0
    probe = Probe(chosen.compared, inputs.objective, pad_id, inputs.device)
    trained, effect = score_trained(inputs, probe)
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
        written, bits = quantize_merged(whole, inputs, low, some, NullListener())
        spent = time.process_time() - began
        yield name, compare_quantized(written, bits, inputs, probe, trained), spent
        shutil.rmtree(written.directory)


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rows", type=int, default=48, help="validation rows to compare on")
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--only-chosen", action="store_true", help="leave the others out")
    parser.add_argument("--quant", default="4bit", choices=["4bit", "8bit"])
    arguments = parser.parse_args()
    print("| run | what is served | KL | same first choice | loss | as trained | targets | "
          "processor s |")  # fmt: skip
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for run in arguments.runs:
        with tempfile.TemporaryDirectory(prefix="ftlevel-merge-") as folder, silence_loggers():
            place = Path(folder)
            for name, found, spent in ways(
                run, arguments.rows, arguments.calibration_rows, place, arguments.quant,
                only_chosen=arguments.only_chosen,
            ):  # fmt: skip
                print(f"| {Path(run).name} | {name} | {found.kl:.4f} | {found.top1:.1%} | "
                      f"{found.loss:.4f} | {found.loss_reference:.4f} | {found.targets} | "
                      f"{spent:.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
