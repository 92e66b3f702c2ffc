"""Table of known model families, in families.json.

Imports neither torch nor transformers, so that `ftlevel list-targets llama` is fast. A test
compares each entry with transformers' modules. An entry with `like` copies that family's values of
all keys but `aliases`, `example` and `note`. The keys `path`, `linears`, `experts`, `norms` and
`role` describe a family with one stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlevel.errors import InputError, closest_matches

Kind = Literal["encoder", "decoder", "encoder-decoder"]
LinearType = Literal["Linear", "Conv1D"]

FLOAT32_BYTES = 4
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Dims:
    """Sizes of a released model; `kv_heads` 0 means `heads`, `head_dim` 0 `hidden / heads`."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    decoder_layers: int = 0

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def kv(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads


WIDTHS: dict[str, Callable[[Dims], int]] = {
    "hidden": lambda d: d.hidden,
    "ffn": lambda d: d.ffn,
    "heads*head_dim": lambda d: d.heads * d.head_size,
    "kv_heads*head_dim": lambda d: d.kv * d.head_size,
    "q+k+v widths": lambda d: (d.heads + 2 * d.kv) * d.head_size,  # the three layers it replaces
    "3*hidden": lambda d: 3 * d.hidden,
    "2*ffn": lambda d: 2 * d.ffn,
}
"""Name of a width in the table -> width."""


@dataclass(frozen=True)
class BlockLinear:
    """A linear layer; `path` is relative to the block, `fan_in` and `fan_out` are keys of `WIDTHS`.

    `only` names the variant of the family whose models have the layer; empty if all have it.
    """

    path: str
    fan_in: str
    fan_out: str
    type: LinearType = "Linear"
    only: str = ""

    @property
    def name(self) -> str:
        """Last part of `path`, such as `q_proj`."""
        return self.path.rpartition(".")[2]

    @property
    def attention(self) -> bool:
        """Whether the layer belongs to an attention module."""
        return _ATTENTION.search(self.path) is not None


@dataclass(frozen=True)
class Stack:
    """A list of equal blocks in a model; `path` is a block's name, with `{i}` for its index.

    `experts` are tensors with all experts of a block, for PEFT's `target_parameters`. The number of
    blocks depends on `role`: `Dims.layers`, `Dims.decoder_layers`, or one shared block.
    """

    path: str
    linears: tuple[BlockLinear, ...]
    norms: tuple[str, ...]
    role: Literal["layers", "decoder", "shared"] = "layers"
    experts: tuple[BlockLinear, ...] = ()


@dataclass(frozen=True)
class ReleasedModel:
    """A released model of a family; it has the layers whose `only` is empty or in `variants`."""

    name: str
    dims: Dims
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Module names of all models of one transformers `model_type`.

    Attributes:
        name: the `model_type`.
        attention_only: shortest names that select the attention's linear layers and nothing else.
        heads: task -> modules on top of the base model, as in `modules_to_save`.
        outer_norms: full names of norms outside blocks and heads.
        aliases: models or model types with the same modules.
    """

    name: str
    kind: Kind
    stacks: tuple[Stack, ...]
    attention_only: tuple[str, ...]
    heads: Mapping[str, tuple[str, ...]]
    embeddings: tuple[str, ...]
    outer_norms: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    example: ReleasedModel | None = None
    note: str = ""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Names of the linear layers that low-rank methods adapt by default: all in the blocks."""
        names = (linear.name for stack in self.stacks for linear in stack.linears)
        return tuple(dict.fromkeys(names))

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Paths of the expert tensors, for PEFT's `target_parameters`."""
        return tuple(expert.path for stack in self.stacks for expert in stack.experts)


def _load_families() -> dict[str, Family]:
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = {}
    for name, row in json.loads(text).items():
        defaults = {k: v for k, v in rows.get(row.get("like"), {}).items() if k not in _SPECIFIC}
        rows[name] = defaults | row
    return {name: _build_family(name, row) for name, row in rows.items()}


_SPECIFIC = ("aliases", "example", "note")


def _build_family(name: str, row: Mapping[str, Any]) -> Family:
    list_keys = ("attention_only", "embeddings", "outer_norms", "aliases")
    return Family(
        name,
        row["kind"],
        tuple(_build_stack(stack, row) for stack in row.get("stacks", (row,))),
        heads={task: tuple(modules) for task, modules in row["heads"].items()},
        example=_build_example(**row["example"]) if "example" in row else None,
        note=row.get("note", ""),
        **{key: tuple(row.get(key, ())) for key in list_keys},
    )


def _build_stack(stack: Mapping[str, Any], row: Mapping[str, Any]) -> Stack:
    layers = []
    for path, entry in stack["linears"].items():
        widths, only = entry if isinstance(entry, list) else (entry, "")
        fan_in, fan_out = widths.split(" -> ")
        layers.append(BlockLinear(path, fan_in, fan_out, row.get("linear_type", "Linear"), only))
    experts = tuple(
        BlockLinear(path, *widths.split(" -> "))
        for path, widths in stack.get("experts", {}).items()
    )
    role = stack.get("role", "layers")
    return Stack(stack["path"], tuple(layers), tuple(stack["norms"]), role, experts)


def _build_example(name: str, variants: tuple[str, ...] = (), **dims: int) -> ReleasedModel:
    return ReleasedModel(name, Dims(**dims), tuple(variants))


FAMILIES = _load_families()
"""Families by `model_type`."""


def _fold(name: str) -> str:
    return name.strip().lower().replace("_", "-")


_INDEX: dict[str, Family] = {
    _fold(spelling): family
    for family in FAMILIES.values()
    for spelling in (*family.aliases, family.name)
}


def lookup_family(name: str) -> Family | None:
    """Returns the family of a `model_type` or alias, ignoring case and dashes; None if unknown."""
    return _INDEX.get(_fold(name))


def get_family(name: str) -> Family:
    """Returns the family `name`; raises `InputError` with similar names if it is unknown."""
    family = lookup_family(name)
    if family is not None:
        return family
    similar = closest_matches(_fold(name), _INDEX, count=3)
    suffix = f" Did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    raise InputError(
        f"{name!r} is neither a supported family nor a model.{suffix} "
        f"Families: {', '.join(FAMILIES)}. For a model, use its directory or full id, OWNER/NAME."
    )


def lora_parameters(fan_in: int, fan_out: int, r: int) -> int:
    """Returns the number of LoRA parameters of a linear layer: A is `(r, in)`, B is `(out, r)`."""
    return r * (fan_in + fan_out)


def example_lora_parameters(family: Family, r: int) -> int:
    """Returns the number of LoRA parameters of the family's `example`; `ValueError` without one."""
    if family.example is None:
        raise ValueError(f"{family.name} has no example")
    dims, variants = family.example.dims, family.example.variants
    blocks = {"layers": dims.layers, "decoder": dims.decoder_layers, "shared": 1}
    return sum(
        blocks[stack.role]
        * lora_parameters(WIDTHS[linear.fan_in](dims), WIDTHS[linear.fan_out](dims), r)
        for stack in family.stacks
        for linear in stack.linears
        if not linear.only or linear.only in variants
    )
