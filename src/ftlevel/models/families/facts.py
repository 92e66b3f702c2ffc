"""The words in which the family tables are written: linears, stacks, heads, sizes.

Nothing here or in the tables imports torch or transformers: `ftlevel list-targets llama` answers
from them before either could be loaded.
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
    """The sizes of one released model, named as in its paper.

    Attributes:
        layers: the layers of the only stack, or of the encoder.
        decoder_layers: the layers of the decoder of an encoder-decoder.
        kv_heads: the heads of keys and values; 0 means as many as `heads`.
        head_dim: 0 means `hidden / heads`.
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
        """The width of one head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def kv(self) -> int:
        """The heads of keys and values."""
        return self.kv_heads or self.heads


HIDDEN = "hidden"
FFN = "ffn"
Q_WIDTH = "heads*head_dim"
KV_WIDTH = "kv_heads*head_dim"
FUSED_QKV = "q+k+v widths"  # those of the three linears that it replaces
THREE_HIDDEN = "3*hidden"
TWO_FFN = "2*ffn"

# Every width that a table may write, and its value.
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
    """One linear of a block.

    Attributes:
        path: its name inside the block, as in `self_attn.q_proj`.
        fan_in, fan_out: its widths, keys of `WIDTHS`.
        attention: whether it belongs to the attention.
        only: which variants of the family have it; empty when all of them do.
    """

    path: str
    fan_in: str
    fan_out: str
    attention: bool = False
    type: LinearType = "Linear"
    only: str = ""

    @property
    def name(self) -> str:
        """The last part of the path, which is what people type."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor that holds all experts of a block; PEFT reaches it by `target_parameters`."""

    path: str
    fan_in: str
    fan_out: str


@dataclass(frozen=True)
class Stack:
    """Blocks that repeat.

    Attributes:
        path: the name of a block in the full model, `{i}` for the layer.
        role: which size counts the blocks; `shared` is one block that all layers use.
        norms: norm layers inside the block that have weights.
    """

    path: str
    linears: tuple[BlockLinear, ...]
    norms: tuple[str, ...]
    role: Literal["layers", "decoder", "shared"] = "layers"
    experts: tuple[ExpertTensor, ...] = ()


@dataclass(frozen=True)
class Head:
    """The modules on top of the base model for a task, as `modules_to_save` would name them."""

    task: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A released model of the family, for a number that means something.

    Attributes:
        variants: the values of `BlockLinear.only` that this model has.
    """

    name: str
    dims: Dims
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """What is known of every model of one transformers `model_type`.

    Attributes:
        name: the `model_type`.
        aliases: names of models, or of other model types, that have exactly these modules.
        attention_only: the shortest names that pick the attention's linears and nothing else.
        outer_norms: norms outside the blocks and the heads, by their full names.
    """

    name: str
    kind: Kind
    stacks: tuple[Stack, ...]
    attention_only: tuple[str, ...]
    heads: tuple[Head, ...]
    embeddings: tuple[str, ...]
    outer_norms: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    example: Example | None = None
    note: str = ""

    @property
    def default_targets(self) -> tuple[str, ...]:
        """The linears that a low-rank method adapts when nothing is asked: all of the blocks."""
        names = (linear.name for stack in self.stacks for linear in stack.linears)
        return tuple(dict.fromkeys(names))

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """The expert tensors of a mixture of experts, as PEFT's `target_parameters` wants them."""
        return tuple(expert.path for stack in self.stacks for expert in stack.experts)


def lora_parameters(fan_in: int, fan_out: int, r: int) -> int:
    """Count what LoRA adds to one linear: A is (r, in) and B is (out, r)."""
    return r * (fan_in + fan_out)


def example_lora_parameters(family: Family, r: int) -> int:
    """Count the trainable parameters of LoRA on all linears of the family's example.

    Raises:
        ValueError: the family has no example.
    """
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
