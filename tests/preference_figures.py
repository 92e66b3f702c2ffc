"""Expected preference losses on a tiny Llama with fixed weights.

`tests/make_preference_figures.py` computes the values in preference_figures.json with plain torch
and PEFT: each answer is a batch of its own, formulas are those of the papers, float64 on a CPU.
`scripts/against_trl.py` of commit 29ae4f80 compares TRL's trainers with them. Weights come from
numpy's `RandomState`, whose stream is frozen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.extras.preference.rows import LabeledAnswerRow, PairRow, create_pair_row

EOS, PAD = 0, 1
PAIRS = [
    ("Q: capital of France?\nA:", " Paris", " Lyon, I think"),
    ("Q: 2 + 2?\nA:", " 4", " 5"),
    ("Name a colour and say why you like it.\n", "Blue, since the sky is blue.", "Blue."),
    ("System: be brief.\nUser: hello\nBot:", " Hi!", " Hello! How can I help you today?"),
]
MARGINS = [1.0, 0.0, 0.5, 2.0]
_EXPECTED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
REFERENCE, POLICY = np.array(_EXPECTED["reference"]), np.array(_EXPECTED["policy"])
"""Log-likelihoods of the preferred and the rejected answers, with the adapter off and on."""
LENGTHS, BASELINE = np.array(_EXPECTED["lengths"]), float(_EXPECTED["baseline"])

Figures = tuple[float, float, float]
"""Loss, and gradient norms over all A and over all B."""
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("dpo", "cdpo", "robust", "hinge", "ipo", "dpo-norm", "ld-dpo", "rpo",
                             "orpo", "kto")},
    "ipo-sum": {"loss": "ipo", "ipo_ratios": "sum"},
    "rpo-token": {"loss": "rpo", "nll_mean": "token"},
    "simpo": {"simpo_gamma": 1.0},
    "cpo": {"nll_mean": "token"},
    "kto-weighed": {"loss": "kto", "undesirable_weight": 1.33},
}  # fmt: skip
"""Name → settings of the loss other than beta."""
TABLE: dict[str, tuple[dict[str, Any], Figures, Figures]] = {
    name: (settings, *(tuple(figures) for figures in _EXPECTED["losses"][name]))  # type: ignore[misc]
    for name, settings in SETTINGS.items()
}
"""Name → settings other than beta, expected values at beta 0.1 and at beta 0.5."""
SCORES = np.array(_EXPECTED["scores"])
REWARDS: dict[str, tuple[float, bool, Figures]] = {
    name: (center, has_margins, tuple(_EXPECTED["rewards"][name]))
    for name, center, has_margins in (
        ("plain", 0.0, False), ("margins", 0.0, True), ("centred", 0.01, False)
    )
}  # fmt: skip
"""Name → centering weight, whether pairs have margins, expected values."""

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


def build_base(*, has_score_head: bool = False) -> Any:
    """Return the Llama."""
    config = LlamaConfig(**_CONFIG, **({"num_labels": 1} if has_score_head else {}))
    base = (LlamaForSequenceClassification if has_score_head else LlamaForCausalLM)(config).eval()
    _fill(sorted(base.named_parameters()), 0)
    return base


def adapter_config(*, has_score_head: bool = False) -> LoraConfig:
    """Return the LoRA on q_proj and v_proj."""
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"],
                      task_type="SEQ_CLS" if has_score_head else "CAUSAL_LM")  # fmt: skip


def fill_adapter(model: Any) -> None:
    """Set fixed, non-zero weights in the LoRA of `model`."""
    lora = {n.replace(".", "/"): p for n, p in model.named_parameters() if "lora_" in n}
    _fill(sorted(lora.items()), 1)


def build_model(*, has_score_head: bool = False) -> Any:
    """Return the Llama with its LoRA."""
    model = get_peft_model(
        build_base(has_score_head=has_score_head), adapter_config(has_score_head=has_score_head)
    )
    fill_adapter(model)
    return model.eval()


def _fill(parameters: list[tuple[str, Any]], seed: int) -> None:
    rng = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in parameters:
            value = rng.standard_normal(tuple(p.shape)) * (0.1 if "lora_B" in name else 0.15)
            p.copy_(torch.ones_like(p) if p.dim() == 1 else torch.tensor(value, dtype=p.dtype))


def encode(prompt: str, answer: str, row: int) -> Encoded:
    """Return a prompt with an answer and EOS; each byte is a token."""
    start, end = list(prompt.encode()), [*answer.encode(), EOS]
    return Encoded(start + end, [IGNORED] * len(start) + end, row)


def pair_rows(*, scored: bool = False, margins: bool = False) -> list[PairRow]:
    """Return the four pairs."""
    rows = []
    for index, (prompt, chosen, rejected) in enumerate(PAIRS):
        chosen_row, rejected_row = encode(prompt, chosen, index), encode(prompt, rejected, index)
        margin = MARGINS[index] if margins else 0.0
        rows.append(
            create_pair_row(chosen_row, rejected_row, len(prompt.encode()), margin, scored=scored)
        )
    return rows


def labeled_rows() -> list[LabeledAnswerRow]:
    """Return the four desirable and the four undesirable answers."""
    rows = []
    for desirable, column in ((1, 1), (0, 2)):
        for index, pair in enumerate(PAIRS):
            encoded = encode(pair[0], pair[column], index)
            rows.append(
                LabeledAnswerRow(
                    encoded.input_ids, encoded.labels, index, {}, len(pair[0].encode()), desirable
                )
            )
    return rows


def gradient_norms(model: Any) -> tuple[float, float]:
    """Return gradient norms over all A and over all B."""
    norms = []
    for part in ("lora_A", "lora_B"):
        squares = [
            float(p.grad.double().square().sum())
            for name, p in model.named_parameters()
            if part in name and p.grad is not None
        ]
        norms.append(sum(squares) ** 0.5)
    return norms[0], norms[1]
