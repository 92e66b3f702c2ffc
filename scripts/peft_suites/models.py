"""Create tiny models in the Hub cache under the names that PEFT's tests load.

A cache folder is the Hub's documented layout, so transformers and PEFT find them offline, by name,
without a line changed. The weights are random, as those on the Hub are.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
tiny_models = importlib.import_module("tiny_models")
tiny_tokenizers = importlib.import_module("tiny_tokenizers")

TOKENS = "Tokens"
"""Name of the model of no family that takes tokens."""

_COMMIT = "0" * 40
_PEFT, _TRL, _HF = (f"{who}-internal-testing" for who in ("peft", "trl", "hf"))
_OTHERS = {
    "gptj": {"vocab_size": tiny_models.VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4,
             "rotary_dim": 4, "n_positions": 128, "bos_token_id": 500, "eos_token_id": 500},
    "deberta": {"vocab_size": tiny_models.VOCAB, "hidden_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "intermediate_size": 128,
                "max_position_embeddings": 128, "relative_attention": True,
                "pos_att_type": ["p2c", "c2p"]},
}  # fmt: skip

# name → family, class of its head, what else its config says
HUB: dict[str, tuple[str, str, dict[str, Any]]] = {
    f"{_PEFT}/tiny-random-OPTForCausalLM": ("opt", "AutoModelForCausalLM", {}),
    f"{_PEFT}/opt-125m": ("opt", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-random-GPT2LMHeadModel": ("gpt2", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-random-gpt2": ("gpt2", "AutoModelForCausalLM", {}),
    f"{_HF}/tiny-random-gpt2": ("gpt2", "AutoModelForCausalLM", {}),
    "gpt2": ("gpt2", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-random-GPTJForCausalLM": ("gptj", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-random-GPTNeoXForCausalLM": ("gpt_neox", "AutoModelForCausalLM", {}),
    f"{_TRL}/tiny-random-LlamaForCausalLM": ("llama", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-random-LlamaForCausalLM": ("llama", "AutoModelForCausalLM", {}),
    f"{_HF}/tiny-random-LlamaForCausalLM": ("llama", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-dummy-qwen2": ("qwen2", "AutoModelForCausalLM", {}),
    f"{_TRL}/tiny-Qwen3ForCausalLM": ("qwen3", "AutoModelForCausalLM", {}),
    f"{_HF}/tiny-random-Gemma3ForCausalLM": ("gemma3_text", "AutoModelForCausalLM", {}),
    f"{_HF}/tiny-random-MistralForCausalLM": ("mistral", "AutoModelForCausalLM", {}),
    f"{_PEFT}/tiny-random-T5ForConditionalGeneration-calibrated":
        ("t5", "AutoModelForSeq2SeqLM", {}),
    f"{_PEFT}/tiny-random-T5ForConditionalGeneration": ("t5", "AutoModelForSeq2SeqLM", {}),
    f"{_PEFT}/tiny-random-t5": ("t5", "AutoModelForSeq2SeqLM", {}),
    f"{_PEFT}/tiny-random-BartForConditionalGeneration": ("bart", "AutoModelForSeq2SeqLM", {}),
    f"{_PEFT}/tiny-random-BertModel": ("bert", "AutoModel", {}),
    "bert-base-uncased": ("bert", "AutoModelForMaskedLM", {}),
    f"{_PEFT}/tiny-random-RobertaModel": ("roberta", "AutoModel", {}),
    f"{_PEFT}/tiny-random-DebertaModel": ("deberta", "AutoModel", {}),
    f"{_PEFT}/tiny-random-DebertaV2Model": ("deberta-v2", "AutoModel", {}),
    f"{_PEFT}/tiny-random-BertForSequenceClassification":
        ("bert", "AutoModelForSequenceClassification", {}),
    f"{_PEFT}/tiny-random-RobertaForSequenceClassification":
        ("roberta", "AutoModelForSequenceClassification", {}),
    f"{_TRL}/tiny-LlamaForSequenceClassification-3.2":
        ("llama", "AutoModelForSequenceClassification", {"num_labels": 1, "pad_token_id": 2}),
}  # fmt: skip


def build_hub(folder: Path) -> None:
    """Write the models of `HUB`, and a configuration of LoRA, into a cache folder, each once."""
    import transformers

    adapter = folder / f"models--{_PEFT}--tiny-opt-lora-revision"
    LoraConfig(task_type="CAUSAL_LM", r=8).save_pretrained(adapter / "snapshots" / _COMMIT)
    _refer(adapter, "test")
    for name, (family, head, extra) in HUB.items():
        place = folder / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / _COMMIT
        if (place / "refs/main").exists():
            continue
        values = {**(tiny_models.CONFIGS.get(family) or _OTHERS[family]), **extra}
        torch.manual_seed(0)
        model = getattr(transformers, head).from_config(AutoConfig.for_model(family, **values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(snapshot)
        if family in tiny_models.FAMILIES:
            tiny_tokenizers.build_tokenizer(family).save_pretrained(snapshot)
        _refer(place, "main")


def _refer(place: Path, branch: str) -> None:
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / branch).write_text(_COMMIT, encoding="utf-8")


class Tokens(LlamaForCausalLM):  # type: ignore[misc]  # transformers' classes are Any
    """A model called as PEFT's tests call their MLP: X (rows, 10) → log-probabilities (rows, 2)."""

    dtype = None  # PEFT's tests set it, which transformers' property does not allow

    def __init__(self) -> None:
        config = LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, use_cache=False,
        )  # fmt: skip
        config.name_or_path = TOKENS
        super().__init__(config)

    @classmethod
    def seeded(cls) -> Tokens:
        """Return the model, the same each time."""
        torch.manual_seed(0)
        return cls()

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of two tokens after the last."""
        logits = super().forward(input_ids=X).logits[:, -1, :2]
        return nn.functional.log_softmax(logits, dim=-1)
