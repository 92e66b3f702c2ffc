"""PEFT methods, one module per spec in `ftlevel.config.methods`.

Each module defines `METHODS`: name -> `Method`. `matrix` collects the support table, `merging` the
PEFT types. May import models, but no data or training code; importing this package does not
import torch.
"""

from __future__ import annotations

from importlib import import_module

from ftlevel.config import methods as specs
from ftlevel.methods.base import Base, Method


def _method_of(kind: str, spec: type[specs.MethodSpec]) -> Method:
    module = import_module(spec.__module__.replace(specs.__name__, __name__))
    method: Method = module.METHODS[kind]
    return method


METHODS: dict[str, Method] = {
    spec.model_fields["kind"].default: _method_of(spec.model_fields["kind"].default, spec)
    for spec in specs.BY_TARGETS
}
"""All methods by name, in display order."""


TUNERS = "ftlevel.adapters"
"""Module that registers ftlevel's tuners for programs that load adapters with PEFT alone."""


def needs_import(spec: specs.MethodSpec) -> str:
    """Return the module to import before PEFT alone can load an adapter of `spec`, or ""."""
    return TUNERS if METHODS[spec.kind].register else ""


def ensure_registered() -> None:
    """Register ftlevel's tuners in PEFT; idempotent. Imports peft."""
    for method in METHODS.values():
        if method.register is not None:
            method.register()


__all__ = ["METHODS", "Base", "Method", "ensure_registered", "needs_import"]
