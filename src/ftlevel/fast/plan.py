"""Choose the parts of the fast step for a run, with reasons for display.

Includes the parallel workers, liger-kernel on a CUDA GPU, and fused LoRA layers. liger-kernel's
head and loss are not used, because they compute the logits of every position.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ftlevel.config import SPECS, MethodConfig, SpeedConfig, TrainConfig, TrainerConfig
from ftlevel.config.section import Choice
from ftlevel.data.encoding.row import Encoded
from ftlevel.fast import packed_attention as attention
from ftlevel.fast.gpu_attention import activate_fa3
from ftlevel.fast.likelihoods import TokenSelector, base_model
from ftlevel.fast.packing import PackedModel, UnsupportedModelError
from ftlevel.fast.parallel_workers import MAX_WORKERS
from ftlevel.fast.prefixes import shared_fraction
from ftlevel.methods import METHODS
from ftlevel.models.families import lookup_family
from ftlevel.models.module_tree import get_blocks
from ftlevel.models.upstream.architectures import attention_of
from ftlevel.objectives import Objective
from ftlevel.world import has_peers

FUNCTIONAL_DROPOUT = ("opt",)
"""Model types with functional dropout, which uses the process's generator."""


@dataclass(frozen=True)
class WorkerPlan:
    """Number of micro-batches that are computed in parallel.

    Attributes:
        random: name and value of the model's dropout; empty if it has none.
        reason: why `count` is 1; empty if `count` is larger or was requested.
    """

    count: int = 1
    random: str = ""
    reason: str = ""


def plan_workers(
    method: MethodConfig, requested: int | str, meta: Any, device: str, is_ordered: bool
) -> WorkerPlan:
    """Returns how many micro-batches of `meta`, a model on device meta, to compute in parallel.

    `is_ordered` means that dropout draws from the global generator, so the order matters.
    """
    threads = torch.get_num_threads()
    if device != "cpu" or threads == 1 or requested == 1:
        return WorkerPlan()
    if has_peers():
        return WorkerPlan(reason="each process has its own")
    random = get_dropout(method, meta, with_head=True)
    reason = _get_sequential_message(method, meta)
    if random and (is_ordered or meta.config.model_type in FUNCTIONAL_DROPOUT):
        reason = reason or f"{random} is drawn at random, in order"
    if reason:
        return WorkerPlan(reason=reason)
    return WorkerPlan(
        min(threads, requested if isinstance(requested, int) else MAX_WORKERS), random
    )


def _get_sequential_message(method: MethodConfig, meta: Any) -> str:
    family = meta.config.model_type
    if reason := METHODS[method.kind].step.workers(method):
        return reason
    if lookup_family(family) is None:
        return f"not tried with {family}"
    if _has_dynamic_rope(meta.config):
        return f"{family} changes its rotary embedding with the length"
    return ""


def _has_dynamic_rope(config: Any) -> bool:
    parameters = getattr(config, "rope_parameters", None) or {}
    all_parameters = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in all_parameters)


def get_dropout(method: MethodConfig, meta: Any, with_head: bool = False) -> str:
    """Returns a dropout of method, model or (`with_head`) head, as "lora_dropout 0.1"; else ""."""
    for owner in (method.model_dump(), meta.config.to_dict()):
        for name, value in owner.items():
            if not (isinstance(value, float) and value > 0):
                continue
            is_random = "drop" in name or "jitter" in name
            if is_random and (with_head or not name.startswith(("classifier", "summary"))):
                return f"{name} {value:g}"
    return ""


LIGER_ACTIVATIONS = {
    **dict.fromkeys(
        ("glm4", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2",
         "qwen3", "smollm3"),
        "silu",
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "gelu_pytorch_tanh"),
}  # fmt: skip
"""Model type → the activation of liger-kernel's feed-forward, whatever the config says.

Read and run in Triton's interpreter with liger-kernel 0.8.5 and transformers 5.24. Mixtures of
experts are left out: it replaces the forward pass of all experts, whatever adapters they have.
"""

LIGER_ARGUMENTS: dict[str, Any] = {
    "use_liger_kernel": True,
    "liger_kernel_config": {"cross_entropy": False, "fused_linear_cross_entropy": False},
}
"""`TrainingArguments` that enable liger-kernel."""

LIGER_UNSUPPORTED_METHODS = ("adapter", "ln-tuning")
"""Methods that wrap norms or feed-forward blocks, whose forward pass liger-kernel replaces."""


def uses_liger(speed: SpeedConfig, method: MethodConfig, meta: Any, device: str) -> bool:
    """Returns whether liger-kernel is installed, enabled and supports method and model."""
    config = meta.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return (
        device == "cuda"
        and speed.liger_kernel
        and method.kind not in LIGER_UNSUPPORTED_METHODS
        and config.model_type in LIGER_ACTIVATIONS
        and activation == LIGER_ACTIVATIONS[config.model_type]
        # Its feed-forward class, of which models loaded later are made, has no bias.
        and not getattr(config, "mlp_bias", False)
        # liger-kernel raises TypeError for Gemma 3 with another head.
        and (config.model_type != "gemma3_text" or type(meta).__name__ == "Gemma3ForCausalLM")
        and importlib.util.find_spec("liger_kernel") is not None
    )


MIN_TOKENS = 1024
"""Minimum token limit of a micro-batch for any batch size; smaller ones are slow."""

MAX_CPU_TOKENS = 2048
"""Maximum token limit on a CPU; more tokens use memory without being faster."""

SHARING_DIVISOR = 8
"""With shared prefixes the limit grows by 1 / SHARING_DIVISOR; a split computes prefixes twice."""

GROUP_DIVISOR = 4
"""Activations of whole groups of completions may use 1 / GROUP_DIVISOR of a machine's memory."""

MIN_SHARED_FRACTION = 0.05
"""Minimum share of tokens that prefix sharing must save."""

_RECURRENT_LAYERS = frozenset({"linear_attention", "hybrid", "hybrid_sliding", "conv"})
"""`layer_types` of a config in which a state goes from token to token."""

SAMPLED_STEPS = 8
"""Steps on which the saving is estimated."""


@dataclass(frozen=True)
class FastPlan:
    """The parts of the fast step to use, and their settings.

    Attributes:
        packs: whether micro-batches have no padding.
        chunked_cross_entropy: whether the language head runs on supervised tokens only.
        tokens: maximum total tokens of the micro-batches that are computed in parallel.
        prefix_tree: whether prefixes shared in a micro-batch are computed once.
        liger_kernel: whether liger-kernel computes norms, GLUs and rotary embeddings.
        needed_tokens: selects tokens that the last block computes; None for all or until checked.
        shared_prefix: whether the rows' common prefix may be computed before the micro-batches.
        token_multiple: packed rows are padded to a multiple of this number of tokens.
        memory: device memory in bytes from which `tokens` was computed; 0 if it was not.
        failure: how the fast step differed from the plain step, so that the plan is the plain step;
            empty if it did not.
    """

    enabled: bool = False
    packs: bool = False
    chunked_cross_entropy: bool = False
    tokens: int = 0
    prefix_tree: bool = False
    choices: list[Choice] = field(default_factory=list)
    workers: int = 1
    is_random: bool = False
    fused_norm_glu: bool = False
    prunes_last_layer: bool = False
    needed_tokens: TokenSelector | None = None
    shared_prefix: bool = False
    memory: int = 0
    liger_kernel: bool = False
    token_multiple: int = 1
    failure: str = ""


def plan_plain(objective: Objective, tokens: int) -> FastPlan:
    """Returns the plan of the plain step.

    A loss over a whole step needs the rows together, and no other part of the fast step.
    """
    return FastPlan(True, tokens=tokens) if objective.needs_whole_step else FastPlan()


def plan_fast(
    config: TrainConfig,
    meta: Any,
    model_kind: str,
    objective: Objective,
    device: str,
    rows: Sequence[Encoded],
    max_length: int,
) -> FastPlan:
    """Returns the plan for training the model `meta` (on the meta device) on `rows`."""
    speed = config.speed
    tokens = _max_batch_tokens(speed, config.train, device, max_length)
    plain = plan_plain(objective, tokens)
    if not speed.fast:
        return replace(plain, choices=[Choice("step", "plain", "--no-fast")])
    if config.train.neftune_noise_alpha is not None:
        message = "NEFTune's noise is scaled by the length of a padded row"
        return replace(plain, choices=[Choice("step", "plain", message)])
    padded_message = (
        _get_padded_message(config.method, config.model.attn_implementation, meta, model_kind)
        if speed.pack
        else "speed.pack is off"
    )
    chunked = speed.chunked_cross_entropy and has_language_head(meta, objective)
    layout = "packed, no padding" if not padded_message else f"padded by length ({padded_message})"
    labels = [layout] + (["cross-entropy on supervised tokens only"] if chunked else [])
    is_ordered = bool(padded_message) or config.train.recomputes
    worker_plan = plan_workers(config.method, speed.parallel_workers, meta, device, is_ordered)
    count = worker_plan.count
    shares_prefixes, sharing_choices = False, list[Choice]()
    if not padded_message and model_kind == "decoder" and speed.share_prefixes != "never":
        is_forced = speed.share_prefixes == "always"
        shares_prefixes, sharing_choices = _plan_sharing(
            config.method, config.train, meta, rows, is_forced
        )
    if shares_prefixes and not isinstance(speed.tokens_per_micro_batch, int):
        tokens += tokens // SHARING_DIVISOR
        tokens = max(tokens, objective.micro_batch_tokens(meta, rows, device, count))
    parallel = f"{count} parallel workers" if count > 1 else "one micro-batch at a time"
    parallel += f": {worker_plan.reason}" if worker_plan.reason else ""
    bound = f"up to {tokens // count:,} tokens a micro-batch"
    choices = [Choice("step", ", ".join(labels), f"{bound}, {parallel}"), *sharing_choices]
    liger = uses_liger(speed, config.method, meta, device)
    if device == "cuda" and not padded_message and (message := activate_fa3(meta.config)):
        choices.append(Choice("attention", "FA3", message))
    if liger:
        message = "norms, rotary embedding and activation; installed"
        choices.append(Choice("kernels", "liger-kernel", message))
    return FastPlan(
        True,
        not padded_message,
        chunked,
        tokens,
        shares_prefixes,
        choices,
        count,
        bool(worker_plan.random),
        speed.fused_norm_glu and not liger,
        prunes_last_layer=speed.prune_last_layer
        and not padded_message
        and not METHODS[config.method.kind].step.pruning(config.method),
        # Checkpointing would recompute a micro-batch after the prefix has released its layout.
        shared_prefix=shares_prefixes
        and chunked
        and not worker_plan.random
        and not config.train.may_recompute(device),
        liger_kernel=liger,
        token_multiple=get_token_multiple(device),
    )


def get_token_multiple(device: str) -> int:
    """Returns the multiple of tokens to which packed rows are padded on `device`.

    cuBLAS takes slow kernels for matrix products with a dimension that is no multiple of 8.
    """
    return 64 if device == "cuda" else 1


def plan_forward(
    model: Any, model_kind: str, method: str, objective: Objective, device: str, tokens: int
) -> FastPlan:
    """Returns the plan for scoring rows with `model`, at most `tokens` tokens per micro-batch."""
    base = base_model(model)
    packs = not (has_virtual_tokens(model, method) or get_packing_message(base, model_kind))
    chunked = has_language_head(base, objective)
    return FastPlan(
        True,
        packs,
        chunked,
        tokens,
        prunes_last_layer=packs,
        token_multiple=get_token_multiple(device),
    )


def has_virtual_tokens(model: Any, method: str) -> bool:
    """Returns whether an adapter of `model` adds virtual tokens, so that rows cannot be packed."""
    adapters = getattr(model, "peft_config", {}).values()
    message = method in METHODS and METHODS[method].step.packing(SPECS[method]())
    return bool(message) or any(config.is_prompt_learning for config in adapters)


def _plan_sharing(
    method: MethodConfig, train: TrainerConfig, meta: Any, rows: Sequence[Encoded], is_forced: bool
) -> tuple[bool, list[Choice]]:
    if any(row.extras for row in rows[:1]):
        return False, []
    fraction = _estimate_shared_fraction(train, rows)
    if fraction < MIN_SHARED_FRACTION and not is_forced:
        return False, []
    dropout = get_dropout(method, meta)
    if dropout and not is_forced:
        message = (
            f"{fraction:.0%} of tokens could be computed once, but their {dropout} would be the "
            "same for all rows: speed.share_prefixes=always takes that"
        )
        return False, [Choice("prefix sharing", "off", message)]
    message = f"estimated on {SAMPLED_STEPS} steps" + (f"; shares {dropout}" if dropout else "")
    return True, [Choice("prefix sharing", f"{fraction:.0%} of tokens computed once", message)]


def _estimate_shared_fraction(train: TrainerConfig, rows: Sequence[Encoded]) -> float:
    size = min(train.rows_per_device_step, len(rows))
    rng = random.Random(train.seed)
    steps = [rng.sample(range(len(rows)), size) for _ in range(SAMPLED_STEPS)]
    fractions = [
        shared_fraction([sequence.input_ids for i in step for sequence in rows[i].sequences])
        for step in steps
    ]
    return sum(fractions) / len(fractions)


def _max_batch_tokens(
    speed: SpeedConfig, train: TrainerConfig, device: str, max_length: int
) -> int:
    if isinstance(speed.tokens_per_micro_batch, int):
        return speed.tokens_per_micro_batch
    tokens = max(train.per_device_train_batch_size * max_length, MIN_TOKENS)
    return min(tokens, max(MAX_CPU_TOKENS, max_length)) if device == "cpu" else tokens


def _get_padded_message(method: MethodConfig, attention: str, meta: Any, model_kind: str) -> str:
    family = meta.config.model_type
    if attention not in ("auto", "sdpa"):
        return f"attention is {attention}"
    if reason := METHODS[method.kind].step.packing(method):
        return reason
    if getattr(meta.config, "layerdrop", 0):
        return f"{family} skips layers at random"
    return get_packing_message(meta, model_kind)


def get_packing_message(model: Any, model_kind: str) -> str:
    """Returns why `model` needs padded rows; empty if rows can be packed."""
    family = model.config.model_type
    if model_kind == "encoder-decoder" or not get_blocks(model):
        return f"{family} has not one stack of blocks"
    if _is_recurrent(model):
        return f"{family} carries a state from token to token"
    if getattr(model.config, "alibi", False):
        return f"{family} adds ALiBi to the attention mask"
    if getattr(model.config, "token_dropout", False):
        return f"{family} scales embeddings by the masked tokens of a row"
    try:
        PackedModel(model).remove()
    except UnsupportedModelError as error:
        return f"{family}: {error}"
    before = attention_of(model)
    if not set_packed_attention(model):
        return f"{family} has an attention of its own"
    model.set_attn_implementation(before)  # the weights are loaded with this config
    return ""


def _is_recurrent(model: Any) -> bool:
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return not types.isdisjoint(_RECURRENT_LAYERS) or any(
        isinstance(part, torch.nn.Conv1d) and part.kernel_size[0] > 1
        for block in get_blocks(model)
        for part in block.modules()
    )


def set_packed_attention(model: Any) -> bool:
    """Set packed attention in `model`; returns False if unsupported."""
    # Models that are eager only because of softcapping (Gemma 2) are supported.
    is_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if attention_of(model) != ("eager" if is_capped else "sdpa"):
        return False
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return attention_of(model) == attention.NAME


def has_language_head(model: Any, objective: Objective | None) -> bool:
    """Returns whether the head of `model` can run on supervised tokens only."""
    if objective is None or not objective.predicts_tokens or model.get_output_embeddings() is None:
        return False
    return not objective.feeds_labels or hasattr(model, "prepare_decoder_input_ids_from_labels")


def uses_fused_layers(method: MethodConfig, speed: SpeedConfig, quant: str, device: str) -> bool:
    """Returns whether LoRA layers are fused with base layers that are quantized as `quant`."""
    return _get_unfused_message(method, speed, quant, device) == ""


def fused_lora_choices(
    method: MethodConfig, speed: SpeedConfig, quant: str, device: str
) -> list[Choice]:
    """Returns the message about LoRA layers for display; empty for other methods."""
    message = _get_unfused_message(method, speed, quant, device)
    if message is None:
        return []
    if message:
        return [Choice("low-rank update", "PEFT's layers", message)]
    return [Choice("low-rank update", "fused with the base", "same gradients as PEFT's layers")]


def _get_unfused_message(
    method: MethodConfig, speed: SpeedConfig, quant: str, device: str
) -> str | None:
    check = METHODS[method.kind].step.fusing
    if check is None:
        return None
    if not speed.fast:
        return "--no-fast"
    if not speed.fused_lora:
        return "speed.fused_lora is off"
    if reason := check(method):
        return reason
    if quant == "8bit" and device != "cpu":
        return "LLM.int8() multiplies in int8 on a GPU"
    return ""
