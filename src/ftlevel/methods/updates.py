"""Methods that change every linear layer with PEFT's own tuners, except LoRA and AdaLoRA.

Each builds the PEFT config, checks that it fits the layers, and converts adapters to plain LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.methods.lora import Ia3Spec, MissSpec, ShiraSpec
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.methods.base import Base, MergeInfo, Method, as_int
from ftlevel.methods.lora_conversion import (
    FULL_RANK,
    AdapterFile,
    Factors,
    LoraConversion,
    by_pattern,
)
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import CONV1D, MERGES, Rule, rows, single_row
from ftlevel.methods.upstream import copy_base_outputs, random_shira_mask


class LinearUpdate(Method):
    """PEFT method that adapts every linear layer and merges exactly.

    The PEFT type is the method's name in capitals; fields of its spec are named as in PEFT.

    Attributes:
        has_fan_in_fan_out: whether the PEFT config class has `fan_in_fan_out`.
        config_kwargs: values of PEFT config fields that the spec does not have.
        block_size: spec field that must divide the inputs of every layer; empty for none.
        split_outputs: whether the block size must divide the outputs, too.
        is_inplace: whether PEFT layers add to the base layer's output in place.
    """

    def __init__(
        self,
        name: str,
        trained: str,
        reference: str,
        llama_7b: int,
        rate: Rates,
        lora_conversion: LoraConversion,
        config_class: str,
        *,
        rules: tuple[Rule, ...] = (),
        has_fan_in_fan_out: bool = False,
        config_kwargs: Mapping[str, Any] | None = None,
        block_size: str = "",
        split_outputs: bool = False,
        is_inplace: bool = False,
        merge_prepare: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self.info = single_row(name, trained, MERGES, reference, llama_7b)
        self.rate, self.rules = rate, rules
        self.merge_info = MergeInfo(
            (name.upper(),), prepare=merge_prepare, lora_conversion=lora_conversion
        )
        self.config_class, self.has_fan_in_fan_out = config_class, has_fan_in_fan_out
        self.config_kwargs = config_kwargs or {}
        self.block_size, self.split_outputs = block_size, split_outputs
        self.is_inplace = is_inplace

    def check(self, spec: Any, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if the block size does not divide the widths of each layer."""
        if self.block_size:
            size = getattr(spec, self.block_size)
            check_block_size(self.block_size, size, sizes, outputs=self.split_outputs)

    def build(self, spec: MethodSpec, base: Base) -> Any:
        """Returns the method's `PeftConfig` with all fields of `spec`."""
        import peft

        kwargs = {name: getattr(spec, name) for name in type(spec).model_fields}
        del kwargs["kind"], kwargs["target_modules"]  # the latter, resolved, is in `shared`
        if "alpha" in kwargs:
            kwargs["alpha"] = as_int(kwargs["alpha"])
        if self.has_fan_in_fan_out:
            kwargs["fan_in_fan_out"] = base.fan_in_fan_out
        return getattr(peft, self.config_class)(**base.shared, **kwargs, **self.config_kwargs)

    def prepare(self, model: Any) -> None:
        """Make in-place layers of `model` (modified) add to a copy of the base layer's output."""
        if self.is_inplace:
            copy_base_outputs(model)


_NO_CONV1D = Rule(
    rows("oft", "boft", "miss", "shira", "c3a"),
    "PEFT does not support Conv1D layers",
    "Use --method lora, or --quant 4bit, which replaces Conv1D by linear layers.",
    families=CONV1D,
    quants=frozenset({"none"}),
)


def check_block_size(
    field: str, size: int, sizes: Mapping[str, tuple[int, int]], *, outputs: bool
) -> None:
    """Raise `ConfigError` unless `size` divides all input and, if `outputs`, all output widths."""
    widths = {name: pair if outputs else pair[:1] for name, pair in sizes.items()}
    invalid = {name: width for name, pair in widths.items() for width in pair if width % size}
    if not invalid:
        return
    name, width = next(iter(invalid.items()))
    divisor = math.gcd(*(width for pair in widths.values() for width in pair))
    sizes_allowed = [n for n in range(2, min(divisor, 64) + 1) if divisor % n == 0]
    fix = (
        f"Set method.{field} to one of {join_names(map(str, sizes_allowed), 8)}."
        if sizes_allowed
        else "Leave out these modules with --target-modules."
    )
    dims = "inputs or outputs" if outputs else "inputs"
    raise ConfigError(
        f"method.{field} {size} does not divide the {dims} of {len(invalid):,} of {len(sizes):,} "
        f"linear layers, such as {name} ({width:,} wide). {fix}"
    )


# Name suffixes of key, value and fused QKV layers in all families:
_KEY_VALUE = re.compile(
    r"\.(k|v|key|value|k_lin|v_lin|k_proj|v_proj|key_proj|value_proj|qkv_proj|qkv|Wqkv|c_attn"
    r"|query_key_value|attn\.attn\.k|attn\.attn\.v)$"
)
# The second linear layer of a feed-forward, whose input is scaled:
_FEED_FORWARD = re.compile(
    r"(^|\.)(down_proj|fc2|wo|lin2|fc_out|ffn_output|dense_4h_to_h|(mlp|\d+\.mlp)\.(c_proj|Wo)"
    r"|ffn\.lin2|(?<!attention\.)output\.dense)$"
)


def is_feed_forward(name: str) -> bool:
    """Returns whether a module of this (full or suffix) name is a feed-forward's last layer."""
    return _FEED_FORWARD.search(name) is not None


class Ia3(Method):
    """(IA)³: learned vectors that scale keys, values and the inner feed-forward activations."""

    info = single_row(
        "ia3",
        "a factor for each key, value and feed-forward feature",
        MERGES,
        "Liu et al., 2022, arXiv:2205.05638",
        614_400,
    )
    rate = Rates(small=3e-2, large=3e-3, source="T-Few")
    merge_info = MergeInfo(("IA3",), lora_conversion=LoraConversion(error=FULL_RANK))

    def default_target_modules(self, spec: Ia3Spec, model: Any) -> list[str]:
        """Returns the names, sorted, of key, value and last feed-forward layers in all blocks."""
        return sorted(
            name
            for name, module in model.named_modules()
            if re.search(r"\.\d+\.", name)  # inside a numbered block, not in a head
            and hasattr(module, "weight")
            and (_KEY_VALUE.search(name) or is_feed_forward(name))
        )

    def build(self, spec: Ia3Spec, base: Base) -> Any:
        """Returns `peft.IA3Config`."""
        from peft import IA3Config

        return IA3Config(
            **base.shared,
            feedforward_modules=[name for name in base.targets if is_feed_forward(name)],
            fan_in_fan_out=base.fan_in_fan_out,
        )


def vera_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors diag(b) · B, diag(d) · A; InputError if A is not saved."""
    if not {"base_model.vera_A", "base_model.vera_B"} <= set(file.tensors):
        raise InputError(
            "its shared matrices are not in its file (save_projection was off). Load it with PEFT "
            "and save it with save_projection=True"
        )
    shared_a, shared_b = (file.tensors.pop(f"base_model.vera_{x}").double() for x in "AB")
    factors = {}
    for name in file.names("vera_lambda_b"):
        d, b = file.pop(name, "vera_lambda_d", "vera_lambda_b")
        base = file.get_base_tensor(f"{name}.weight").shape
        width = base[1] if base[0] == len(b) else base[0]  # Conv1D weights are (in, out)
        a = d.unsqueeze(-1) * shared_a[:, :width]
        factors[name] = Factors(a, b.unsqueeze(-1) * shared_b[: len(b)])
    file.notes.append("VeRA's vectors multiplied into its shared matrices")
    return factors


def loha_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors of rank r² that equal s · (B₁A₁) ⊙ (B₂A₂)."""
    factors = {}
    for name in file.names("hada_w1_a"):
        b1, a1, b2, a2 = file.pop(name, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        a = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(-1, a1.shape[1])
        b = (b1.unsqueeze(2) * b2.unsqueeze(1)).reshape(len(b1), -1)
        factors[name] = Factors(a, b * _scale(file, name, len(a1)))
    file.notes.append("LoHa's product of two updates multiplied out: rank r²")
    return factors


def lokr_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors s · (B₁ ⊗ B₂) and A₁ ⊗ A₂; LoKr is s · (B₁A₁) ⊗ (B₂A₂)."""
    import torch

    names = {key.rpartition(".lokr_")[0] for key in file.tensors if ".lokr_w" in key}
    factors = {}
    for name in sorted(names):
        (b1, a1), (b2, a2) = (_kronecker_factor(file, name, f"lokr_w{number}") for number in (1, 2))
        scale = _scale(
            file, name, by_pattern(file.config.get("rank_pattern"), name, file.config["r"])
        )
        factors[name] = Factors(torch.kron(a1, a2), torch.kron(b1, b2) * scale)
    file.notes.append("LoKr's Kronecker products multiplied out")
    return factors


def _kronecker_factor(file: AdapterFile, name: str, factor: str) -> tuple[Any, Any]:
    """Returns B and A with B · A = tensor `factor`; if that is saved whole, one is the identity."""
    import torch

    if f"{name}.{factor}" not in file.tensors:
        b, a = file.pop(name, f"{factor}_a", f"{factor}_b")
        return b, a
    (full,) = file.pop(name, factor)
    num_rows, num_columns = full.shape
    if num_rows <= num_columns:
        return torch.eye(num_rows, dtype=torch.float64), full
    return full, torch.eye(num_columns, dtype=torch.float64)


def _scale(file: AdapterFile, name: str, rank: int) -> float:
    return by_pattern(file.config.get("alpha_pattern"), name, file.config["alpha"]) / rank


_LYCORIS_RULES = (
    Rule(
        rows("loha", "lokr"),
        "PEFT does not support its Conv1D layers",
        "Use --method lora.",
        families=CONV1D,
        quants=frozenset({"none"}),
    ),
    Rule(
        rows("loha", "lokr"),
        "PEFT multiplies the update with packed 4-bit weights",
        "Use --quant 8bit, or --method lora.",
        quants=frozenset({"4bit"}),
    ),
)


def miss_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors; `InputError` for `init_weights` "bat", which has none."""
    import torch

    start = file.config.get("init_weights")
    if start == "bat":
        raise InputError("its update depends on the base's weight (init_weights bat). Merge it")
    factors = {}
    for name in file.names("miss_block"):
        (block,) = file.pop(name, "miss_block")
        shape = file.get_base_tensor(f"{name}.weight").shape
        if start == "mini":
            block = block.repeat(1, shape[0] // block.shape[1])
        a = torch.zeros(len(block), shape[1], dtype=torch.float64)
        inputs = torch.arange(shape[1])
        a[inputs % len(block), inputs] = 1
        factors[name] = Factors(a, block.T.contiguous())
    file.notes.append("MiSS's blocks written as sums over the input")
    return factors


class Miss(LinearUpdate):
    """The method MiSS (matrix shard sharing)."""

    def check(self, spec: MissSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if a linear layer has fewer inputs than r."""
        small = {name: fan_in for name, (fan_in, _) in sizes.items() if fan_in < spec.r}
        if small:
            name, width = min(small.items(), key=lambda item: item[1])
            raise ConfigError(
                f"method.r {spec.r} is more than the inputs of {len(small):,} of {len(sizes):,} "
                f"linear layers, such as {name} ({width:,} wide). Set method.r to {width} or less."
            )


def _set_mask(config: Any) -> None:
    config.mask_fn = random_shira_mask


class Shira(LinearUpdate):
    """The method SHiRA (sparse high-rank adapter)."""

    def check(self, spec: ShiraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if a linear layer has fewer than r · (in + out) weights to train."""
        max_ranks = {name: i * o // (i + o) for name, (i, o) in sizes.items()}
        small = [name for name, r in max_ranks.items() if r < spec.r]
        if small:
            raise ConfigError(
                f"method.r {spec.r} is larger than {len(small):,} of {len(sizes):,} linear layers "
                f"allow, such as {small[0]}. Set method.r to {min(max_ranks.values())} or less."
            )

    def build(self, spec: MethodSpec, base: Base) -> Any:
        """Returns `peft.ShiraConfig`."""
        config = super().build(spec, base)
        _set_mask(config)
        return config


def gralora_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors of rank k · r that combine the LoRAs of all k × k blocks.

    PEFT saves A as `(k, in / k, r)`, where each output block has r / k consecutive columns, and B
    as `(k, r, out / k)`.
    """
    import torch

    k, r = int(file.config["gralora_k"]), int(file.config["r"])
    scale = file.config["alpha"] / (r + file.config["hybrid_r"])
    diagonal: Any = torch.block_diag  # untyped
    factors = {}
    for name in file.names("gralora_A"):
        down, up = file.pop(name, "gralora_A", "gralora_B")
        blocks_in = [block.T.reshape(k, r // k, -1) for block in down]  # (output, r / k, in / k)
        a = torch.cat([diagonal(*(block[j] for block in blocks_in)) for j in range(k)])
        b = diagonal(*(block.T for block in up))
        if file.config["hybrid_r"]:
            general = file.pop(name, "gralora_A_general.weight", "gralora_B_general.weight")
            a, b = torch.cat([a, general[0]]), torch.cat([b, general[1]], dim=1)
        factors[name] = Factors(a, b * scale)
    file.notes.append(f"GraLoRA's {k} × {k} blocks written as one product: rank k · r")
    return factors


_FULL_RANK = LoraConversion(error=FULL_RANK)
METHODS: dict[str, Method] = {
    "ia3": Ia3(),
    "vera": LinearUpdate(
        "vera",
        "two vectors per linear layer",
        "Kopiczko et al., 2024, arXiv:2310.11454",
        1_417_216,
        Rates(
            small=5e-2,
            large=4e-3,
            source="within the paper's range on GLUE",
            tokens=1e-1,
            by_architecture={"decoder": 6e-2, "encoder-decoder": 1e-1},
        ),
        LoraConversion(vera_as_lora),
        "VeraConfig",
        config_kwargs={"save_projection": True},
        has_fan_in_fan_out=True,
    ),
    "oft": LinearUpdate(
        "oft",
        "a rotation of the input of every linear layer",
        "Qiu et al., 2023, arXiv:2306.07280; 2025, arXiv:2506.19847",
        17_649_664,
        Rates(small=1e-3, large=3e-4, source="not measured", by_architecture={"decoder": 3e-4}),
        _FULL_RANK,
        "OFTConfig",
        config_kwargs={"r": 0},
        has_fan_in_fan_out=True,
        rules=(_NO_CONV1D,),
        block_size="oft_block_size",
    ),
    "boft": LinearUpdate(
        "boft",
        "a rotation of the input of every linear layer, in butterfly factors",
        "Liu et al., 2024, arXiv:2311.06243",
        5_914_624,
        Rates(small=1e-2, large=4e-4, source="not measured", by_architecture={"decoder": 3e-3}),
        _FULL_RANK,
        "BOFTConfig",
        config_kwargs={"boft_n_butterfly_factor": 1},
        has_fan_in_fan_out=True,
        rules=(_NO_CONV1D,),
        block_size="boft_block_size",
    ),
    "loha": LinearUpdate(
        "loha",
        "an elementwise product of two low-rank updates",
        "Hyeon-Woo et al., 2022, arXiv:2108.06098",
        39_976_960,
        Rates(small=1e-2, large=1e-3, source="not measured"),
        LoraConversion(loha_as_lora),
        "LoHaConfig",
        rules=_LYCORIS_RULES,
    ),
    "lokr": LinearUpdate(
        "lokr",
        "a Kronecker product as update",
        "Yeh et al., 2024, arXiv:2309.14859",
        1_331_200,
        Rates(small=1e-2, large=1e-3, source="not measured"),
        LoraConversion(lokr_as_lora),
        "LoKrConfig",
        rules=_LYCORIS_RULES,
    ),
    "miss": Miss(
        "miss",
        "one matrix per linear layer, applied to sums of inputs",
        "Kang and Yin, 2024, arXiv:2409.15371",
        87_031_808,
        Rates(
            small=3e-4,
            large=1e-4,
            source="PEFT's method comparison",
            by_architecture={"encoder-decoder": 1e-3},
        ),
        LoraConversion(miss_as_lora),
        "MissConfig",
        rules=(_NO_CONV1D,),
    ),
    "shira": Shira(
        "shira",
        "a few randomly chosen weights of every linear layer",
        "Bhardwaj et al., 2024, arXiv:2406.13175",
        79_953_920,
        Rates(small=1e-3, large=3e-4, source="PEFT's method comparison"),
        _FULL_RANK,
        "ShiraConfig",
        rules=(_NO_CONV1D,),
        merge_prepare=_set_mask,
    ),
    "hira": LinearUpdate(
        "hira",
        "a low-rank matrix multiplied elementwise with each weight",
        "Huang et al., 2025, ICLR (openreview TwJrTz9cRS)",
        79_953_920,
        Rates(small=1e-2, large=4.5e-3, source="PEFT's method comparison"),
        _FULL_RANK,
        "HiraConfig",
        has_fan_in_fan_out=True,
    ),
    "gralora": LinearUpdate(
        "gralora",
        "LoRA on each block of each weight",
        "Jung et al., 2025, arXiv:2505.20355",
        79_953_920,
        Rates(small=1e-3, large=2e-4, source="PEFT's method comparison"),
        LoraConversion(gralora_as_lora),
        "GraloraConfig",
        has_fan_in_fan_out=True,
        block_size="gralora_k",
        split_outputs=True,
        is_inplace=True,
    ),
    "c3a": LinearUpdate(
        "c3a",
        "circulant blocks per linear layer",
        "Chen et al., 2024, arXiv:2407.19342",
        101_187_584,
        Rates(small=3e-1, large=3e-1, source="PEFT's method comparison"),
        _FULL_RANK,
        "C3AConfig",
        config_kwargs={"init_weights": True},
        rules=(_NO_CONV1D,),
        block_size="block_size",
        split_outputs=True,
        is_inplace=True,
    ),
}
