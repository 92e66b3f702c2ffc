"""(IA)³: builds `peft.IA3Config` and finds keys, values and feed-forward layers."""

from __future__ import annotations

import re
from typing import Any

from ftlevel.config.methods.ia3 import Ia3Spec
from ftlevel.config.sections import Section
from ftlevel.methods.base import Base, Merging, Method
from ftlevel.methods.facts import MERGES, MethodFacts
from ftlevel.methods.plain_form import FULL_RANK, PlainForm
from ftlevel.methods.rates import Rates

# Name suffixes of key, value and fused QKV layers in all families:
_KEY_VALUE = re.compile(
    r"\.(k|v|key|value|k_lin|v_lin|k_proj|v_proj|key_proj|value_proj|qkv_proj|qkv|Wqkv|c_attn"
    r"|query_key_value|attn\.attn\.k|attn\.attn\.v)$"
)
# The second linear layer of a feed-forward, whose input is scaled:
_FEED_FORWARD = re.compile(
    r"(^|\.)(down_proj|fc2|wo|lin2|fc_out|ffn_output|dense_4h_to_h|(mlp|\d+\.mlp)\.(c_proj|Wo)"
    r"|ffn\.lin2|(?<!attention\.)output\.dense)$"
)


def find_targets(spec: Section, model: Any) -> list[str]:
    """Return key, value and second feed-forward layers in the blocks of `model`, sorted."""
    return sorted(
        name
        for name, module in model.named_modules()
        if re.search(r"\.\d+\.", name)  # inside a numbered block, not in a head
        and hasattr(module, "weight")
        and (_KEY_VALUE.search(name) or is_feed_forward(name))
    )


def is_feed_forward(name: str) -> bool:
    """Return whether `name`, full or shortened, is a second feed-forward layer."""
    return _FEED_FORWARD.search(name) is not None


def build(spec: Ia3Spec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import IA3Config

    return IA3Config(
        **base.shared,
        feedforward_modules=[name for name in base.targets if is_feed_forward(name)],
        fan_in_fan_out=base.fan_in_fan_out,
    )


_METHOD = Method(
    (
        MethodFacts(
            "ia3",
            "ia3",
            "--method ia3",
            "a factor for each key, value and inner feature",
            MERGES,
            "Liu et al., 2022, arXiv:2205.05638",
            614_400,
        ),
    ),
    rate=Rates(narrow=3e-2, wide=3e-3, source="T-Few"),
    build=build,
    find_targets=find_targets,
    merging=Merging(("IA3",), plain_form=PlainForm(never=FULL_RANK)),
)
METHODS = {"ia3": _METHOD}
