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
    MergeInfo,
    Method,
    QuantizedCheckpoint,
    StepSupport,
    as_int,
)
from ftlevel.methods.lora_conversion import (
    LoraConversion,
    by_pattern,
    convert_lora,
    get_unsaved_error,
)
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import CONV1D, MERGES, QUANTIZED, MethodInfo, Rule, rows
from ftlevel.models.untrusted import limit_time

_LLAMA_7B = 19_988_480


def _variant(
    name: str,
    flags: str,
    trains: str,
    reference: str,
    kwargs: dict[str, Any],
    num_parameters: int = _LLAMA_7B,
) -> MethodInfo:
    """Returns the support-table row of the LoRA variant that the settings `kwargs` select."""
    return MethodInfo(
        name,
        "lora",
        f"--method lora {flags}",
        trains,
        MERGES,
        reference,
        num_parameters,
        kwargs,
        ("qlora",),
    )


_INFO = (
    MethodInfo(
        "lora", "lora", "--method lora", "two low-rank matrices per linear layer", MERGES,
        "Hu et al., 2021, arXiv:2106.09685", _LLAMA_7B,
    ),
    MethodInfo(
        "qlora", "qlora", "--method qlora", "LoRA on a 4- or 8-bit base", MERGES,
        "Dettmers et al., 2023, arXiv:2305.14314", _LLAMA_7B,
    ),
    _variant(
        "dora", "--dora", "LoRA with separate column magnitudes",
        "Liu et al., 2024, arXiv:2402.09353", {"use_dora": True}, 21_348_352,
    ),
    _variant(
        "rslora", "--rslora", "LoRA, scaled by alpha / √r",
        "Kalajdzievski, 2023, arXiv:2312.03732", {"use_rslora": True},
    ),
    _variant(
        "lora+", "--lora-plus-ratio 16", "LoRA with a higher rate for B",
        "Hayou et al., 2024, arXiv:2402.12354", {"lora_plus_ratio": ...},
    ),
    _variant(
        "gaussian", "--init gaussian", "LoRA, A drawn from N(0, 1/r)",
        "Hu et al., 2021, section 4.1", {"init_lora_weights": "gaussian"},
    ),
    _variant(
        "orthogonal", "--init orthogonal", "LoRA, A and B orthogonal", "PEFT",
        {"init_lora_weights": "orthogonal"},
    ),
    _variant(
        "pissa", "--init pissa", "LoRA, initialized from the largest singular vectors",
        "Meng et al., 2024, arXiv:2404.02948", {"init_lora_weights": PISSA},
    ),
    _variant(
        "olora", "--init olora", "LoRA, initialized from the QR factors of the weights",
        "Büyükakyüz, 2024, arXiv:2406.01775", {"init_lora_weights": "olora"},
    ),
    _variant(
        "loftq", "--init loftq", "LoRA, initialized from the quantization error",
        "Li et al., 2023, arXiv:2310.08659", {"init_lora_weights": "loftq"},
    ),
    _variant(
        "eva", "--init eva",
        "LoRA, initialized from principal components of inputs",
        "Paischer et al., 2024, arXiv:2410.07170", {"init_lora_weights": "eva"},
    ),
    _variant(
        "experts", "--set method.target_parameters=experts",
        "LoRA, also on each expert of a mixture", "PEFT", {"target_parameters": ...},
    ),
)  # fmt: skip

_RULES = (
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
        "it subtracts its initialization from the base's weights, and the result would be "
        "quantized again",
        "Use --init default, or drop --quant.",
        quants=QUANTIZED,
    ),
    Rule(
        rows("loftq"),
        "it is initialized from the 4-bit quantization error, and the base is not quantized",
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
        "PEFT initializes it in the dtype of the weights, which is an integer",
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
        "EVA uses one mask, but encoder and decoder have different inputs",
        "Use --init pissa or default.",
        architectures=frozenset({"encoder-decoder"}),
    ),
    Rule(
        rows("eva"),
        "EVA expects inputs of shape (batch, length, width) in every linear layer",
        "Use --init pissa or default.",
        families=frozenset({"deberta-v2", "opt"}),
    ),
    Rule(
        rows("experts"),
        "it has no tensor that stores several experts",
        "Drop method.target_parameters; --target-modules all-linear covers all linear layers.",
        experts=False,
    ),
)


ADAPTER = "default"


class LoraInitialization(Initialization):
    """The initializations of PEFT's `init_lora_weights`."""

    def required_dtype(self, spec: LoraSpec, dtype: str) -> Choice | None:
        """Returns float32 for PiSSA and OLoRA; raises `ConfigError` if `dtype` differs."""
        if not self.rewrites_base(spec):
            return None
        init = spec.init_lora_weights
        if dtype not in ("auto", "float32"):
            raise ConfigError(
                f"--init {init} cannot be used with --dtype {dtype}: it subtracts its "
                "initialization from the base's weights; rounding the rest would change the "
                "trained model. Use --dtype float32, or --init default."
            )
        message = f"auto: {init} subtracts its initialization from the weights"
        return Choice("dtype", "float32", message)

    def rewrites_base(self, spec: LoraSpec) -> bool:
        """Returns whether the initialization is PiSSA or OLoRA, which change the base weights."""
        return spec.init_lora_weights in BASE_MODIFYING_INITS

    def without_weights(self, spec: LoraSpec) -> LoraSpec:
        """Returns `spec` with the default initialization."""
        return spec.model_copy(update={"init_lora_weights": "default"})

    def initialize(self, model: Any, spec: LoraSpec, inputs: InitializationInputs) -> None:
        """Initialize LoRA of `model` (modified) with EVA or LoftQ; PEFT does the others."""
        if spec.init_lora_weights == "loftq":
            from ftlevel.methods.lora.initialization import start_from_residual

            start_from_residual(model, inputs.float_weights())
        if spec.init_lora_weights == "eva":
            from ftlevel.methods.lora.initialization import start_from_data

            start_from_data(model, inputs.batches(), inputs.device, inputs.dtype)

    def copy(self, model: Any) -> dict[str, Any]:
        """Returns name → copy of A and B for PiSSA and OLoRA, which change the base; else {}."""
        config = getattr(model, "peft_config", {}).get(ADAPTER)
        if getattr(config, "init_lora_weights", None) not in BASE_MODIFYING_INITS:
            return {}
        return {
            name: value.detach().to("cpu", copy=True)
            for name, value in model.named_parameters()
            if f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name
        }

    @contextlib.contextmanager
    def as_saved(self, model: Any, initial: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
        """Context manager: yields the state dict of an equal LoRA of rank 2r on the original base.

        The model's config has rank 2r within the context. Yields None if the base is unchanged.
        """
        if not initial:
            yield None
            return
        import torch

        state = model.state_dict()
        for name, value in initial.items():
            trained, is_a = state[name].cpu(), ".lora_A." in name
            state[name] = torch.cat([trained, value if is_a else -value], dim=0 if is_a else 1)
        config = model.peft_config[ADAPTER]
        model.peft_config[ADAPTER] = _with_double_rank(config)
        try:
            yield state
        finally:
            model.peft_config[ADAPTER] = config


def _with_double_rank(config: Any) -> Any:
    config = copy.deepcopy(config)
    # The scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    factor = math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {n: factor * alpha for n, alpha in (config.alpha_pattern or {}).items()}
    return config


_SECONDS = 10.0  # seconds; patterns usually match in milliseconds

_CANNOT_MERGE = {
    "layer_replication": "it repeats layers, so it is a different architecture",
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "arrow_config": "it routes each token among adapters",
    "megatron_config": "it is laid out for Megatron",
    "use_bdlora": "it is laid out in blocks over several devices",
}
"""Reasons why adapters cannot be merged, by key of adapter_config.json."""


def get_merge_error(config: Mapping[str, Any]) -> str | None:
    """Returns why an adapter with `config` cannot be merged and what to do, or None."""
    init = str(config.get("init_lora_weights"))
    if message := get_unsaved_error(init):
        return f"init_lora_weights is {init}: {message}."
    if init.lower().startswith(BASE_MODIFYING_INITS):  # saved by PEFT; ftlevel saves plain LoRA
        return (
            f"init_lora_weights is {init}: its initialization changed the base weights and is "
            "not in the file. Export it as plain LoRA first, and use that: ftlevel export "
            "ADAPTER --format peft --out DIR."
        )
    if init.lower() == "loftq":  # saved by PEFT, which replaces the base's weights
        return (
            "init_lora_weights is loftq: its initialization rounded the base weights to 4 bits, "
            "and they are not in the file. Use it with PEFT, which repeats the rounding."
        )
    for key, message in _CANNOT_MERGE.items():
        if config.get(key):
            return f"{key} is set: {message}, and no plain weight can hold that. Keep the adapter."
    return None


def reset_initialization(config: Any) -> None:
    """Set `init_lora_weights` of `config` (modified) to PEFT's default."""
    config.init_lora_weights = True


class Lora(Method):
    """LoRA and QLoRA, with variants such as DoRA, rsLoRA and LoRA+."""

    info = _INFO
    rules = _RULES
    initialization = LoraInitialization()
    step = StepSupport(
        fusing=lambda spec: spec.use_dora * "DoRA scales by a norm of the whole weight",
        workers=lambda spec: (
            "PEFT puts target_parameters into the model in each micro-batch"
            if spec.target_parameters
            else ""
        ),
    )

    merge_info = MergeInfo(
        ("LORA",),
        get_error=get_merge_error,
        prepare=reset_initialization,
        lora_conversion=LoraConversion(convert_lora),
    )

    def rates(self, spec: LoraSpec) -> Rates:
        """Returns the learning rates, which are lower for LoRA+, PiSSA and OLoRA."""
        scale = 1.0
        if spec.lora_plus_ratio:  # B has this multiple of the rate, so A needs less
            scale /= math.sqrt(spec.lora_plus_ratio)
        by_architecture = {"decoder": 2e-3, "encoder-decoder": 3e-3}
        if spec.init_lora_weights in (*PISSA, "olora"):
            scale /= 2  # neither A nor B is small initially
            by_architecture["decoder"] = 6e-4
        return Rates(
            small=1e-3 * scale,
            large=2e-4 * scale,
            source="as in the QLoRA paper",
            by_architecture={name: rate * scale for name, rate in by_architecture.items()},
        )

    def format_spec(self, spec: LoraSpec) -> str:
        """Returns rank, alpha, dropout and variants as text."""
        init, ratio = spec.init_lora_weights, spec.lora_plus_ratio
        used = {
            "rsLoRA": spec.use_rslora,
            "DoRA": spec.use_dora,
            f"{init} start": init != "default",
            f"LoRA+ with ratio {ratio or 0:g}": ratio is not None,
        }
        text = f"r {spec.r}, alpha {spec.lora_alpha:g}, dropout {spec.lora_dropout:g}"
        return ", ".join([text, *(name for name, is_used in used.items() if is_used)])

    def get_quantized_error(self, spec: LoraSpec, base: QuantizedCheckpoint) -> str | None:
        """Returns why the initialization in `spec` does not support quantized weights, or None."""
        if base.quantization == "none" and spec.init_lora_weights not in ("default", "gaussian"):
            return super().get_quantized_error(spec, base)
        if spec.init_lora_weights == "loftq":
            return (
                "--init loftq starts from the quantization error, and --model "
                f"{base.name} is quantized already ({base.format}). Use the original model with "
                "--quant 4bit, or --init default."
            )
        return None

    def get_embedding_error(self, spec: LoraSpec) -> str:
        """Returns why the initialization in `spec` cannot adapt an embedding; "" if it can."""
        if spec.init_lora_weights in ("default", "gaussian"):
            return ""
        return f"--init {spec.init_lora_weights} needs linear layers. Use --init default"

    def check(self, spec: LoraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if a pattern matches no layer in `sizes`, or a rank is too large."""
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
            f"({names}) and would be ignored. Expected the end of a module name, or a "
            "regular expression."
            for field, pattern in ignored
        ]
        if problems:
            raise ConfigError(problems)
        ranks = {name: by_pattern(spec.rank_pattern, name, spec.r) for name in sizes}
        odd = sorted({rank for rank in ranks.values() if rank % 2})
        if spec.init_lora_weights == "orthogonal" and odd:
            raise ConfigError(
                f"--init orthogonal needs even ranks, and r is {odd[0]}. Set it to {odd[0] + 1}, "
                "or use --init default."
            )
        if spec.init_lora_weights not in (*BASE_MODIFYING_INITS, "loftq", "eva"):
            return
        is_eva = spec.init_lora_weights == "eva"  # it computes twice as many directions
        limits = {name: size[0] // 2 if is_eva else min(size) for name, size in sizes.items()}
        small = {name: limit for name, limit in limits.items() if limit < ranks[name]}
        if small:
            name, width = min(small.items(), key=lambda item: item[1])
            raise ConfigError(
                f"--init {spec.init_lora_weights} takes r directions of each layer, and r "
                f"{ranks[name]} is more than {len(small):,} of {len(sizes):,} linear layers have, "
                f"such as {name} ({width:,}). Set its rank to {width} or less, or use --init "
                "default."
            )

    def num_parameters(self, spec: LoraSpec, sizes: Mapping[str, tuple[int, int]]) -> int | None:
        """Returns the sum of r · (in + out); None for variants whose number differs."""
        values = (
            spec.rank_pattern,
            spec.use_dora,
            spec.bias != "none",
            spec.trainable_token_indices,
        )
        if any(values):
            return None
        return sum(spec.r * (fan_in + fan_out) for fan_in, fan_out in sizes.values())

    def build(self, spec: LoraSpec, base: Base) -> Any:
        """Returns `peft.LoraConfig`; raises `ConfigError` if a token to train is unknown."""
        from peft import EvaConfig, LoraConfig  # imports bitsandbytes, which logs on import

        init = spec.init_lora_weights
        return LoraConfig(
            **base.shared,
            r=spec.r,
            lora_alpha=as_int(spec.lora_alpha),
            lora_dropout=spec.lora_dropout,
            target_parameters=base.parameters or None,
            rank_pattern=dict(spec.rank_pattern),
            alpha_pattern={name: as_int(alpha) for name, alpha in spec.alpha_pattern.items()},
            init_lora_weights=init if init not in ("default", "loftq") else True,  # loftq is later
            eva_config=EvaConfig() if init == "eva" else None,
            use_rslora=spec.use_rslora,
            use_dora=spec.use_dora,
            bias=spec.bias,
            trainable_token_indices=_token_ids(spec, base) or None,
            ensure_weight_tying=spec.ensure_weight_tying,
            fan_in_fan_out=base.fan_in_fan_out,
        )

    def optimizer(self, spec: LoraSpec, model: Any, args: Any) -> Any:
        """Returns PEFT's LoRA+ optimizer, or None if `lora_plus_ratio` is unset.

        B and all trained vectors, such as biases of heads, get A's rate times the ratio; LoRA of
        embeddings gets A's rate, for which PEFT's default is 1e-6.
        """
        if spec.lora_plus_ratio is None:
            return None
        from peft.optimizers import create_loraplus_optimizer
        from transformers import Trainer

        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return create_loraplus_optimizer(
            model,
            optimizer_class,
            loraplus_lr_ratio=spec.lora_plus_ratio,
            loraplus_lr_embedding=kwargs["lr"],
            loraplus_weight_decay=args.weight_decay,
            **kwargs,
        )


def _token_ids(spec: LoraSpec, base: Base) -> list[int]:
    """Returns the sorted ids of the tokens to train; raises `ConfigError` for unknown tokens."""
    tokens = spec.trainable_token_indices
    if not tokens:
        return []
    size, vocabulary = base.config.get_text_config().vocab_size, base.tokenizer.get_vocab()
    ids = {token: vocabulary.get(token) if isinstance(token, str) else token for token in tokens}
    invalid = [token for token, index in ids.items() if index not in range(size)]
    if invalid:
        raise ConfigError(
            f"--trainable-token-indices: {', '.join(map(repr, invalid))} "
            f"{'is no token' if len(invalid) == 1 else 'are no tokens'} of the model, which has "
            f"{size:,}, from 0. A new token needs a row first: add it to tokenizer and model with "
            "resize_token_embeddings of transformers, save both, and train that model."
        )
    return sorted({index for index in ids.values() if index is not None})


METHODS = dict.fromkeys(("lora", "qlora"), Lora())
