#!/usr/bin/env python3
"""Merge a QLoRA run into its 4-bit weights, as PEFT does it and `ftlevel merge` refuses to.

    python benchmarks/merge_into_4bit.py RUN OUT
    ftlevel evaluate OUT --against RUN

Rounding the merged weights to 4 bits again erases most of what was trained. This writes such a
model, so that anyone can measure it; docs/merge.md has the figures.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ftlevel.artifacts.cards import read_card


def main(run: Path, out: Path) -> None:
    """Write the run's base in 4 bits with its adapter merged into them."""
    card = read_card(run / "adapter")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=card.quantization["quant_type"],
        bnb_4bit_use_double_quant=card.quantization["double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, card.dtype),
    )
    base = AutoModelForCausalLM.from_pretrained(
        card.base["name"], quantization_config=quantization, dtype=getattr(torch, card.dtype)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "rounding errors": what is measured here
        merged = PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload()
    merged.save_pretrained(out)  # before any forward pass, which may repack the weights
    AutoTokenizer.from_pretrained(run / "adapter").save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
