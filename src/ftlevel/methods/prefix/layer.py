"""One attention with its prefixes.

    plain:      K, V = the parameters, each (P, kv_heads · head_dim)
    projected:  [K; V] = W₂ tanh(W₁ E),  E (P, hidden) and W₁ shared by all attentions of the model

(Li & Liang, 2021, sections 4.2 and 4.3.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftlevel.methods.prefix.attention import Prefix, own_attention
from ftlevel.methods.prefix.config import PrefixKvConfig
from ftlevel.methods.virtual_tokens import VirtualTokenLayer, device_of

INIT_STD = 0.02


class PrefixLayer(VirtualTokenLayer):
    """An attention that sees the prefixes of its active adapters, one after the other.

    Several active adapters put theirs behind one another, as their keys have no order. Attributes
    that the layer does not have are those of the attention, which it stands in for.

    Args:
        base_layer: the attention.
    """

    base_layer: Any

    adapter_layer_names = (
        "prefix_kv_keys",
        "prefix_kv_values",
        "prefix_kv_embedding",
        "prefix_kv_hidden",
        "prefix_kv_output",
    )
    other_param_names = ("encoders",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prefix_kv_keys = nn.ParameterDict()
        self.prefix_kv_values = nn.ParameterDict()
        self.prefix_kv_embedding = nn.ParameterDict()
        self.prefix_kv_hidden = nn.ModuleDict()
        self.prefix_kv_output = nn.ModuleDict()
        # Which layer holds E and W₁; a plain dict, so that they are parameters of that one only.
        self.encoders: dict[str, PrefixLayer] = {}
        self.kv_heads, self.head_dim = kv_shape(base_layer)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def add_plain(self, adapter_name: str, config: PrefixKvConfig) -> None:
        """Add a prefix of plain keys and values, small and random."""
        shape = (config.num_virtual_tokens, self.kv_heads * self.head_dim)
        for parameters in (self.prefix_kv_keys, self.prefix_kv_values):
            states = torch.empty(shape, device=device_of(self.base_layer), dtype=torch.float32)
            parameters[adapter_name] = nn.Parameter(nn.init.normal_(states, std=INIT_STD))

    def add_projected(
        self, adapter_name: str, config: PrefixKvConfig, encoder: PrefixLayer | None, hidden: int
    ) -> None:
        """Add a prefix that an MLP computes.

        Args:
            adapter_name: its name.
            config: its configuration.
            encoder: the layer that holds E and W₁; None makes this that layer.
            hidden: width of E.
        """
        device, width = device_of(self.base_layer), config.encoder_hidden_size
        if encoder is None:
            encoder = self
            embedding = torch.randn(config.num_virtual_tokens, hidden, device=device)
            self.prefix_kv_embedding[adapter_name] = nn.Parameter(embedding)
            self.prefix_kv_hidden[adapter_name] = nn.Linear(hidden, width, device=device)
        self.encoders[adapter_name] = encoder
        self.prefix_kv_output[adapter_name] = nn.Linear(
            width, 2 * self.kv_heads * self.head_dim, device=device
        )

    def compute(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of one adapter, each (P, kv_heads · head_dim)."""
        if adapter_name in self.prefix_kv_keys:
            return self.prefix_kv_keys[adapter_name], self.prefix_kv_values[adapter_name]
        encoder = self.encoders[adapter_name]
        embedding = encoder.prefix_kv_embedding[adapter_name]
        hidden = torch.tanh(encoder.prefix_kv_hidden[adapter_name](embedding))
        keys, values = self.prefix_kv_output[adapter_name](hidden).chunk(2, dim=-1)
        return keys, values

    def fold(self, adapter_name: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace the MLP of one adapter by what it computes."""
        for parameters, states in ((self.prefix_kv_keys, keys), (self.prefix_kv_values, values)):
            parameters[adapter_name] = nn.Parameter(states.detach().float().clone())
        for name in ("prefix_kv_embedding", "prefix_kv_hidden", "prefix_kv_output", "encoders"):
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]

    def prefix_of(self, names: list[str]) -> Prefix:
        """Return the keys and values of `names`, each (1, kv_heads, ΣP, head_dim)."""
        computed = [self.compute(name) for name in names]
        keys, values = (
            torch.cat(part).view(1, -1, self.kv_heads, self.head_dim).transpose(1, 2)
            for part in zip(*computed, strict=True)
        )
        return keys, values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention with the prefixes of the active adapters."""
        names = self.running()
        if not names:
            return self.base_layer(*args, **kwargs)
        prefix = self.prefix_of(names)
        attend = own_attention(self.base_layer)
        if attend is not None:
            return attend(self.base_layer, prefix, *args, **kwargs)
        return self.base_layer(*args, prefix=prefix, **kwargs)


def kv_shape(attention: nn.Module) -> tuple[int, int]:
    """Return how many heads the keys of an attention have, and their width."""
    config = getattr(attention, "config", None)
    heads = _first(attention, ("n_heads", "num_heads", "num_attention_heads"))
    if heads is None and config is not None:
        heads = config.num_attention_heads
    width = _first(
        attention, ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    )
    if not heads or not width:
        raise ValueError(
            f"{type(attention).__name__} does not say how many heads it has and how wide they are, "
            "so there is no place for a prefix. Name attentions in target_modules, or leave it out."
        )
    return heads // (_first(attention, ("num_key_value_groups",)) or 1), width


def _first(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """Return the first of the attributes `names` that `module` has."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
