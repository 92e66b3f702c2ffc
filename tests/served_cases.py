"""Adapters of plain PEFT, and the expected results of their export."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        settings: of its PEFT config; `cls` names the class, LoraConfig by default.
        rank: of the exported LoRA; None if the export raises.
        error: part of the error message.
        needs_conversion: whether servers that only read lora_alpha / r apply another update.
        scale: factor on its last matrix, so that its outputs differ from those of the base.
    """

    settings: dict[str, Any]
    rank: int | None = None
    error: str = ""
    needs_conversion: bool = field(default=False)
    scale: float = 1.0


_LAST = ("lora_E", "vera_lambda_b", "trainable_tokens_delta")


def _lora(**settings: Any) -> dict[str, Any]:
    return {"r": 8, "lora_alpha": 16, "target_modules": LINEARS, **settings}


def _config(cls: str, **settings: Any) -> dict[str, Any]:
    return {"cls": cls, "target_modules": LINEARS, **settings}


CASES: dict[str, Case] = {
    "lora": Case(_lora(), 8),
    "rslora": Case(_lora(use_rslora=True), 8, needs_conversion=True),
    "patterns": Case(
        _lora(rank_pattern={"q_proj": 4, "layers.1.mlp.up_proj": 12}, alpha_pattern={"k_proj": 3}),
        12,
        needs_conversion=True,
    ),
    "both": Case(
        _lora(use_rslora=True, rank_pattern={"o_proj": 12}, alpha_pattern={"down_proj": 5}),
        12,
        needs_conversion=True,
    ),
    "layers": Case(_lora(layers_to_transform=[1]), 8),
    "pissa": Case(_lora(init_lora_weights="pissa"), 16, needs_conversion=True),
    "olora": Case(_lora(init_lora_weights="olora"), 16, needs_conversion=True),
    "tokens": Case(_lora(trainable_token_indices=[5, 9, 40]), 8),
    "embedding": Case(_lora(target_modules=["q_proj", "embed_tokens"]), 8),
    "norms": Case(_lora(modules_to_save=["norm"]), 8),
    "adalora": Case(
        _config("AdaLoraConfig", init_r=8, target_r=4, total_step=10, tinit=1, tfinal=1), 8,
        scale=400,
    ),
    "vera": Case(_config("VeraConfig", r=16, target_modules=["q_proj", "o_proj"]), 16, scale=20),
    "loha": Case(_config("LoHaConfig", r=4), 16),
    "lokr": Case(_config("LoKrConfig", r=4), 64),
    "miss": Case(_config("MissConfig", r=8), 8),
    "trainable tokens": Case(
        {
            "cls": "TrainableTokensConfig",
            "token_indices": [30, 260],  # of SmolLM2: a full stop, and "the"
            "target_modules": ["embed_tokens"],
        },
        2,
        scale=3,
    ),
    "gralora": Case(_config("GraloraConfig", r=8, gralora_k=2, hybrid_r=2), 18),
    "delora": Case(_config("DeloraConfig", r=8), 8),  # updates are computed by its layers
    "dora": Case(_lora(use_dora=True), error="DoRA scales each row"),
    "lora bias": Case(_lora(lora_bias=True), error="B has a bias"),
    "bias": Case(_lora(bias="lora_only"), error="biases of the base were trained"),
    "loha r 12": Case(_config("LoHaConfig", r=12), error="needs rank 144, above --max-rank 64"),
    "ia3": Case(
        _config(
            "IA3Config", feedforward_modules=["down_proj"], target_modules=["k_proj", "down_proj"]
        ),
        error="full rank",
    ),
    "hira": Case(_config("HiraConfig", r=8), error="full rank"),
    "shira": Case(_config("ShiraConfig", r=4), error="full rank"),
    "c3a": Case(_config("C3AConfig", block_size=16), error="full rank"),
    "lily": Case(_config("LilyConfig"), error="router that looks at the input"),
    "prompt": Case(
        {"cls": "PromptTuningConfig", "num_virtual_tokens": 4}, error="does not change weights"
    ),
}  # fmt: skip


def write_adapter(
    base: Path, directory: Path, settings: dict[str, Any], seed: int = 0, scale: float = 1.0
) -> Path:
    """Save an adapter of plain PEFT with noise on every trained value."""
    settings = dict(settings)
    config_class = getattr(peft, settings.pop("cls", "LoraConfig"))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = peft.get_peft_model(model, config_class(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    spread = max(float(parameter.std()) if parameter.numel() > 1 else 0.0, 0.02)
                    parameter.add_(torch.randn_like(parameter) * spread * 0.7)
        tuned.save_pretrained(directory)
    if scale != 1:
        tensors = load_file(directory / "adapter_model.safetensors")
        for key in [key for key in tensors if key.endswith(_LAST)]:
            tensors[key] = tensors[key] * scale
        save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def peft_logits(base: Path, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of plain PEFT for the adapter on its base, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits[0]
    return logits
