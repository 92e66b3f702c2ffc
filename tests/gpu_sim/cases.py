"""Cases of the simulation: every method on every kind of model, and Llama-3-8B."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

import matrix_cells
from ftlevel.config import QuantConfig, SpeedConfig, TrainConfig, TrainerConfig
from ftlevel.config.methods import LoraSpec
from ftlevel.data.encoding.encode import IGNORED, Encoded
from ftlevel.fast import fused_layers as norm_glu
from ftlevel.fast import kernels
from ftlevel.fast.fused_lora import register_fused_layers
from ftlevel.fast.kernels import TORCH, TritonBackend
from ftlevel.fast.plan import plan_fast, uses_fused_layers
from ftlevel.fast.step import FastStep
from ftlevel.methods import METHOD_INFO
from ftlevel.models.families import FAMILIES
from ftlevel.tasks import TASKS
from ftlevel.tasks.losses import Tokens
from ftlevel.trained.adapt import apply_method, train_in_float32
from ftlevel.training.memory import enable_checkpointing
from gpu_sim.simulate import StepMetrics, move_to_gpu, run_step
from matrix_cells import (
    TinyCell,
    build_spec,
    copy_base,
    describe_base,
    expected_error,
    get_tasks_by_head,
)

KINDS = {"llama": "causal", "bert": "seqcls", "t5": "seq2seq"}
"""A family of each kind of model, with its most common head."""

LENGTHS = (5, 30, 12, 12, 3, 21, 8, 17)

SPARSE = ("shira",)
"""Methods with sparse tensors, which torch without CUDA cannot fake on a GPU."""

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
"""Config of Llama-3-8B."""


def build_cells() -> list[TinyCell]:
    """Return every method on a model of each kind, unquantized and in 4 bits."""
    rows = [info.name for info in METHOD_INFO.values()
            if info.method in matrix_cells.SPECS and info.method not in SPARSE]  # fmt: skip
    cells = [
        TinyCell(row, family, head, get_tasks_by_head(family)[head], quant, "bfloat16")
        for family, head in KINDS.items()
        for quant in ("none", "4bit")
        for row in rows
    ]
    return [cell for cell in cells if expected_error(cell) is None]


def run_cell(cell: TinyCell) -> StepMetrics:
    """Return the metrics of a step of `cell`; raises if tensors are on different devices."""
    torch.manual_seed(0)
    spec = build_spec(cell.row)
    kind, task = FAMILIES[cell.family].kind, TASKS[cell.tasks[0]]
    config = TrainConfig(task=task.name, method=spec, quant=QuantConfig(kind=cell.quant))
    fused = uses_fused_layers(spec, config.speed, cell.quant, "cuda")
    model = apply_method(copy_base(cell), spec, describe_base(cell, spec), fused=fused)
    train_in_float32(model)
    objective = task.create_objective(kind, {})
    rows = _rows(cell.head)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    plan = plan_fast(config, base, kind, objective, "cuda", rows, max(LENGTHS))
    fast = FastStep(model.train(), plan)
    fast.check_cross_entropy(objective, rows, 0, "cpu", "bfloat16")
    fast.prune_last_layer(objective, rows, 0, "cpu", "bfloat16")
    move_to_gpu(model)
    return run_step(model, config, objective, fast, rows, cell.family)


def _rows(head: str) -> list[Encoded]:
    """Return encoded rows with labels for `head`."""
    generator, rows = torch.Generator().manual_seed(1), []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(10, 490, (length,), generator=generator).tolist()
        labels: Any = {
            "seqcls": index % matrix_cells.tiny_models.LABELS,
            "seq2seq": ids[::2],
        }.get(head, [IGNORED if i < length // 2 else token for i, token in enumerate(ids)])
        rows.append(Encoded(ids, labels, index))
    return rows


@dataclass(frozen=True)
class LargeCase:
    """A step of Llama-3-8B with LoRA r 16, alpha 32 on all linear layers, in bfloat16.

    Attributes:
        layers: number of its 32 layers.
        sequences: rows of the step.
        length: tokens per row.
        supervised: share of tokens that are targets.
        train: settings of `TrainerConfig`.
        speed: settings of `SpeedConfig`.
        kernels: whether Triton kernels are used.
        four_bits: whether the linear layers of its blocks are nf4 with double quantization.
    """

    layers: int = 32
    sequences: int = 4
    length: int = 2048
    supervised: float = 0.5
    train: tuple[tuple[str, Any], ...] = ()
    speed: tuple[tuple[str, Any], ...] = ()
    kernels: bool = False
    four_bits: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the step, which is one micro-batch."""
        return self.sequences * self.length


def run_large_case(case: LargeCase) -> StepMetrics:
    """Return the metrics of the step."""
    backend = TritonBackend() if case.kernels else TORCH
    for name in ("select_norm", "select_glu", "select_rope", "select_cross_entropy"):
        setattr(kernels, name, lambda *_: backend)
    kernels.supports_triton = lambda *_: True
    model_config = transformers.LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": case.layers})
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(
            model_config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    if case.four_bits:
        _quantize(base)
    model = _with_lora(base)
    config = TrainConfig(
        method=LoraSpec(),
        train=TrainerConfig(per_device_train_batch_size=case.sequences, **dict(case.train)),
        speed=SpeedConfig(**dict(case.speed)),
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
    return run_step(model, config, objective, fast, rows, "llama")


def _quantize(base: Any) -> None:
    """Replace linear layers of the blocks of `base` (mutated) by 4-bit ones on the meta device."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    base.is_loaded_in_4bit = True
    linears = [(n, m) for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)]
    with torch.device("meta"):
        for name, plain in linears:
            blocks = plain.weight.numel() // 64
            scales = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256),
                                blocksize=256, dtype=torch.float32)  # fmt: skip
            state = QuantState(
                torch.empty(blocks, dtype=torch.uint8), shape=plain.weight.shape,
                code=torch.empty(16), blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
                offset=torch.empty(()), state2=scales,
            )  # fmt: skip
            codes = torch.empty(plain.weight.numel() // 2, 1, dtype=torch.uint8)
            linear = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )  # fmt: skip
            linear.weight = bnb.nn.Params4bit(
                codes, requires_grad=False, quant_state=state, bnb_quantized=True, module=linear
            )
            base.model.set_submodule(name, linear)


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
