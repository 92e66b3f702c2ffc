"""Adapters for model servers: export formats, reference answers, and `check-served`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, ExportFormat, Extension

if TYPE_CHECKING:
    from ftlevel.cli.flags import CommandInput
    from ftlevel.config.flag import Flag


def check_served(inputs: CommandInput, *, as_json: bool, quiet: bool) -> None:
    """Check that a server returns the trained adapter's outputs.

    Reports whether each answer is that of the trained model, the base model or neither. Sends about
    a dozen requests, to --url only; --in uses no network.
    """
    import json

    import typer

    from ftlevel.extras.serving.config import CheckServedConfig

    config = inputs.section(CheckServedConfig)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=quiet) as screen:
        from ftlevel.extras.serving.check import check_served as run

        result = run(config, listener=screen)
    if as_json:
        typer.echo(json.dumps(result.summary, default=str))
    elif not quiet:
        for line in result.lines:
            typer.echo(f"  {line}")


def _flags() -> list[Flag]:
    from ftlevel.config.flag import COMPARE, INFERENCE, Flag

    flags = partial(Flag, on=("check-served",), panel=INFERENCE)
    return [
        Flag("out", "OUT", on=("check-served",), required=True),
        flags("url", metavar="URL"),
        flags("model", metavar="NAME"),
        flags("inside", "--in", dest="inside"),
        flags("python", metavar="PATH"),
        flags("timeout"),
        flags("tolerance", panel=COMPARE),
    ]


EXTENSION = Extension(
    commands={
        "check-served": Command(
            "ftlevel.extras.serving:check_served",
            "Check that a server returns the trained adapter's outputs.",
            config="ftlevel.extras.serving.config:CheckServedConfig",
            is_quiet=True,
        )
    },
    flags=_flags,
    export_formats={
        "peft": ExportFormat("ftlevel.extras.serving.peft", "", merges=False, several=True),
        "gguf-lora": ExportFormat(
            "ftlevel.extras.serving.gguf_lora", "", merges=False, several=True
        ),
        "mlx": ExportFormat("ftlevel.extras.serving.mlx", "", merges=False),
    },
    hooks={"serve_whole": "ftlevel.extras.serving.recorded:ServedWhole"},
)
