"""Bottleneck adapters in AdapterHub's file format: loading and export."""

from __future__ import annotations

from ftlevel.extensions import ExportFormat, Extension

EXTENSION = Extension(
    export_formats={
        "adapterhub": ExportFormat("ftlevel.extras.adapterhub.export", "", merges=False)
    },
    adapter_readers={"adapterhub": "ftlevel.extras.adapterhub.adapter:READER"},
)
