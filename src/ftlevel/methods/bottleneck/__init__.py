"""Bottleneck adapters: builds `BottleneckConfig`, at positions in a block by model type.

With h the output of a sub-layer's last linear layer, r its residual, LN the norm after the sum in
post-norm models, x the input of the feed-forward, and A(x) = s · up(f(down(x))):

    houlsby, pfeiffer     h ← h + A(h)             Houlsby et al., 2019, § 2.1
    seq_bn                h ← h + A(LN(h + r))     Pfeiffer et al., 2021, appendix A.1: post-norm
                          h ← h + A(h + r)         the same: pre-norm
    parallel              h ← h + A(x)             He et al., 2022, § 3.3
    par_bn                h ← h + A(r)             the same, as in AdapterHub
    adapter_plus          y ← y + A(y)             Steitz & Roth, 2024: y = LN(h + r), or h + r

Only houlsby also adapts attention outputs, including cross-attention. Notes:

- AdapterHub names houlsby double_seq_bn; its older name of seq_bn is pfeiffer.
- Dropout of the sub-layer comes after the adapter here, and before it in Houlsby et al. (2019,
  figure 2) and AdapterHub. Only training differs.
- Gemma 2 and 3 and OLMo 2 normalize sub-layer outputs; the adapter is before that norm. seq_bn,
  par_bn and adapter_plus are unsupported there, and in Granite, which scales the output.
- GPT-NeoX, GPT-J, Falcon and Phi add attention and feed-forward to the same residual. Each adapter
  stays on its branch, and the same three placements are unsupported.
- In a mixture of experts the whole feed-forward is one position: one adapter for all experts.
- ALBERT's layers share one block and hence its adapters.

The module `layer` imports peft and is imported only when needed. The text constants here are part
of docs/methods.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from ftlevel.config.methods.other import ON_RESIDUAL, REDUCTION_FACTOR, AdapterSpec, default_scaling
from ftlevel.errors import InputError
from ftlevel.methods.base import Base, MergeInfo, Method, StepSupport
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import single_row


@dataclass(frozen=True)
class AdapterPositions:
    """Names of the modules at which a transformer block can get adapters, relative to the block.

    Attributes:
        attention: last linear layer of each attention module.
        feed_forward: last linear layer of the feed-forward, or the whole feed-forward module.
        inputs: possible names of the first linear layer; empty if `feed_forward` is the module.
        residual: module whose input is the residual to which the feed-forward's output is added.
            Empty if other terms are added, too, or the output is normalized or scaled first.
        norm: layer norm after this addition; empty in pre-norm models.
    """

    attention: tuple[str, ...]
    feed_forward: str
    inputs: tuple[str, ...] = ()
    residual: str = ""
    norm: str = ""


_BERT = AdapterPositions(
    ("attention.output.dense",),
    "output.dense",
    ("intermediate.dense",),
    "intermediate",
    "output.LayerNorm",
)
_LLAMA = AdapterPositions(
    ("self_attn.o_proj",), "mlp.down_proj", ("mlp.up_proj",), "post_attention_layernorm"
)
_EXPERTS = AdapterPositions(("self_attn.o_proj",), "mlp", residual="post_attention_layernorm")
_GPT2 = AdapterPositions(("attn.c_proj",), "mlp.c_proj", ("mlp.c_fc",), "ln_2")
_FALCON = AdapterPositions(("self_attention.dense",), "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",))
_T5 = AdapterPositions(
    ("SelfAttention.o", "EncDecAttention.o"),
    "DenseReluDense.wo",
    ("DenseReluDense.wi", "DenseReluDense.wi_0"),
    "layer_norm",
)
_CROSS = ("self_attn.out_proj", "encoder_attn.out_proj")
_BART = AdapterPositions(_CROSS, "fc2", ("fc1",), "fc1", "final_layer_norm")
_MBART = AdapterPositions(_CROSS, "fc2", ("fc1",), "final_layer_norm")

ADAPTER_POSITIONS: dict[str, AdapterPositions] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta-v2": _BERT,
    "mpnet": replace(_BERT, attention=("attention.attn.o",)),
    "distilbert": AdapterPositions(
        ("attention.out_lin",), "ffn.lin2", ("ffn.lin1",), "ffn", "output_layer_norm"
    ),
    "albert": AdapterPositions(
        ("attention.dense",), "ffn_output", ("ffn",), "ffn", "full_layer_layer_norm"
    ),
    "modernbert": AdapterPositions(("attn.Wo",), "mlp.Wo", ("mlp.Wi",), "mlp_norm"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"), _LLAMA),
    **dict.fromkeys(("granite", "olmo2", "gemma2", "gemma3_text"), replace(_LLAMA, residual="")),
    **dict.fromkeys(("mixtral", "qwen3_moe"), _EXPERTS),
    "phi3": replace(_LLAMA, inputs=("mlp.gate_up_proj",)),
    "phi": AdapterPositions(("self_attn.dense",), "mlp.fc2", ("mlp.fc1",)),
    "starcoder2": replace(_LLAMA, feed_forward="mlp.c_proj", inputs=("mlp.c_fc",)),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _GPT2),
    "gpt_neo": replace(_GPT2, attention=("attn.attention.out_proj",)),
    "gptj": AdapterPositions(("attn.out_proj",), "mlp.fc_out", ("mlp.fc_in",)),
    "gpt_neox": AdapterPositions(("attention.dense",), "mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),
    "bloom": replace(_FALCON, residual="post_attention_layernorm"),
    "falcon": _FALCON,
    "opt": AdapterPositions(("self_attn.out_proj",), "fc2", ("fc1",), "final_layer_norm"),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "marian"), _BART),
    **dict.fromkeys(("mbart", "pegasus", "m2m_100", "blenderbot"), _MBART),
}


def get_adapter_positions(config: Any) -> AdapterPositions | None:
    """Returns the adapter positions in models with `config`, or None for unknown model types."""
    model_type = getattr(config, "model_type", None)
    if model_type not in ADAPTER_POSITIONS and hasattr(config, "get_text_config"):
        model_type = config.get_text_config().model_type
    return ADAPTER_POSITIONS.get(str(model_type))


def get_placement_error(config: Any, placement: str) -> str | None:
    """Returns why a model with `config` does not support `placement`, or None."""
    positions = get_adapter_positions(config)
    if placement not in ON_RESIDUAL or positions is None:
        return None
    if not positions.residual:
        return (
            f"placement {placement} reads the sum of the feed-forward's output and its residual, "
            f"and {config.model_type} does not simply add the two"
        )
    defaults = {"do_layer_norm_before": True, "apply_residual_connection_post_layernorm": False}
    for name, value in defaults.items():  # OPT-350m, BLOOM
        if getattr(config, name, value) != value:
            model = f"a {config.model_type} with {name} {not value}"
            return f"placement {placement} is not known of {model}"
    return None


def target_pattern(positions: AdapterPositions, placement: str) -> str:
    """Returns a regular expression for the full names of the modules to adapt for `placement`.

    PEFT matches listed names as suffixes, and `output.dense` would also match BERT's
    `attention.output.dense`.
    """
    attention = positions.attention if placement == "houlsby" else ()
    end = (placement == "adapter_plus" and positions.norm) or positions.feed_forward
    paths = "|".join(path.replace(".", r"\.") for path in (*attention, end))
    return rf"(?:.*\.)?\d+\.(?:{paths})"


def block_of(positions: AdapterPositions | None, module_name: str) -> str | None:
    """Returns the name prefix of the block whose feed-forward or norm is `module_name`, or None."""
    for end in (positions.feed_forward, positions.norm) if positions else ():
        block = module_name.removesuffix(end)
        if (
            end
            and module_name.endswith(f".{end}")
            and block.removesuffix(".").rpartition(".")[2].isdigit()
        ):
            return block
    return None


def get_input_layer(
    positions: AdapterPositions | None, module_name: str, names: Iterable[str]
) -> str | None:
    """Returns the first linear layer of the feed-forward that ends at `module_name`, or None.

    `names` are the names of all modules of the model.
    """
    block = block_of(positions, module_name)
    if positions is None or block is None:
        return None
    modules = set(names)
    return next((block + path for path in positions.inputs if block + path in modules), None)


_INTRODUCTION = """\
`--set method.placement=…` selects the position of an adapter A(·) = s · up(f(down(·))) in a block.
h is the output of the feed-forward, x its input, and r the residual that h is added to. LN is the
layer norm after that sum in post-norm models (BERT, BART), where x is r. In pre-norm models (GPT-2,
Llama, T5), x is r after its norm.
"""

_ROWS = (
    ("placement", "paper", "the adapter adds to", "reads: post-norm", "reads: pre-norm",
     "in AdapterHub"),
    ("---",) * 6,
    ("`houlsby`", "Houlsby et al., 2019, section 2.1", "h, and the output of each attention", "h",
     "h", "`double_seq_bn`, formerly `houlsby`; with `cross_adapter` in an encoder-decoder"),
    ("`seq_bn`", "Pfeiffer et al., 2021, arXiv:2005.00247, appendix A.1", "h", "LN(h + r)", "h + r",
     "`seq_bn`, formerly `pfeiffer`"),
    ("`pfeiffer`", "the same, but reads h as Houlsby et al. do", "h", "h", "h",
     "`double_seq_bn` with `mh_adapter=False`"),
    ("`par_bn`", "He et al., 2022, arXiv:2110.04366, section 3.3; s = 4", "h", "r", "r",
     "`par_bn`, formerly `parallel`; `scaled_par_bn` with `method.scaling=learned`"),
    ("`parallel`", "the same, but reads the feed-forward's input; s = 4", "h", "x = r", "x",
     "`par_bn` in post-norm models, else none"),
    ("`adapter_plus`", "Steitz & Roth, 2024, arXiv:2406.06820; s is learned per channel",
     "the block's output y", "y = LN(h + r)", "y = h + r",
     "`AdapterPlusConfig` with `stochastic_depth=0`"),
)  # fmt: skip

_MORE = """
`seq_bn`, `par_bn` and `adapter_plus` need a residual to which only the feed-forward is added.
GPT-J, GPT-NeoX, Phi, Falcon, Gemma 2 and 3, OLMo 2 and Granite therefore support only `houlsby`,
`pfeiffer` and `parallel`. A new adapter does not change the output. The model's own dropout comes
after the adapter, and `adapter_dropout` is applied in the bottleneck; in AdapterHub, the model's
dropout comes before the adapter, and adapter dropout is applied to the adapter's output."""

PAGE = "\n".join([_INTRODUCTION, *(f"| {' | '.join(row)} |" for row in _ROWS), _MORE])


MERGE_ERROR = (
    "A bottleneck adapter is not linear in the hidden state, so no weight of the base model can "
    "hold it and it cannot be merged. Keep it separate from the base, which costs two small matrix "
    "products a site, or train with a method that merges, such as --method lora."
)


class Bottleneck(Method):
    """Method that adds bottleneck adapters at positions that depend on the model type."""

    info = single_row(
        "adapter",
        "two small layers inside every block",
        "",
        "Houlsby et al., 2019, arXiv:1902.00751",
        134_496_256,
    )
    tuner = "ftlevel.methods.bottleneck.layer"
    step = StepSupport(
        workers=lambda spec: (
            f"{spec.placement} adapters keep their input in the model"
            if spec.placement in ("parallel", *ON_RESIDUAL)
            else ""
        ),
        pruning=lambda spec: (
            f"{spec.placement} adapters read the residual" if spec.placement in ON_RESIDUAL else ""
        ),
    )
    merge_info = MergeInfo(("BOTTLENECK",), into_weights=False, get_error=lambda _: MERGE_ERROR)
    page = PAGE

    def rates(self, spec: AdapterSpec) -> Rates:
        """Returns the default learning rates, which depend on placement and scaling."""
        scaling = default_scaling(spec.placement) if spec.scaling is None else spec.scaling
        if isinstance(scaling, float) and scaling > 1:
            return Rates(small=1e-3, large=1e-4, source="a third of Houlsby et al., section 3.2")
        narrow = 6e-3 if spec.placement == "pfeiffer" else 3e-3
        source = "Houlsby et al., section 3.2"
        return Rates(small=narrow, large=3e-4, source=source, by_architecture={"decoder": 3e-3})

    def format_spec(self, spec: AdapterSpec) -> str:
        """Returns placement, width, activation, scaling and dropout as text."""
        width = f"reduction {spec.reduction_factor or REDUCTION_FACTOR:g}"
        if spec.bottleneck_dim is not None:
            width = f"bottleneck {spec.bottleneck_dim}"
        scaling = spec.scaling or default_scaling(spec.placement)
        factor = scaling if isinstance(scaling, str) else f"{scaling:g}"
        dropout = f", dropout {spec.adapter_dropout:g}" if spec.adapter_dropout else ""
        return f"{spec.placement}, {width}, {spec.non_linearity}, scaling {factor}{dropout}"

    def get_error(self, spec: AdapterSpec, config: Any, *_: str) -> str | None:
        """Returns why the placement is unsupported and which are supported, or None."""
        message = get_placement_error(config, spec.placement)
        return f"{message}. Use placement houlsby, pfeiffer or parallel." if message else None

    def default_target_modules(self, spec: AdapterSpec, model: Any) -> list[str]:
        """Returns the adapted modules, sorted; raises `InputError` for unknown model types."""
        positions = get_adapter_positions(model.config)
        if positions is None:
            raise InputError(
                f"--method adapter: no positions are known for {model.config.model_type!r}. "
                f"Families: {', '.join(ADAPTER_POSITIONS)}. Name the last linear layers of its "
                "sub-layers with --target-modules, or use --method lora."
            )
        pattern = re.compile(target_pattern(positions, spec.placement))
        return sorted(name for name, _ in model.named_modules() if pattern.fullmatch(name))

    def build(self, spec: AdapterSpec, base: Base) -> Any:
        """Returns the `BottleneckConfig` for `spec` and the modules of `base`."""
        from ftlevel.methods.bottleneck.layer import BottleneckConfig

        return BottleneckConfig(
            **base.shared,
            placement=spec.placement,
            bottleneck_dim=spec.bottleneck_dim,
            reduction_factor=spec.reduction_factor or REDUCTION_FACTOR,
            non_linearity=spec.non_linearity,
            adapter_dropout=spec.adapter_dropout,
            scaling=spec.scaling,
        )


METHODS = {"adapter": Bottleneck()}
