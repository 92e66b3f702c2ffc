"""`ftlevel quantize`: write a 4-bit or 8-bit checkpoint, with measured size and quality."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import heavy_imports
from ftlevel.config import QuantizeConfig


def quantize(
    given: CommandInput, *, out: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Quantize a model to 4 or 8 bits and measure its quality.

    Embeddings, norms and heads are not quantized. The result loads in transformers and in ftlevel
    train (LoRA), generate and evaluate. Tensors are processed one at a time, so the model may
    exceed memory.
    """
    nowhere = {"out": "quantized"} if dry_run and out is None else {}
    config = given.section(QuantizeConfig, **nowhere)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.quantize import quantize as run

        result = run(config, listener=screen, dry_run=dry_run)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
    elif not quiet:
        for line in result_lines(result.summary):
            typer.echo(f"  {line}")
        if result.path is not None:
            typer.echo(f"  saved {result.path}")
            if "hub" in result.summary:
                typer.echo(f"  uploaded {result.summary['hub']}")
            typer.echo(f"  train on it: ftlevel train --method lora --model {result.path}")


def result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield sizes by part, the total ratio, and the measured quality."""
    expected = "expected " if summary.get("dry_run") else ""
    for name, part in summary["parts"].items():
        yield f"{name:<17}{_size(part['bytes_before']):>10} → {_size(part['bytes']):>9}"
    whole = f"{_size(summary['bytes_before']):>10} → {_size(summary['bytes']):>9}"
    yield (
        f"{expected + 'size':<17}{whole}  {summary['ratio']:.2f}× smaller "
        f"(the quantized linears alone {summary['quantized_ratio']:.2f}×)"
    )
    if "fidelity" in summary:
        yield from _fidelity_lines(summary["fidelity"])


def _fidelity_lines(scores: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"beside the source, over {scores['positions']:,} positions in {scores['windows']} "
        f"windows of {scores['text']}, {scores['predicts']}, computed in {scores['computed_in']}:"
    )
    if "cosine" in scores:
        yield f"  cosine {scores['cosine']:.4f} (smallest {scores['cosine_smallest']:.4f})"
        return
    yield f"  KL {scores['kl']:.4f} ± {scores['kl_standard_error']:.4f} nats"
    yield f"  top-1 agreement {scores['top1_agreement']:.1%}"
    yield f"  perplexity {scores['perplexity_source']:.3f} → {scores['perplexity']:.3f}"


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.2f} GB"
