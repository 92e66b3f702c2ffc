"""`ftlevel quantize`: a checkpoint in 4 or 8 bits, with its measured size and quality."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Optional

import typer

from ftlevel.cli.flags import option_of
from ftlevel.cli.heavy_imports import uncollected_imports
from ftlevel.config import QuantizeConfig, build_section

Text = Optional[str]  # noqa: UP045 - Typer evaluates these at run time on Python 3.10 as well
Int = Optional[int]  # noqa: UP045
Switch = Optional[bool]  # noqa: UP045


_option = partial(option_of, QuantizeConfig)


def quantize(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help=QuantizeConfig.model_fields["model"].description)
    ],
    quant: Annotated[Text, _option("quant")] = None,
    quant_type: Annotated[Text, _option("quant_type")] = None,
    double_quant: Annotated[Switch, _option("double_quant", "--double-quant")] = None,
    out: Annotated[Text, _option("out", "--out", "-o")] = None,
    dtype: Annotated[Text, _option("dtype")] = None,
    eval_text: Annotated[Text, _option("eval_text")] = None,
    eval_tokens: Annotated[Int, _option("eval_tokens")] = None,
    measure: Annotated[Switch, _option("measure", "--measure/--no-measure")] = None,
    device: Annotated[Text, _option("device")] = None,
    revision: Annotated[Text, _option("revision")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the sizes from the config alone; write nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose.")
    ] = False,
) -> None:
    """Write a model in 4 or 8 bits, and measure what that costs.

    Embeddings, norms and heads stay as they are. The result loads in transformers, in ftlevel
    train (LoRA on top), generate and evaluate. A model larger than the memory works: one tensor is
    held at a time.
    """
    fields = {name: context.params.get(name) for name in QuantizeConfig.model_fields}
    if dry_run and out is None:
        fields["out"] = "quantized"  # nothing is written
    config = build_section(QuantizeConfig, fields)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with uncollected_imports():
            from ftlevel.commands.quantize import quantize as run

        result = run(config, listener=screen, dry_run=dry_run)
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))
    elif not quiet:
        for line in result_lines(result.summary):
            typer.echo(f"  {line}")
        if result.path is not None:
            typer.echo(f"  saved {result.path}")
            typer.echo(f"  train on it: ftlevel train --method lora --model {result.path}")


def result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sizes by part, the true ratio, and what was measured."""
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
