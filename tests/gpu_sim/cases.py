"""Steps of Llama-3-8B with fake tensors, which have shapes and no values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from ftlevel.config import TrainConfig, TrainerConfig
from ftlevel.config.methods import LoraSpec
from ftlevel.data.encoding.row import IGNORED, Encoded
from ftlevel.fast import fused_layers as norm_glu
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.fast.plan import plan_fast
from ftlevel.fast.step import FastStep
from ftlevel.tasks.losses import Tokens
from ftlevel.trained.adapt import train_in_float32
from ftlevel.training.memory import enable_checkpointing
from gpu_sim.simulate import StepMetrics, move_to_gpu, run_step

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
"""Config of Llama-3-8B."""


@dataclass(frozen=True)
class LargeCase:
    """A step of Llama-3-8B with LoRA r 16, alpha 32 on all linear layers, in bfloat16.

    Attributes:
        layers: number of its 32 layers.
        sequences: rows of the step.
        length: tokens per row.
        supervised: share of tokens that are targets.
        train: settings of `TrainerConfig`.
    """

    layers: int = 32
    sequences: int = 4
    length: int = 2048
    supervised: float = 0.5
    train: tuple[tuple[str, Any], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the step, which is one micro-batch."""
        return self.sequences * self.length


def run_large_case(case: LargeCase) -> StepMetrics:
    """Return the metrics of the step."""
    model_config = transformers.LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": case.layers})
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(
            model_config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model = _with_lora(base)
    config = TrainConfig(
        method=LoraSpec(),
        train=TrainerConfig(per_device_train_batch_size=case.sequences, **dict(case.train)),
    )
    objective = Tokens("perplexity", shifted=True)
    ids = list(range(5, 5 + case.length))
    prompt = int(case.length * (1 - case.supervised))
    rows = [
        Encoded([number, *ids[1:]], [IGNORED] * prompt + ids[prompt:], number)
        for number in range(case.sequences)
    ]
    plan = plan_fast(config, base, "decoder", objective, "cuda", rows, case.length)
    move_to_gpu(model)
    fast = FastStep(model, plan)
    if config.train.recomputes:
        enable_checkpointing(base)
    return run_step(model, config, objective, fast, rows)


def _with_lora(base: Any) -> Any:
    """Return `base`, a meta model, with LoRA on all linear layers."""
    from peft import LoraConfig, get_peft_model

    # Without weights, norms and GLUs cannot be detected: set the result for Llama and T5.
    norm_glu._match_norm = lambda _: (0.0, False)
    norm_glu._match_glu = lambda _: "silu"

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    register_fused_layers(lora)
    model = get_peft_model(base, lora, low_cpu_mem_usage=True).train()
    train_in_float32(model)
    return model
