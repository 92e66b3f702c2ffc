"""`ftlevel merge`: an adapter, or a mixture of several, becomes part of its base."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Optional

import typer

from ftlevel.cli.heavy_imports import uncollected_imports
from ftlevel.config import MergeConfig, build_section
from ftlevel.errors import listing

Text = Optional[str]  # noqa: UP045 - Typer evaluates it at run time on Python 3.10 as well
_FLAGS = {"output_dir": "--out", "verify": "--no-verify", "adapters": "RUN|ADAPTER"}


def _help(field: str) -> str:
    return MergeConfig.model_fields[field].description or ""


def merge(
    context: typer.Context,
    adapters: Annotated[
        list[str], typer.Argument(metavar="RUN|ADAPTER...", help=_help("adapters"))
    ],
    output_dir: Annotated[str, typer.Option("--out", metavar="DIR", help=_help("output_dir"))],
    onto: Annotated[Text, typer.Option("--onto", help=_help("onto"))] = None,
    base: Annotated[Text, typer.Option("--base", help=_help("base"))] = None,
    dtype: Annotated[Text, typer.Option("--dtype", help=_help("dtype"))] = None,
    weights: Annotated[Text, typer.Option("--weights", help=_help("weights"))] = None,
    strategy: Annotated[Text, typer.Option("--strategy", help=_help("strategy"))] = None,
    density: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--density", help=_help("density")),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help=_help("verify"), show_default=True)
    ] = True,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--rows", help=_help("rows")),
    ] = None,
    device: Annotated[Text, typer.Option("--device", help=_help("device"))] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error arose.")
    ] = False,
) -> None:
    """Merge an adapter into its base and write a plain model.

    The base is read and written a tensor at a time, so that memory for one tensor is enough. What
    was written is loaded and compared with the base and the adapter on rows of the run's data; the
    directory is there when it has passed, and whole.
    """
    fields = {name: context.params.get(name) for name in MergeConfig.model_fields}
    config = build_section(MergeConfig, fields, _FLAGS)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        with uncollected_imports():
            from ftlevel.commands.merge import merge as run

        result = run(config, listener=screen)
    if not as_json and not quiet:
        for line in _result_lines(result.summary):
            typer.echo(f"  {line}")
    if as_json:
        typer.echo(json_module.dumps(result.summary, default=str))


def _result_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what came out, a line each."""
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
        yield f"left out: {listing(written['unused'], 3)}, for which the model has no use"
    if (found := summary["agreement"]) is None:
        yield "not verified (--no-verify)"
    else:
        yield (
            f"verified on {found['targets']:,} targets: logits differ by "
            f"{found['max_difference']:.3g} at most and {found['mean_difference']:.2g} on average, "
            f"KL {found['kl']:.2g}, top-1 {found['top1']:.1%}, loss {found['loss']:.4f} "
            f"(before {found['loss_reference']:.4f})"
        )
        yield f"training had moved it by KL {summary['effect']['kl']:.2g}"
    yield f"saved {summary['out']}  ({summary['seconds']:.1f} s)"
