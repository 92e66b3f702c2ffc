"""Models and adapters for servers: `export` and its formats, reference answers, `check-served`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, ExportFormat, Extension

if TYPE_CHECKING:
    from ftlevel.cli.flags import CommandInput
    from ftlevel.config.flag import Flag


def export(
    inputs: CommandInput, *, out: str | None, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Export a run, an adapter or a model for a server.

    --for SERVER selects the format and rejects what that server would load incorrectly. The files
    are read back and compared with the model before they are moved into place.
    """
    import json

    import typer

    from ftlevel.cli.screen import open_screen
    from ftlevel.extras.serving.config import DRY_RUN, FORMATS, SERVERS, ExportConfig

    server, format_ = SERVERS.get(inputs.values["server"] or ""), inputs.values["format"]
    if format_ in (None, "auto"):
        format_ = server.formats[0] if server else "gguf"
    suffix = FORMATS[format_].suffix if format_ in FORMATS else ""
    placeholder = {"out": DRY_RUN.with_suffix(suffix)} if dry_run and out is None else {}
    config = inputs.section(ExportConfig, **placeholder)
    with open_screen(as_json=as_json, quiet=quiet) as screen:
        from ftlevel.extras.serving.exporting import export as run

        result = run(config, listener=screen, dry_run=dry_run)
    if as_json:
        typer.echo(json.dumps(result.summary, default=str))
    elif not quiet:
        for line in result.lines:
            typer.echo(f"  {line}")
        if "hub" in result.summary:
            typer.echo(f"  uploaded {result.summary['hub']}")


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
    from ftlevel.config.flag import COMPARE, GENERAL, INFERENCE, MODEL, WRITE, Flag, option
    from ftlevel.config.flag import FlagAliases as Aliases

    export, writes = ("export",), partial(Flag, on=("export",), panel=WRITE)
    checks = partial(Flag, on=("check-served",), panel=INFERENCE)
    return [
        Flag("model", "RUN|ADAPTER|MODEL", on=export, required=True),
        Flag("base_model", "--model", MODEL, export, Aliases(("--base",)), dest="base_model"),
        writes("calibration_rows"),
        writes("server", "--for", dest="server"),
        *map(writes, ("format", "max_rank", "client_prompts", "outtype")),
        writes("out", "--out -o", metavar="PATH"),
        writes("overwrite", "--overwrite"),
        writes("revision"),
        writes("push_to_hub", metavar="NAME"),
        writes("hub_private"),
        option(
            "--dry-run",
            "Whether to only check and show the export, without writing it.",
            panel=WRITE,
            on=export,
            type=bool,
        ),
        Flag("verify", "", COMPARE, export),
        Flag("verify_tokens", "", COMPARE, export),
        Flag("device", "", GENERAL, export),
        Flag("out", "OUT", on=("check-served",), required=True),
        checks("url", metavar="URL"),
        checks("model", metavar="NAME"),
        checks("inside", "--in", dest="inside"),
        checks("python", metavar="PATH"),
        checks("timeout"),
        checks("tolerance", panel=COMPARE),
    ]


EXTENSION = Extension(
    commands={
        "export": Command(
            "ftlevel.extras.serving:export",
            "Export a run, an adapter or a model for a server.",
            config="ftlevel.extras.serving.config:ExportConfig",
            is_quiet=True,
        ),
        "check-served": Command(
            "ftlevel.extras.serving:check_served",
            "Check that a server returns the trained adapter's outputs.",
            config="ftlevel.extras.serving.config:CheckServedConfig",
            is_quiet=True,
        ),
    },
    flags=_flags,
    export_formats={
        "gguf": ExportFormat("ftlevel.extras.serving.gguf", ".gguf", (".Modelfile",)),
        "merged": ExportFormat("ftlevel.extras.serving.merged", ""),
        "peft": ExportFormat("ftlevel.extras.serving.peft", "", merges=False, several=True),
        "gguf-lora": ExportFormat(
            "ftlevel.extras.serving.gguf_lora", "", merges=False, several=True
        ),
        "mlx": ExportFormat("ftlevel.extras.serving.mlx", "", merges=False),
    },
)
