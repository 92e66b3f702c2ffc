"""Figures of preference losses on a tiny Llama with fixed weights, and that Llama.

The figures were made by a script of plain torch and PEFT without any of this project's code: each
answer alone through the model, formulas as in the papers, float32 on a CPU, with torch 2.13, PEFT
0.21.2 and transformers 5.24; TRL 1.16's trainers give the same within 2e-5 for all but `cdpo`,
`ipo-sum`, `rpo` and `orpo` (it pools their own loss otherwise, or has no such loss). Weights are of
numpy's `RandomState`, whose stream is frozen. `test_losses.py` computes the same by another route
again, so that neither stands alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.tasks.preferences.rows import JudgedRow, PairRow, pair_up

EOS, PAD = 0, 1
PAIRS = [
    ("Q: capital of France?\nA:", " Paris", " Lyon, I think"),
    ("Q: 2 + 2?\nA:", " 4", " 5"),
    ("Name a colour and say why you like it.\n", "Blue, since the sky is blue.", "Blue."),
    ("System: be brief.\nUser: hello\nBot:", " Hi!", " Hello! How can I help you today?"),
]
MARGINS = [1.0, 0.0, 0.5, 2.0]
REFERENCE = np.array(
    [[-49.0160, -95.0687], [-21.0785, -20.7014], [-176.7871, -34.2921], [-33.9214, -220.0691]]
)
"""Log-likelihoods of the preferred and the rejected answers with the adapter off."""
POLICY = np.array(
    [[-45.1058, -91.8983], [-24.8654, -20.1510], [-174.7814, -36.0673], [-31.5665, -217.2595]]
)
LENGTHS = np.array([[7, 15], [3, 3], [29, 6], [5, 34]])
BASELINE = 2.61522

Figures = tuple[float, float, float]
"""The loss, and the norms of its gradient over all A and over all B."""
TABLE: dict[str, tuple[dict[str, Any], Figures, Figures]] = {
    "dpo": ({}, (0.70705, 0.85446, 1.37995), (0.93901, 3.91568, 6.21520)),
    "cdpo": ({}, (0.70637, 0.67529, 1.08979), (0.93562, 3.16921, 4.97249)),
    "robust": ({}, (0.70790, 1.07920, 1.74367), (0.94325, 4.92362, 7.87502)),
    "hinge": ({}, (1.00678, 1.80808, 2.92326), (1.25654, 6.76004, 11.31116)),
    "ipo-sum": (
        {"loss": "ipo", "ipo_ratios": "sum"},
        (34.14386, 158.91670, 250.77471),
        (9.60115, 82.92257, 121.58823),
    ),
    "ipo": ({}, (26.48662, 25.78441, 37.58774), (1.79630, 8.57596, 12.08119)),
    "dpo-norm": ({}, (0.69824, 0.11558, 0.17189), (0.73386, 0.66273, 0.96188)),
    "ld-dpo": ({}, (0.71343, 0.66275, 1.02268), (0.91538, 3.22240, 4.73691)),
    "rpo": ({}, (7.47515, 2.30770, 3.65657), (7.70711, 5.10463, 8.01321)),
    "rpo-token": (
        {"loss": "rpo", "nll_mean": "token"},
        (6.98703, 2.00421, 3.23324),
        (7.21899, 4.63993, 7.39290),
    ),
    "simpo": (
        {"simpo_gamma": 1.0},
        (1.34728, 0.16718, 0.24990),
        (1.49418, 0.90495, 1.34092),
    ),
    "cpo": (
        {"nll_mean": "token"},
        (9.98924, 2.39233, 3.84701),
        (24.23116, 7.30243, 11.57500),
    ),
    "orpo": ({}, (6.86765, 1.84543, 2.88672), (7.26586, 2.37025, 3.65912)),
    "kto": ({}, (0.50044, 0.22453, 0.36292), (0.48357, 1.07618, 1.72892)),
    "kto-weighed": (
        {"loss": "kto", "undesirable_weight": 1.33},
        (0.57713, 0.26035, 0.42317),
        (0.54363, 1.23880, 2.00813),
    ),
}
"""Name → settings beside beta, the figures at beta 0.1 and at beta 0.5."""
SCORES = np.array(
    [[-1.44320, -1.89108], [-1.16063, -0.64603], [-1.42260, -2.37467], [0.29633, -1.16867]]
)
REWARDS: dict[str, tuple[float, bool, Figures]] = {
    "plain": (0.0, False, (0.50288, 1.14897, 2.15274)),
    "margins": (0.0, True, (0.86962, 2.09553, 3.81365)),
    "centred": (0.01, False, (0.57679, 1.23557, 2.24484)),
}
"""Name → the weight of the centring, whether pairs have margins, the figures."""

_CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def build_model(*, scores: bool = False) -> Any:
    """Return the Llama with a LoRA on q_proj and v_proj, of which neither matrix is zero."""
    config = LlamaConfig(**_CONFIG, **({"num_labels": 1} if scores else {}))
    base = (LlamaForSequenceClassification if scores else LlamaForCausalLM)(config).eval()
    _fill(sorted(base.named_parameters()), 0)
    model = get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"],
                   task_type="SEQ_CLS" if scores else "CAUSAL_LM"),
    )  # fmt: skip
    lora = {n.replace(".", "/"): p for n, p in model.named_parameters() if "lora_" in n}
    _fill(sorted(lora.items()), 1)
    return model.eval()


def _fill(parameters: list[tuple[str, Any]], seed: int) -> None:
    draw = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in parameters:
            value = draw.standard_normal(tuple(p.shape)) * (0.1 if "lora_B" in name else 0.15)
            p.copy_(torch.ones_like(p) if p.dim() == 1 else torch.tensor(value, dtype=p.dtype))


def encode(prompt: str, answer: str, row: int) -> Encoded:
    """Return a prompt with an answer and EOS, each byte a token."""
    start, end = list(prompt.encode()), [*answer.encode(), EOS]
    return Encoded(start + end, [IGNORED] * len(start) + end, row)


def pair_rows(*, scored: bool = False, margins: bool = False) -> list[PairRow]:
    """Return the four pairs."""
    rows = []
    for index, (prompt, good, bad) in enumerate(PAIRS):
        one, two = encode(prompt, good, index), encode(prompt, bad, index)
        margin = MARGINS[index] if margins else 0.0
        rows.append(pair_up(one, two, len(prompt.encode()), margin, scored=scored))
    return rows  # type: ignore[return-value]


def judged_rows() -> list[JudgedRow]:
    """Return the four good answers and the four bad ones."""
    rows = []
    for desirable, which in ((1, 1), (0, 2)):
        for index, pair in enumerate(PAIRS):
            own = encode(pair[0], pair[which], index)
            rows.append(
                JudgedRow(own.input_ids, own.labels, index, {}, len(pair[0].encode()), desirable)
            )
    return rows


def norms(model: Any) -> tuple[float, float]:
    """Return the norms of the gradients over all A and over all B."""
    found = []
    for part in ("lora_A", "lora_B"):
        squares = [
            float(p.grad.double().square().sum())
            for name, p in model.named_parameters()
            if part in name and p.grad is not None
        ]
        found.append(sum(squares) ** 0.5)
    return found[0], found[1]
