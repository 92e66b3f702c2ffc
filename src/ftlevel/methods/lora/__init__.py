"""LoRA and QLoRA: spec → `peft.LoraConfig`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ftlevel.config.methods.lora import INSIDE_BASE, PISSA, LoraSpec
from ftlevel.errors import ConfigError, listing
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
from ftlevel.models.untrusted import ending_in

_SECONDS = 10.0  # patterns are matched in some milliseconds

_UNMERGEABLE = {
    "layer_replication": "it repeats layers, so it is another architecture",
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "arrow_config": "it routes each token among adapters",
    "megatron_config": "it is laid out for Megatron",
    "use_bdlora": "it is laid out in blocks over several devices",
}
"""Settings of PEFT's that no plain weight can hold."""


def build(spec: LoraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import EvaConfig, LoraConfig  # here: it imports bitsandbytes, which logs on import

    init = spec.init_lora_weights
    ours = init in ("default", "loftq")  # loftq's start is set afterwards
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
    """Return the tokens whose rows are trained, sorted.

    Raises:
        ConfigError: one is not in the vocabulary, or the base has no row for it.
    """
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
    """Check that every pattern names a linear that is adapted.

    Raises:
        ConfigError: a key of `rank_pattern` or `alpha_pattern` would be ignored.
    """
    names = listing(dict.fromkeys(name.rpartition(".")[2] for name in sizes), 8)
    try:
        with ending_in(_SECONDS):
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
    """Return r · (in + out) for every linear, None where a setting makes it another number."""
    if spec.rank_pattern or spec.use_dora or spec.bias != "none" or spec.trainable_token_indices:
        return None
    return sum(spec.r * (fan_in + fan_out) for fan_in, fan_out in sizes.values())


def describe(spec: LoraSpec) -> str:
    """Return the settings in a line."""
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
    """Return why LoRA cannot begin so on weights that were quantized before; None if it can."""
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
    """Return what a forward pass changes in the model; empty if nothing."""
    if spec.target_parameters:
        return "PEFT puts target_parameters into the model in each micro-batch"
    return ""


def against_embeddings(spec: LoraSpec) -> str:
    """Return why this LoRA cannot go on an embedding; empty if it can."""
    if spec.init_lora_weights in ("default", "gaussian"):
        return ""
    return f"the start {spec.init_lora_weights} is taken from linears. Use --init default"


def why_not_mergeable(config: Mapping[str, Any]) -> str | None:
    """Return why an adapter of `config` cannot be merged and what to do, or None if it can."""
    start = str(config.get("init_lora_weights"))
    if start.startswith(INSIDE_BASE):  # as PEFT alone saves it; ours are saved as plain LoRA
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
    """Set PEFT's start in `config` (mutated): how it began does not matter any more."""
    config.init_lora_weights = True


def find_rates(spec: LoraSpec) -> Rates:
    """Return the rates, lower where a form of LoRA moves the weights further at the same rate."""
    share = 1.0
    if spec.lora_plus_ratio:  # B learns at this many times the rate, so A at less
        share /= math.sqrt(spec.lora_plus_ratio)
    kinds = {"decoder": 2e-3, "encoder-decoder": 3e-3}
    if spec.init_lora_weights in (*PISSA, "olora"):
        share /= 2  # neither A nor B is small, so both move W from the start
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
