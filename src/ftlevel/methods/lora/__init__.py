"""LoRA and QLoRA: builds `peft.LoraConfig`."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ftlevel.config.methods.lora import BASE_MODIFYING_INITS, PISSA, LoraSpec
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, join_names
from ftlevel.methods.base import (
    Base,
    Initialization,
    InitializationInputs,
    Merging,
    Method,
    QuantizedCheckpoint,
    StepSupport,
    refuse_other_forms,
    whole,
)
from ftlevel.methods.facts import CONV1D, MERGES, QUANTIZED, MethodFacts, Rule, rows
from ftlevel.methods.lora.plain_form import as_lora
from ftlevel.methods.plain_form import PlainForm
from ftlevel.methods.rates import Rates
from ftlevel.models.untrusted import limit_time

_LLAMA_7B = 19_988_480


def _form(
    name: str, flags: str, trains: str, paper: str, fields: dict[str, Any], count: int = _LLAMA_7B
) -> MethodFacts:
    """Return the row of a LoRA variant, which QLoRA also supports."""
    return MethodFacts(
        name, "lora", f"--method lora {flags}", trains, MERGES, paper, count, fields, ("qlora",)
    )


FACTS = (
    MethodFacts(
        "lora", "lora", "--method lora", "two low-rank matrices per linear layer", MERGES,
        "Hu et al., 2021, arXiv:2106.09685", _LLAMA_7B,
    ),
    MethodFacts(
        "qlora", "qlora", "--method qlora", "LoRA on a 4- or 8-bit base", MERGES,
        "Dettmers et al., 2023, arXiv:2305.14314", _LLAMA_7B,
    ),
    _form(
        "dora", "--dora", "LoRA with separate column magnitudes",
        "Liu et al., 2024, arXiv:2402.09353", {"use_dora": True}, 21_348_352,
    ),
    _form(
        "rslora", "--rslora", "LoRA, scaled by alpha / √r",
        "Kalajdzievski, 2023, arXiv:2312.03732", {"use_rslora": True},
    ),
    _form(
        "lora+", "--lora-plus-ratio 16", "LoRA with a higher rate for B",
        "Hayou et al., 2024, arXiv:2402.12354", {"lora_plus_ratio": ...},
    ),
    _form(
        "gaussian", "--init gaussian", "LoRA, A drawn from N(0, 1/r)",
        "Hu et al., 2021, section 4.1", {"init_lora_weights": "gaussian"},
    ),
    _form(
        "orthogonal", "--init orthogonal", "LoRA, A and B orthogonal", "PEFT",
        {"init_lora_weights": "orthogonal"},
    ),
    _form(
        "pissa", "--init pissa", "LoRA, initialized from the largest singular vectors",
        "Meng et al., 2024, arXiv:2404.02948", {"init_lora_weights": PISSA},
    ),
    _form(
        "olora", "--init olora", "LoRA, initialized from the QR factors of the weights",
        "Büyükakyüz, 2024, arXiv:2406.01775", {"init_lora_weights": "olora"},
    ),
    _form(
        "loftq", "--init loftq", "LoRA, initialized from the quantization error",
        "Li et al., 2023, arXiv:2310.08659", {"init_lora_weights": "loftq"},
    ),
    _form(
        "eva", "--init eva",
        "LoRA, initialized from principal components of inputs",
        "Paischer et al., 2024, arXiv:2410.07170", {"init_lora_weights": "eva"},
    ),
    _form(
        "experts", "--set method.target_parameters=experts",
        "LoRA, and the same on every expert of a mixture", "PEFT", {"target_parameters": ...},
    ),
)  # fmt: skip

RULES = (
    Rule(
        rows("qlora"),
        "it is LoRA on a quantized base, and --quant is none",
        "Use --quant 4bit or 8bit, or --method lora.",
        quants=frozenset({"none"}),
    ),
    Rule(
        rows("dora"),
        "PEFT cannot read 8-bit weights for the magnitude",
        "Use --quant 4bit, or drop --dora.",
        quants=frozenset({"8bit"}),
    ),
    Rule(
        rows("pissa", "olora"),
        "it takes its initialization out of the base's weights, and what is left would be "
        "quantized again",
        "Use --init default, or drop --quant.",
        quants=QUANTIZED,
    ),
    Rule(
        rows("loftq"),
        "it starts from the error of 4-bit quantization, and the base is not quantized",
        "Use --quant 4bit, or --init pissa.",
        quants=frozenset({"none"}),
    ),
    Rule(
        rows("loftq"),
        "the error of 8-bit quantization is nearly zero",
        "Use --quant 4bit, or --init default.",
        quants=frozenset({"8bit"}),
    ),
    Rule(
        rows("orthogonal"),
        "PEFT draws its start in the type of the weights, which is an integer",
        "Use --init default, or drop --quant.",
        quants=QUANTIZED,
    ),
    Rule(
        rows("olora"),
        "its linear layers are Conv1D, and PEFT factorizes their weight without transposing it",
        "Use --init pissa.",
        families=CONV1D,
        quants=frozenset({"none"}),
    ),
    Rule(
        rows("eva"),
        "encoder and decoder see other inputs, and EVA takes one mask for both",
        "Use --init pissa or default.",
        kinds=frozenset({"encoder-decoder"}),
    ),
    Rule(
        rows("eva"),
        "some of its linears see other rows than those of the input, where EVA looks",
        "Use --init pissa or default.",
        families=frozenset({"deberta-v2", "opt"}),
    ),
    Rule(
        rows("experts"),
        "it has no experts in one tensor",
        "Drop method.target_parameters; --target-modules all-linear reaches every linear.",
        experts=False,
    ),
)


def build_optimizer(spec: LoraSpec, model: Any, arguments: Any) -> Any:
    """Return LoRA+'s optimizer if `lora_plus_ratio` is set; None uses Trainer's default.

    As in PEFT, B and all vectors, such as biases of heads, get `lora_plus_ratio` times A's rate.
    """
    if spec.lora_plus_ratio is None:
        return None
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    rate = settings.pop("lr")
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=rate,
        loraplus_lr_ratio=spec.lora_plus_ratio,
        loraplus_weight_decay=arguments.weight_decay,
        **settings,
    )


ADAPTER = "default"


def starts_inside_base(model: Any) -> bool:
    """Return whether `model` has a LoRA whose initialization changed the base weights."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    return getattr(config, "init_lora_weights", None) in BASE_MODIFYING_INITS


def copy_start(model: Any) -> dict[str, Any]:
    """Return A₀ and B₀ of an untrained model by name; empty if they are not needed."""
    if not starts_inside_base(model):
        return {}
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in model.named_parameters()
        if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
    }


@contextlib.contextmanager
def as_plain_lora(model: Any, start: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Yield the state dict to save; within the block, `model` has the matching config.

    `start` comes from `copy_start`; if empty, nothing changes and None is yielded.
    """
    if not start:
        yield None
        return
    import torch

    state = model.state_dict()
    for name, first in start.items():
        trained = state[name].cpu()
        is_a = ".lora_A." in name
        state[name] = torch.cat([trained, first if is_a else -first], dim=0 if is_a else 1)
    own = model.peft_config[ADAPTER]
    model.peft_config[ADAPTER] = _doubled(own)
    try:
        yield state
    finally:
        model.peft_config[ADAPTER] = own


def _doubled(config: Any) -> Any:
    """Return the config with twice the rank, the same scale, and default initialization."""
    config = copy.deepcopy(config)
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {n: factor * alpha for n, alpha in (config.alpha_pattern or {}).items()}
    return config


def rewrites_base(spec: LoraSpec) -> bool:
    """Return whether initialization changes the base weights."""
    return spec.init_lora_weights in BASE_MODIFYING_INITS


def precision(spec: LoraSpec, wish: str) -> Choice | None:
    """Return float32 for PiSSA and OLoRA; raises `ConfigError` if `wish` is another dtype."""
    if not rewrites_base(spec):
        return None
    init = spec.init_lora_weights
    if wish not in ("auto", "float32"):
        raise ConfigError(
            f"--init {init} cannot be used with --dtype {wish}: it takes its initialization out "
            "of the base's weights, what is left is rounded, and the adapter would not be what "
            "was trained. Use --dtype float32, or --init default."
        )
    return Choice("dtype", "float32", f"auto: {init} takes its initialization out of the weights")


def begin(model: Any, spec: LoraSpec, inputs: InitializationInputs) -> None:
    """Initialize LoRA from training rows (eva) or from float weights (loftq) (mutated)."""
    if spec.init_lora_weights == "loftq":
        from ftlevel.methods.lora.initialization import start_from_residual

        start_from_residual(model, inputs.float_weights())
    if spec.init_lora_weights == "eva":
        from ftlevel.methods.lora.initialization import start_from_data

        start_from_data(model, inputs.batches(), inputs.device, inputs.dtype)


def default(spec: LoraSpec) -> LoraSpec:
    """Return `spec` with PEFT's default initialization, for parameter counts without weights."""
    return spec.model_copy(update={"init_lora_weights": "default"})


START = Initialization(precision, begin, rewrites_base, copy_start, as_plain_lora, default)


_SECONDS = 10.0  # timeout; patterns usually match in milliseconds

_UNMERGEABLE = {
    "layer_replication": "it repeats layers, so it is a different architecture",
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
        f"({names}) and would be ignored. Expected the end of a module name, or a regular "
        f"expression."
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
            f"--init loftq starts from the quantization error, and --model "
            f"{base.name} is quantized already ({base.form}). Use the original model with "
            f"--quant 4bit, or --init default."
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
            f"init_lora_weights is {start}: its initialization changed the base weights and is "
            f"not in the file. Export it as plain LoRA first, and merge that: ftlevel export "
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
