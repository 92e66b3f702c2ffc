"""What docs/methods.md says of the placements."""

from __future__ import annotations

_INTRODUCTION = """\
`--set method.placement=…` says where an adapter A(·) = s · up(f(down(·))) stands. h is the output
of the feed-forward, r the residual that it is added to, x what its first linear is given, and LN
the layer norm that follows the sum in post-norm models (BERT, BART). In those x is r; in pre-norm
ones (GPT-2, Llama, T5) x is r after its norm.
"""

_ROWS = (
    ("placement", "paper", "the adapter adds to", "reads: post-norm", "reads: pre-norm",
     "in AdapterHub"),
    ("---",) * 6,
    ("`houlsby`", "Houlsby et al., 2019, section 2.1", "h, and the output of each attention", "h",
     "h", "`double_seq_bn`, formerly `houlsby`; with `cross_adapter` in an encoder-decoder"),
    ("`seq_bn`", "Pfeiffer et al., 2021, arXiv:2005.00247, appendix A.1", "h", "LN(h + r)", "h + r",
     "`seq_bn`, formerly `pfeiffer`"),
    ("`pfeiffer`", "the same place, read as Houlsby et al. read it", "h", "h", "h",
     "`double_seq_bn` with `mh_adapter=False`"),
    ("`par_bn`", "He et al., 2022, arXiv:2110.04366, section 3.3; s = 4", "h", "r", "r",
     "`par_bn`, formerly `parallel`; `scaled_par_bn` with `method.scaling=learned`"),
    ("`parallel`", "the same, read as the feed-forward itself reads; s = 4", "h", "x = r", "x",
     "`par_bn` in post-norm models, else none"),
    ("`adapter_plus`", "Steitz & Roth, 2024, arXiv:2406.06820; s is learned, one a channel",
     "the block's output y", "y = LN(h + r)", "y = h + r",
     "`AdapterPlusConfig` with `stochastic_depth=0`"),
)  # fmt: skip

_MORE = """
An adapter called `pfeiffer` or `parallel` computes what it computed in 0.1.0. `seq_bn`, `par_bn`
and `adapter_plus` need a residual that the feed-forward alone is added to: GPT-J, GPT-NeoX, Phi,
Falcon (attention and feed-forward together), Gemma 2 and 3, OLMo 2 and Granite (another norm or a
factor before the sum) have the other three. All begin as the identity, with up at zero, as
`par_bn` there; AdapterHub draws the others at random. In training a model's own dropout comes
after the adapter here and before it there, and `adapter_dropout` is on the bottleneck here and on
the output there. [Export](export.md#adapterhub) says how adapters go there and come back."""

PAGE = "\n".join([_INTRODUCTION, *(f"| {' | '.join(row)} |" for row in _ROWS), _MORE])
