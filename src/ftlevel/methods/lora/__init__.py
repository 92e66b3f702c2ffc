"""LoRA and QLoRA: builds `peft.LoraConfig`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.lora import BASE_MODIFYING_INITS, PISSA, LoraSpec
from ftlevel.errors import ConfigError, join_names
from ftlevel.methods.base import (
    Base,
    Merging,
    Method,
    QuantizedCheckpoint,
    StepSupport,
    refuse_other_forms,
    whole,
)
from ftlevel.methods.lora.facts import FACTS, RULES, build_optimizer
from ftlevel.methods.lora.plain_form import as_lora
from ftlevel.methods.lora.start import START
from ftlevel.methods.plain_form import PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.models.untrusted import limit_time

_SECONDS = 10.0  # timeout; patterns usually match in milliseconds

_UNMERGEABLE = {
    "layer_replication": "it repeats layers, so it is another architecture",
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "arrow_config": "it routes each token among adapters",
    "megatron_config": "it is laid out for Megatron",
    "use_bdlora": "it is laid out in blocks over several devices",
}
"""PEFT settings that cannot be merged into a weight, with the reason."""


def build(spec: LoraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import EvaConfig, LoraConfig  # imports bitsandbytes, which logs on import

    init = spec.init_lora_weights
    ours = init in ("default", "loftq")  # loftq is initialized later
    return LoraConfig(
        **base.shared,
        r=spec.r,
        lora_alpha=whole(spec.lora_alpha),
        lora_dropout=spec.lora_dropout,
        target_parameters=base.parameters or None,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern={name: whole(alpha) for name, alpha in spec.alpha_pattern.items()},
        init_lora_weights=True if ours else init,
        eva_config=EvaConfig() if init == "eva" else None,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        bias=spec.bias,
        trainable_token_indices=_token_ids(spec, base) or None,
        ensure_weight_tying=spec.ensure_weight_tying,
        fan_in_fan_out=base.fan_in_fan_out,
    )


def _token_ids(spec: LoraSpec, base: Base) -> list[int]:
    """Return the sorted ids of trained tokens; raises `ConfigError` for unknown ones."""
    wished = spec.trainable_token_indices
    if not wished:
        return []
    rows, known = base.config.get_text_config().vocab_size, base.tokenizer.get_vocab()
    ids = {known.get(token) if isinstance(token, str) else token for token in wished}
    lost = [t for t in wished if (known.get(t) if isinstance(t, str) else t) not in range(rows)]
    if lost:
        raise ConfigError(
            f"--trainable-token-indices: {', '.join(map(repr, lost))} "
            f"{'is no token' if len(lost) == 1 else 'are no tokens'} of the model, which has "
            f"{rows:,}, from 0. A new token needs a row first: add it to tokenizer and model with "
            "resize_token_embeddings of transformers, save both, and train that model."
        )
    return sorted(i for i in ids if i is not None)


def check(spec: LoraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ConfigError` if a key of `rank_pattern` or `alpha_pattern` matches no layer."""
    names = join_names(dict.fromkeys(name.rpartition(".")[2] for name in sizes), 8)
    try:
        with limit_time(_SECONDS):
            ignored = [
                (field, pattern)
                for field in ("rank_pattern", "alpha_pattern")
                for pattern in getattr(spec, field)
                if not any(re.match(rf"(.*\.)?({pattern})$", n) for n in sizes)  # as PEFT does
            ]
    except (re.error, TimeoutError) as error:
        raise ConfigError(
            f"method.rank_pattern or alpha_pattern has no usable regular expression: {error}."
        ) from None
    problems = [
        f"method.{field}: {pattern!r} matches none of the {len(sizes):,} adapted modules "
        f"({names}) and would be ignored. Give the end of a module's name or a "
        "regular expression."
        for field, pattern in ignored
    ]
    if problems:
        raise ConfigError(problems)


def count(spec: LoraSpec, sizes: Mapping[str, tuple[int, int]]) -> int | None:
    """Return the sum of r · (in + out), or None if a setting changes the count."""
    if spec.rank_pattern or spec.use_dora or spec.bias != "none" or spec.trainable_token_indices:
        return None
    return sum(spec.r * (fan_in + fan_out) for fan_in, fan_out in sizes.values())


def describe(spec: LoraSpec) -> str:
    """Return the settings in one line."""
    init, ratio = spec.init_lora_weights, spec.lora_plus_ratio
    forms = {
        "rsLoRA": spec.use_rslora,
        "DoRA": spec.use_dora,
        f"{init} start": init != "default",
        f"LoRA+ with ratio {ratio or 0:g}": ratio is not None,
    }
    detail = f"r {spec.r}, alpha {spec.lora_alpha:g}, dropout {spec.lora_dropout:g}"
    return ", ".join([detail, *(name for name, on in forms.items() if on)])


def refuse_quantized(spec: LoraSpec, base: QuantizedCheckpoint) -> str | None:
    """Return why this initialization does not work on a quantized checkpoint, or None."""
    if base.kind == "none" and spec.init_lora_weights not in ("default", "gaussian"):
        return refuse_other_forms(spec, base)
    if spec.init_lora_weights == "loftq":
        return (
            f"--init loftq begins at what quantization took from the weights, and --model "
            f"{base.name} is quantized already ({base.form}). Give the original model with --quant "
            "4bit, or use --init default."
        )
    return None


def against_workers(spec: LoraSpec) -> str:
    """Return the model state that a forward pass changes, or ""."""
    if spec.target_parameters:
        return "PEFT puts target_parameters into the model in each micro-batch"
    return ""


def against_embeddings(spec: LoraSpec) -> str:
    """Return why this LoRA cannot adapt an embedding, or ""."""
    if spec.init_lora_weights in ("default", "gaussian"):
        return ""
    return f"the start {spec.init_lora_weights} is taken from linears. Use --init default"


def why_not_mergeable(config: Mapping[str, Any]) -> str | None:
    """Return why an adapter with `config` cannot be merged and what to do, or None."""
    start = str(config.get("init_lora_weights"))
    if start.startswith(BASE_MODIFYING_INITS):  # saved by PEFT; ftlevel saves these as plain LoRA
        return (
            f"init_lora_weights is {start}: its start was taken out of the base's weights, and the "
            "file holds none of it. Write it as plain LoRA first, and merge that: ftlevel export "
            "ADAPTER --format peft --out DIR."
        )
    for key, reason in _UNMERGEABLE.items():
        if config.get(key):
            return f"{key} is set: {reason}, and no plain weight can hold that. Keep the adapter."
    return None


def forget_start(config: Any) -> None:
    """Reset the initialization in `config` (mutated), which does not affect a trained adapter."""
    config.init_lora_weights = True


def find_rates(spec: LoraSpec) -> Rates:
    """Return the rates, lower for variants that change weights faster at the same rate."""
    share = 1.0
    if spec.lora_plus_ratio:  # B has this multiple of the rate, so A needs less
        share /= math.sqrt(spec.lora_plus_ratio)
    kinds = {"decoder": 2e-3, "encoder-decoder": 3e-3}
    if spec.init_lora_weights in (*PISSA, "olora"):
        share /= 2  # neither A nor B is small initially
        kinds["decoder"] = 6e-4
    return Rates(
        narrow=1e-3 * share,
        wide=2e-4 * share,
        source="QLoRA, table 9",
        kinds={kind: rate * share for kind, rate in kinds.items()},
    )


_METHOD = Method(
    FACTS,
    rate=find_rates,
    build=build,
    rules=RULES,
    check=check,
    count=count,
    describe=describe,
    refuse_quantized=refuse_quantized,
    start=START,
    optimizer=build_optimizer,
    on_embeddings=against_embeddings,
    step=StepSupport(
        fusing=lambda spec: spec.use_dora * "DoRA scales by a norm of the whole weight",
        workers=against_workers,
    ),
    merging=Merging(
        ("LORA",),
        why_not=why_not_mergeable,
        prepare=forget_start,
        plain_form=PlainForm(as_lora),
    ),
)
METHODS = {"lora": _METHOD, "qlora": _METHOD}
