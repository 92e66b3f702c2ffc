"""Types of the family tables: linear layers, stacks, heads and sizes.

Imports neither torch nor transformers, so that `ftlevel list-targets llama` is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["encoder", "decoder", "encoder-decoder"]
LinearType = Literal["Linear", "Conv1D"]

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Dims:
    """Sizes of a released model; `kv_heads` 0 means `heads`, `head_dim` 0 `hidden / heads`.

    `layers` counts those of the only stack, or of the encoder.
    """

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


HIDDEN = "hidden"
FFN = "ffn"
Q_WIDTH = "heads*head_dim"
KV_WIDTH = "kv_heads*head_dim"
FUSED_QKV = "q+k+v widths"  # those of the three layers that it replaces
THREE_HIDDEN = "3*hidden"
TWO_FFN = "2*ffn"

# Width names in the tables -> width.
WIDTHS: dict[str, Callable[[Dims], int]] = {
    HIDDEN: lambda d: d.hidden,
    FFN: lambda d: d.ffn,
    Q_WIDTH: lambda d: d.heads * d.head_size,
    KV_WIDTH: lambda d: d.kv * d.head_size,
    FUSED_QKV: lambda d: (d.heads + 2 * d.kv) * d.head_size,
    THREE_HIDDEN: lambda d: 3 * d.hidden,
    TWO_FFN: lambda d: 2 * d.ffn,
}


@dataclass(frozen=True)
class BlockLinear:
    """A linear layer of a block; widths are keys of `WIDTHS`, `path` is relative to the block.

    `only` names the variants of the family that have it; empty for all.
    """

    path: str
    fan_in: str
    fan_out: str
    attention: bool = False
    type: LinearType = "Linear"
    only: str = ""

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class ExpertTensor:
    """Tensor with all experts of a block, for PEFT's `target_parameters`."""

    path: str
    fan_in: str
    fan_out: str


@dataclass(frozen=True)
class Stack:
    """Repeated blocks; `path` has `{i}` for the layer index.

    `role` is the size that counts the blocks; `shared` is one block for all layers.
    """

    path: str
    linears: tuple[BlockLinear, ...]
    norms: tuple[str, ...]
    role: Literal["layers", "decoder", "shared"] = "layers"
    experts: tuple[ExpertTensor, ...] = ()


@dataclass(frozen=True)
class Head:
    """Modules on top of the base model for a task, as in `modules_to_save`."""

    task: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class ReleasedModel:
    """A released model; `variants` are the `BlockLinear.only` values that it has."""

    name: str
    dims: Dims
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Module names of all models of one transformers `model_type`.

    Attributes:
        name: the `model_type`.
        aliases: models or model types with the same modules.
        attention_only: shortest names that select only the attention's linear layers.
        outer_norms: full names of norms outside blocks and heads.
    """

    name: str
    kind: Kind
    stacks: tuple[Stack, ...]
    attention_only: tuple[str, ...]
    heads: tuple[Head, ...]
    embeddings: tuple[str, ...]
    outer_norms: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    example: ReleasedModel | None = None
    note: str = ""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """Linear layers that low-rank methods adapt by default: all in the blocks."""
        names = (linear.name for stack in self.stacks for linear in stack.linears)
        return tuple(dict.fromkeys(names))

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """Expert tensors for PEFT's `target_parameters`."""
        return tuple(expert.path for stack in self.stacks for expert in stack.experts)


def lora_parameters(fan_in: int, fan_out: int, r: int) -> int:
    """Return the LoRA parameters of one linear layer: A is `(r, in)`, B is `(out, r)`."""
    return r * (fan_in + fan_out)


def example_lora_parameters(family: Family, r: int) -> int:
    """Return the LoRA parameters of the family's example; raises `ValueError` if it has none."""
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
