"""PEFT methods: one module each, with all that the rest asks of a method.

A method's module has the name of its spec's in `ftlevel.config.methods`, where it is registered,
and holds its `METHODS`: name → `Method`. Rows and rules of all are collected in `matrix`, merging
by PEFT's types in `merging`. May import models and what is below; no data (a method is given
batches), nothing of training or of the fast step. Importing this room imports no torch: what needs
it is imported where a method is built.
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
"""Every method by its name, in the order of the table."""


TUNERS = "ftlevel.adapters"
"""What a program must import before PEFT alone can load an adapter of a tuner of ours."""


def needs_import(spec: specs.MethodSpec) -> str:
    """Return what a program must import before PEFT alone can load an adapter of `spec`, if any."""
    return TUNERS if METHODS[spec.kind].register else ""


def ensure_registered() -> None:
    """Make PEFT know the tuners of ftlevel; a second call does nothing.

    Needed before one is loaded. Imports peft.
    """
    for method in METHODS.values():
        if method.register is not None:
            method.register()


__all__ = ["METHODS", "Base", "Method", "ensure_registered", "needs_import"]
