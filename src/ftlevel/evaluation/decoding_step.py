"""Forward pass of one new token per row through decoders like Llama, on a CPU.

    q, k, v = product(norm(x));   x += product(attention(rope(q), rope(k), v))
    gate, up = product(norm(x));  x += product(act(gate) · up)

With few rows, transformers' modules take as long for about 60 calls of torch per layer, most of
them on a few numbers, as for the products. Here a layer has half as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ftlevel.evaluation.attention import SharedPrompts, attend
from ftlevel.evaluation.packed_weights import MAX_ROWS, PackedProduct, PackedWeights
from ftlevel.fast.fused_layers import get_original
from ftlevel.models.upstream.tensors import is_watched

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""Classes of transformers that compute this formula."""


class _Norm:
    """RMS norm with `weight` (n,), or (heads, n) for the heads of queries and keys.

    y = w √n x / √(|x|² + n ε), in half as many operations as transformers' formula.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight, self.eps = weight, eps
        self._scaled = weight.float() * size**0.5
        self._floor = torch.tensor((size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        size = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        return (values / torch.hypot(size, self._floor)).mul_(self._scaled).to(x.dtype)


@dataclass(frozen=True)
class _Layer:
    """Decoder layer with the sizes of `attention`; `head_norm` normalizes queries and keys."""

    attention: Any
    norm: _Norm
    mlp_norm: _Norm
    head_norm: _Norm | None
    products: tuple[PackedProduct, ...]
    activation: Any

    @property
    def is_off(self) -> bool:
        """Whether LoRA of a linear layer is disabled."""
        return any(product.is_off for product in self.products)

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
        prompts: Sequence[SharedPrompts],
    ) -> Tensor:
        """Returns the output of the layer for `x` (rows, hidden)."""
        rows, width = len(x), self.attention.head_dim
        heads, key_heads = _count_heads(self.attention)
        qkv, output, gate_up, down = self.products
        states = qkv(self.norm(x)).view(rows, -1, width)
        states, value = torch.split(states, [heads + key_heads, key_heads], 1)
        if self.head_norm is not None:
            states = self.head_norm(states)
        cos, sin = rope
        states = torch.addcmul(states * cos, states.roll(width // 2, -1), sin)
        query, key = torch.split(states, [heads, key_heads], 1)
        keys, values = cache.update(key[:, :, None], value[:, :, None])
        query = query.view(rows, key_heads, -1, width)
        attn_output = attend(query, keys, values, mask, self.attention.layer_idx, prompts)
        x = x + output(attn_output.reshape(rows, -1))
        gate, up = gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + down(self.activation(gate) * up)


class DecodingStep:
    """Computes logits of one new token per row; `layers` are the decoder layers of `base`."""

    def __init__(self, base: Any, layers: Sequence[_Layer]) -> None:
        self._layers = layers
        self._embed, self._head = base.get_input_embeddings(), base.get_output_embeddings()
        self._norm, self._rotary = base.model.norm, base.model.rotary_emb
        attention = layers[0].attention
        heads, key_heads = _count_heads(attention)
        scales = [attention.scaling] * heads + [1.0] * key_heads
        self._scales = torch.tensor(scales, dtype=self._embed.weight.dtype)[:, None]

    def supports(self, num_rows: int) -> bool:
        """Returns whether packed weights can be used: for few rows, with adapters enabled."""
        return num_rows <= MAX_ROWS and not any(layer.is_off for layer in self._layers)

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        caches: Sequence[Any],
        prompts: Sequence[SharedPrompts],
    ) -> Tensor:
        """Returns logits `(rows, vocabulary)`, and appends keys and values to `caches`.

        `ids` and `positions` are `(rows, 1)`; `mask` is `(rows, 1, 1, seq)`, True at positions to
        ignore, or None.
        """
        x = self._embed(ids)
        cos, sin = self._rotary(x, positions)
        first, second = sin.chunk(2, -1)
        rope = cos * self._scales, torch.cat([-first, second], -1) * self._scales
        x = x[:, 0]
        for layer, cache in zip(self._layers, caches, strict=True):
            x = layer(x, rope, mask, cache, prompts)
        logits: Tensor = self._head(self._norm(x))
        return logits


def create_decoding_step(base: Any, packed: PackedWeights) -> DecodingStep | None:
    """Returns the step of the transformers model `base`; None for models that differ."""
    decoder: Any = getattr(base, "model", None)
    # Hooks of `fast` have no effect on a pass without layout and gradients.
    if type(decoder).__name__ not in MODELS or any(
        is_watched(module, "ftlevel.fast.") for module in decoder.modules()
    ):
        return None
    layers = [layer for block in decoder.layers if (layer := _create_layer(block, packed))]
    return DecodingStep(base, layers) if len(layers) == len(decoder.layers) else None


def _create_layer(block: Any, packed: PackedWeights) -> _Layer | None:
    attention = block.self_attn
    mlp: Any = get_original(block.mlp)
    norms: list[Any] = [block.input_layernorm, block.post_attention_layernorm]
    if hasattr(attention, "q_norm"):  # Qwen3
        norms += [attention.q_norm, attention.k_norm]
    norms = [get_original(norm) for norm in norms]
    products: Any = (
        packed.get_product(attention.q_proj, attention.k_proj, attention.v_proj),
        packed.get_product(attention.o_proj),
        packed.get_product(mlp.gate_proj, mlp.up_proj),
        packed.get_product(mlp.down_proj),
    )
    # An adapter may have replaced a norm or a linear layer.
    if None in products or not all(type(norm).__name__.endswith("RMSNorm") for norm in norms):
        return None
    norm, mlp_norm, *head_norms = (_Norm(norm.weight, norm.variance_epsilon) for norm in norms)
    head_norm = None
    if head_norms:
        pairs = zip(head_norms, _count_heads(attention), strict=True)
        weights = [each.weight.expand(count, -1) for each, count in pairs]
        head_norm = _Norm(torch.cat(weights), head_norms[0].eps)
    return _Layer(attention, norm, mlp_norm, head_norm, products, mlp.act_fn)


def _count_heads(attention: Any) -> tuple[int, int]:
    """Returns the numbers of query heads and key heads."""
    heads: int = attention.config.num_attention_heads
    return heads, heads // attention.num_key_value_groups
