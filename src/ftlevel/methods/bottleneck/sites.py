"""Where a bottleneck adapter sits in a block, family by family.

Serial adapters (houlsby, pfeiffer) change the output h of a sub-layer's last linear, before the
skip connection is added:

    h ← h + s · up(f(down(h)))

Parallel ones add to the output of the feed-forward what they make of its input x:

    h ← FFN(x) + s · up(f(down(x)))

Where the papers and this table differ:

- Houlsby et al. (2019, figure 2) place the adapter after the sub-layer's dropout; here the dropout,
  where a model has one, comes after the adapter.
- AdapterHub's version of Pfeiffer et al. (2021) feeds a post-norm model's adapter with the sum that
  went through the layer norm; here it gets the sub-layer's output, as Houlsby's does. In pre-norm
  models the two are the same.
- He et al. (2022) take x where the feed-forward begins. In pre-norm models that is what its first
  linear is given, after the norm.
- Gemma 2 and 3 and OLMo 2 normalise a sub-layer's output too. The adapter is before that norm, so
  that its size is held by it.
- GPT-NeoX, GPT-J, Falcon and Phi add attention and feed-forward to the same residual,
  x + attention(x) + FFN(x). Each adapter stays on its own branch, before the sum: the attention's
  adapter does not reach the feed-forward of its own block, as the attention itself does not.
- A mixture of experts has no single last linear. The whole feed-forward block is the site, behind
  the router: one adapter for all experts.
- Encoder-decoders get a further Houlsby adapter after the cross-attention.
- ALBERT's layers share one block, and so they share its adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sites:
    """The positions in one block, as paths that begin right below the block's index.

    Attributes:
        attention: the last linears of the attentions.
        feed_forward: the last linear of the feed-forward, or the whole of it.
        inputs: linears that get the feed-forward's input, the first that a model has; none where
            `feed_forward` is the whole and gets it itself.
    """

    attention: tuple[str, ...]
    feed_forward: str
    inputs: tuple[str, ...] = ()


_BERT = Sites(("attention.output.dense",), "output.dense", ("intermediate.dense",))
_LLAMA = Sites(("self_attn.o_proj",), "mlp.down_proj", ("mlp.up_proj",))
_EXPERTS = Sites(("self_attn.o_proj",), "mlp")
_GPT2 = Sites(("attn.c_proj",), "mlp.c_proj", ("mlp.c_fc",))
_BLOOM = Sites(("self_attention.dense",), "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",))
_T5 = Sites(
    ("SelfAttention.o", "EncDecAttention.o"),
    "DenseReluDense.wo",
    ("DenseReluDense.wi", "DenseReluDense.wi_0"),
)
_BART = Sites(("self_attn.out_proj", "encoder_attn.out_proj"), "fc2", ("fc1",))

SITES: dict[str, Sites] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta-v2": _BERT,
    "mpnet": Sites(("attention.attn.o",), "output.dense", ("intermediate.dense",)),
    "distilbert": Sites(("attention.out_lin",), "ffn.lin2", ("ffn.lin1",)),
    "albert": Sites(("attention.dense",), "ffn_output", ("ffn",)),
    "modernbert": Sites(("attn.Wo",), "mlp.Wo", ("mlp.Wi",)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "olmo2"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _LLAMA),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _EXPERTS),
    "phi3": Sites(("self_attn.o_proj",), "mlp.down_proj", ("mlp.gate_up_proj",)),
    "phi": Sites(("self_attn.dense",), "mlp.fc2", ("mlp.fc1",)),
    "starcoder2": Sites(("self_attn.o_proj",), "mlp.c_proj", ("mlp.c_fc",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gpt_neo": Sites(("attn.attention.out_proj",), "mlp.c_proj", ("mlp.c_fc",)),
    "gptj": Sites(("attn.out_proj",), "mlp.fc_out", ("mlp.fc_in",)),
    "gpt_neox": Sites(("attention.dense",), "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),
    **dict.fromkeys(("bloom", "falcon"), _BLOOM),
    "opt": Sites(("self_attn.out_proj",), "fc2", ("fc1",)),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot"), _BART),
}


def sites_of(config: Any) -> Sites | None:
    """Return the positions in the model that a transformers config describes, None if unknown."""
    model_type = getattr(config, "model_type", None)
    if model_type not in SITES and hasattr(config, "get_text_config"):
        model_type = config.get_text_config().model_type
    return SITES.get(str(model_type))


def site_pattern(sites: Sites, placement: str) -> str:
    """Return one regular expression for the full names of the sites.

    Not a list of names: PEFT matches those by their end, and `output.dense` would also reach
    BERT's `attention.output.dense`. Every path begins right below the index of a block.
    """
    attention = sites.attention if placement == "houlsby" else ()
    paths = "|".join(path.replace(".", r"\.") for path in (*attention, sites.feed_forward))
    return rf"(?:.*\.)?\d+\.(?:{paths})"


def find_input(sites: Sites | None, site: str, names: Iterable[str]) -> str | None:
    """Return the module that is given the input of the feed-forward that ends at `site`.

    Args:
        sites: the family's positions.
        site: full name of a module.
        names: full names of all modules.

    Returns:
        None where `site` is not the last linear of a feed-forward: it sees its input itself.
    """
    if sites is None or not site.endswith(f".{sites.feed_forward}"):
        return None
    block = site.removesuffix(sites.feed_forward)
    if not block.removesuffix(".").rpartition(".")[2].isdigit():
        return None
    known = set(names)
    return next((block + path for path in sites.inputs if block + path in known), None)
