"""Where a bottleneck adapter sits in a block, family by family.

h is the output of a sub-layer's last linear, before the skip connection; A(x) = s · up(f(down(x)));
r is the residual that the model adds to h, and LN the layer norm of post-norm models, through which
that sum goes. x is what the feed-forward's first linear is given. The feed-forward gives

    houlsby, pfeiffer     h ← h + A(h)             Houlsby et al., 2019, section 2.1
    seq_bn                h ← h + A(LN(h + r))     Pfeiffer et al., 2021, appendix A.1: post-norm
                          h ← h + A(h + r)         the same: pre-norm
    parallel              h ← h + A(x)             He et al., 2022, section 3.3
    par_bn                h ← h + A(r)             the same, as AdapterHub has it
    adapter_plus          y ← y + A(y)             Steitz & Roth, 2024: y = LN(h + r), or h + r

houlsby is the only one that has an adapter after the attention too. In post-norm models r is x, so
that parallel and par_bn are one; in pre-norm models x is r after its norm. There adapter_plus is
seq_bn with a factor a channel, as h + r is the block's output.

AdapterHub calls houlsby double_seq_bn; its older name for seq_bn is pfeiffer. Other differences:

- Houlsby et al. (2019, figure 2) and AdapterHub place the adapter after the sub-layer's dropout;
  here the dropout, where a model has one, comes after the adapter. Only training differs.
- Gemma 2 and 3 and OLMo 2 normalise a sub-layer's output too. The adapter is before that norm, so
  that its size is held by it. No paper says what the sum with the residual would be:
  seq_bn, par_bn and adapter_plus are refused, as for Granite, which scales the output.
- GPT-NeoX, GPT-J, Falcon and Phi add attention and feed-forward to the same residual,
  x + attention(x) + FFN(x). Each adapter stays on its own branch, before the sum: the attention's
  adapter does not reach the feed-forward of its own block, as the attention itself does not. The
  residual of the feed-forward alone is none, so the same three are refused.
- A mixture of experts has no single last linear. The whole feed-forward block is the site, behind
  the router: one adapter for all experts.
- Encoder-decoders get a further Houlsby adapter after the cross-attention.
- ALBERT's layers share one block, and so they share its adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.config.methods.bottleneck import ON_RESIDUAL


@dataclass(frozen=True)
class Sites:
    """The positions in one block, as paths that begin right below the block's index.

    Attributes:
        attention: the last linears of the attentions.
        feed_forward: the last linear of the feed-forward, or the whole of it.
        inputs: linears that get the feed-forward's input, the first that a model has; none where
            `feed_forward` is the whole and gets it itself.
        residual: the module whose input is what the feed-forward's output is added to; empty where
            the two are not simply added.
        norm: the layer norm that their sum goes through; empty in pre-norm models.
    """

    attention: tuple[str, ...]
    feed_forward: str
    inputs: tuple[str, ...] = ()
    residual: str = ""
    norm: str = ""


_BERT = Sites(
    ("attention.output.dense",), "output.dense", ("intermediate.dense",),
    "intermediate", "output.LayerNorm",
)  # fmt: skip
_LLAMA = Sites(("self_attn.o_proj",), "mlp.down_proj", ("mlp.up_proj",), "post_attention_layernorm")
_EXPERTS = Sites(("self_attn.o_proj",), "mlp", residual="post_attention_layernorm")
_GPT2 = Sites(("attn.c_proj",), "mlp.c_proj", ("mlp.c_fc",), "ln_2")
_FALCON = Sites(("self_attention.dense",), "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",))
_T5 = Sites(
    ("SelfAttention.o", "EncDecAttention.o"),
    "DenseReluDense.wo",
    ("DenseReluDense.wi", "DenseReluDense.wi_0"),
    "layer_norm",
)
_CROSS = ("self_attn.out_proj", "encoder_attn.out_proj")
_BART = Sites(_CROSS, "fc2", ("fc1",), "fc1", "final_layer_norm")
_MBART = Sites(_CROSS, "fc2", ("fc1",), "final_layer_norm")

SITES: dict[str, Sites] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta-v2": _BERT,
    "mpnet": replace(_BERT, attention=("attention.attn.o",)),
    "distilbert": Sites(
        ("attention.out_lin",), "ffn.lin2", ("ffn.lin1",), "ffn", "output_layer_norm"
    ),
    "albert": Sites(("attention.dense",), "ffn_output", ("ffn",), "ffn", "full_layer_layer_norm"),
    "modernbert": Sites(("attn.Wo",), "mlp.Wo", ("mlp.Wi",), "mlp_norm"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"), _LLAMA),
    **dict.fromkeys(("granite", "olmo2", "gemma2", "gemma3_text"), replace(_LLAMA, residual="")),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _EXPERTS),
    "phi3": replace(_LLAMA, inputs=("mlp.gate_up_proj",)),
    "phi": Sites(("self_attn.dense",), "mlp.fc2", ("mlp.fc1",)),
    "starcoder2": replace(_LLAMA, feed_forward="mlp.c_proj", inputs=("mlp.c_fc",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gpt_neo": replace(_GPT2, attention=("attn.attention.out_proj",)),
    "gptj": Sites(("attn.out_proj",), "mlp.fc_out", ("mlp.fc_in",)),
    "gpt_neox": Sites(("attention.dense",), "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),
    "bloom": replace(_FALCON, residual="post_attention_layernorm"),
    "falcon": _FALCON,
    "opt": Sites(("self_attn.out_proj",), "fc2", ("fc1",), "final_layer_norm"),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "marian"), _BART),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100", "blenderbot"), _MBART),
}


def sites_of(config: Any) -> Sites | None:
    """Return the positions in the model that a transformers config describes, None if unknown."""
    model_type = getattr(config, "model_type", None)
    if model_type not in SITES and hasattr(config, "get_text_config"):
        model_type = config.get_text_config().model_type
    return SITES.get(str(model_type))


def why_no_residual(config: Any, placement: str) -> str | None:
    """Return why `placement` has no position in the model of `config`; None if it has one."""
    sites = sites_of(config)
    if placement not in ON_RESIDUAL or sites is None:
        return None
    if not sites.residual:
        return (
            f"placement {placement} reads the sum of the feed-forward's output and its residual, "
            f"and {config.model_type} does not simply add the two"
        )
    plain = {"do_layer_norm_before": True, "apply_residual_connection_post_layernorm": False}
    for name, value in plain.items():  # OPT-350m, BLOOM
        if getattr(config, name, value) != value:
            model = f"a {config.model_type} with {name} {not value}"
            return f"placement {placement} is not known of {model}"
    return None


def site_pattern(sites: Sites, placement: str) -> str:
    """Return one regular expression for the full names of the sites.

    Not a list of names: PEFT matches those by their end, and `output.dense` would also reach
    BERT's `attention.output.dense`. Every path begins right below the index of a block.
    """
    attention = sites.attention if placement == "houlsby" else ()
    end = (placement == "adapter_plus" and sites.norm) or sites.feed_forward
    paths = "|".join(path.replace(".", r"\.") for path in (*attention, end))
    return rf"(?:.*\.)?\d+\.(?:{paths})"


def block_of(sites: Sites | None, site: str) -> str | None:
    """Return the name of the block whose feed-forward ends at `site`, with a dot behind it.

    Args:
        sites: the family's positions.
        site: full name of a module.

    Returns:
        None where `site` is not the end of a feed-forward.
    """
    for end in (sites.feed_forward, sites.norm) if sites else ():
        block = site.removesuffix(end)
        if (
            end
            and site.endswith(f".{end}")
            and block.removesuffix(".").rpartition(".")[2].isdigit()
        ):
            return block
    return None


def find_input(sites: Sites | None, site: str, names: Iterable[str]) -> str | None:
    """Return the module that is given the input of the feed-forward that ends at `site`.

    Args:
        sites: the family's positions.
        site: full name of a module.
        names: full names of all modules.

    Returns:
        None where `site` is not the last linear of a feed-forward: it sees its input itself.
    """
    block = block_of(sites, site)
    if sites is None or block is None:
        return None
    known = set(names)
    return next((block + path for path in sites.inputs if block + path in known), None)
