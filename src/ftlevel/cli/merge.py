"""`ftlevel merge` and `quantize`: commands that write a model's files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from shlex import quote
from typing import Any

import typer

from ftlevel.artifacts.cards import format_difference
from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import heavy_imports
from ftlevel.config import MergeConfig, QuantConfig, QuantizeConfig
from ftlevel.errors import join_names


def merge(inputs: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Merge an adapter into the base model and write a full model.

    Tensors are read and written one at a time, so memory for one tensor is enough. The result is
    compared with base model and adapter on rows of the run's data before it is moved into place.
    """
    config = inputs.section(MergeConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.merge import merge as run

        result = run(config, listener=screen)
    if not as_json and not quiet:
        for line in _merge_lines(result.summary):
            typer.echo(f"  {line}")
    if as_json:
        typer.echo(json.dumps(result.summary, default=str))


def _merge_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    written = summary["written"]
    if summary["reason"]:
        yield f"onto {summary['onto']}: {summary['reason']}"
    unchanged = (
        f", {written['unchanged']:,} weights by less than rounding" if written["unchanged"] else ""
    )
    yield (
        f"changed {written['changed']:,} of {written['tensors']:,} tensors{unchanged}; "
        f"{written['size_bytes'] / 2**20:,.1f} MiB of {written['dtype']}"
    )
    if written["untied"]:
        yield "the output layer no longer shares the embedding's weights: the adapter changed one"
    if written["unused"]:
        yield f"skipped: {join_names(written['unused'], 3)}, not used by the model"
    if (agreement := summary["agreement"]) is None:
        yield "not verified (--no-verify)"
    else:
        yield (
            f"verified on {agreement['targets']:,} targets: logits differ by "
            f"{agreement['max_difference']:.3g} at most, {format_difference(agreement)}, loss "
            f"{agreement['loss']:.4f} (before {agreement['loss_reference']:.4f})"
        )
        yield f"change by training: {format_difference(summary['effect'])}"
    if (served := summary["served"]) is not None:
        yield (
            f"in {QuantConfig(**summary['quantization']).form}, compared with the run: "
            f"{format_difference(served)}, loss {served['loss']:.4f}"
        )
    yield f"saved {summary['out']}  ({summary['seconds']:.1f} s)"
    if "hub" in summary:
        yield f"uploaded {summary['hub']}"


def quantize(
    inputs: CommandInput, *, out: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Quantize a model to 4 or 8 bits and measure the quality.

    Embeddings, norms and heads are not quantized. The result loads in transformers and in ftlevel
    train (LoRA), generate and evaluate. Tensors are processed one at a time, so the model may
    exceed memory.
    """
    placeholder = {"out": "dry-run"} if dry_run and out is None else {}
    config = inputs.section(QuantizeConfig, **placeholder)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.quantize import quantize as run

        result = run(config, listener=screen, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(result.summary, default=str))
    elif not quiet:
        for line in _quantize_lines(result.summary):
            typer.echo(f"  {line}")
        if result.path is not None:
            typer.echo(f"  saved {result.path}")
            if "hub" in result.summary:
                typer.echo(f"  uploaded {result.summary['hub']}")
            path = quote(str(result.path))
            typer.echo(f"  train on it: ftlevel train --method lora --model {path}")


def _quantize_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    expected = "expected " if summary.get("dry_run") else ""
    for name, part in summary["parts"].items():
        yield f"{name:<17}{_size(part['bytes_before']):>10} → {_size(part['bytes']):>9}"
    whole = f"{_size(summary['bytes_before']):>10} → {_size(summary['bytes']):>9}"
    yield (
        f"{expected + 'size':<17}{whole}  {summary['ratio']:.2f}× smaller "
        f"(quantized linear layers only {summary['quantized_ratio']:.2f}×)"
    )
    if "fidelity" in summary:
        yield from _fidelity_lines(summary["fidelity"])


def _fidelity_lines(scores: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"compared with the source on {scores['positions']:,} positions in {scores['windows']} "
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
