"""Adapters for model servers: export formats, reference answers, and `check-served`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, ExportFormat, Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag


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
            "ftlevel.extras.serving.cli:check_served",
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
