"""`ftlevel merge`: merge an adapter, or a mixture of adapters, into its base model."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from ftlevel.artifacts.cards import describe_difference
from ftlevel.cli.flags import CommandInput
from ftlevel.cli.startup import heavy_imports
from ftlevel.config import MergeConfig, QuantConfig
from ftlevel.errors import join_names


def merge(given: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Merge an adapter into its base model and write a full model.

    Tensors are read and written one at a time, so memory for one tensor is enough. The result is
    compared with base model and adapter on rows of the run's data before it is moved into place.
    """
    config = given.section(MergeConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with heavy_imports():
            from ftlevel.commands.merge import merge as run

        result = run(config, listener=screen)
    if not as_json and not quiet:
        for line in _result_lines(result.summary):
            typer.echo(f"  {line}")
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))


def _result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    written = summary["written"]
    if summary["reason"]:
        yield f"onto {summary['onto']}: {summary['reason']}"
    same = f", {written['unchanged']:,} of them below its rounding" if written["unchanged"] else ""
    yield (
        f"merged {written['merged']:,} of {written['tensors']:,} tensors{same}; "
        f"{written['size_bytes'] / 2**20:,.1f} MiB of {written['dtype']}"
    )
    if written["untied"]:
        yield "the output layer no longer shares the embedding's weights: the adapter changed one"
    if written["unused"]:
        yield f"left out: {join_names(written['unused'], 3)}, for which the model has no use"
    if (found := summary["agreement"]) is None:
        yield "not verified (--no-verify)"
    else:
        yield (
            f"verified on {found['targets']:,} targets: logits differ by "
            f"{found['max_difference']:.3g} at most, {describe_difference(found)}, loss "
            f"{found['loss']:.4f} "
            f"(before {found['loss_reference']:.4f})"
        )
        yield f"training had moved it: {describe_difference(summary['effect'])}"
    if (served := summary["served"]) is not None:
        yield (
            f"in {QuantConfig(**summary['quantization']).form}, beside the run as trained: "
            f"{describe_difference(served)}, loss {served['loss']:.4f}"
        )
    yield f"saved {summary['out']}  ({summary['seconds']:.1f} s)"
    if "hub" in summary:
        yield f"uploaded {summary['hub']}"
