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
from ftlevel.methods.base import Base, Merging, Method, as_int
from ftlevel.methods.facts import CONV1D, MERGES, Rule, rows, single_row
from ftlevel.methods.plain_form import FULL_RANK, AdapterFile, Factors, PlainForm, by_pattern
from ftlevel.methods.rates import Rates
from ftlevel.methods.upstream import copy_base_outputs, draw_shira_mask


class LinearUpdate(Method):
    """Method of PEFT that changes every linear layer and merges exactly.

    Its PEFT type is its name in capitals; the fields of its spec are named as in PEFT.

    Attributes:
        config_class: name of the PEFT config class.
        passes_fan_in: whether the PEFT config class has `fan_in_fan_out`.
        fixed: values of PEFT config fields that the spec does not have.
        block_size: spec field that must divide the inputs of every layer; empty for none.
        divides_outputs: whether the block size must divide the outputs, too.
        adds_in_place: whether PEFT layers add to the base layer's output in place.
    """

    def __init__(
        self,
        kind: str,
        trains: str,
        paper: str,
        llama_7b: int,
        rate: Rates,
        plain_form: PlainForm,
        config_class: str,
        *,
        rules: tuple[Rule, ...] = (),
        passes_fan_in: bool = False,
        fixed: Mapping[str, Any] | None = None,
        block_size: str = "",
        divides_outputs: bool = False,
        adds_in_place: bool = False,
        merge_prepare: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self.facts = single_row(kind, trains, MERGES, paper, llama_7b)
        self.rate, self.rules = rate, rules
        self.merging = Merging((kind.upper(),), prepare=merge_prepare, plain_form=plain_form)
        self.config_class, self.passes_fan_in = config_class, passes_fan_in
        self.fixed = fixed or {}
        self.block_size, self.divides_outputs = block_size, divides_outputs
        self.adds_in_place = adds_in_place

    def check(self, spec: Any, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if the block size does not divide a layer; PEFT may adjust it."""
        if self.block_size:
            size = getattr(spec, self.block_size)
            check_divides(self.block_size, size, sizes, outputs=self.divides_outputs)

    def build(self, spec: MethodSpec, base: Base) -> Any:
        """Returns the method's `PeftConfig` with all fields of `spec`."""
        import peft

        kwargs = {name: getattr(spec, name) for name in type(spec).model_fields}
        del kwargs["kind"], kwargs["target_modules"]  # the latter, resolved, is in `shared`
        if "alpha" in kwargs:
            kwargs["alpha"] = as_int(kwargs["alpha"])
        if self.passes_fan_in:
            kwargs["fan_in_fan_out"] = base.fan_in_fan_out
        return getattr(peft, self.config_class)(**base.shared, **kwargs, **self.fixed)

    def prepare(self, model: Any) -> None:
        """Make layers of `model` (modified) copy the base's output before adding to it in place."""
        if self.adds_in_place:
            copy_base_outputs(model)


LINEARS_ONLY = Rule(
    rows("miss", "shira", "c3a"),
    "PEFT does not support its Conv1D layers",
    "Use --method lora, or --quant 4bit, which replaces Conv1D by linear layers.",
    families=CONV1D,
    quants=frozenset({"none"}),
)


def check_divides(
    field: str, size: int, sizes: Mapping[str, tuple[int, int]], *, outputs: bool = False
) -> None:
    """Raise `ConfigError` unless `size` divides all inputs (if `outputs`, all outputs too)."""
    sides = {name: pair if outputs else pair[:1] for name, pair in sizes.items()}
    misfits = {name: width for name, pair in sides.items() for width in pair if width % size}
    if not misfits:
        return
    name, width = next(iter(misfits.items()))
    common = math.gcd(*(width for pair in sides.values() for width in pair))
    fits = [n for n in range(2, min(common, 64) + 1) if common % n == 0]
    advice = (
        f"Set method.{field} to one of {join_names(map(str, fits), 8)}."
        if fits
        else "Leave out these modules with --target-modules."
    )
    dims = "inputs or outputs" if outputs else "inputs"
    raise ConfigError(
        f"method.{field} {size} does not divide the {dims} of {len(misfits):,} of {len(sizes):,} "
        f"linears, such as {name} ({width:,} wide). {advice}"
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
    """Returns whether `name`, full or shortened, is the second linear layer of a feed-forward."""
    return _FEED_FORWARD.search(name) is not None


class Ia3(Method):
    """(IA)³."""

    facts = single_row(
        "ia3",
        "a factor for each key, value and feed-forward feature",
        MERGES,
        "Liu et al., 2022, arXiv:2205.05638",
        614_400,
    )
    rate = Rates(narrow=3e-2, wide=3e-3, source="T-Few")
    merging = Merging(("IA3",), plain_form=PlainForm(never=FULL_RANK))

    def find_targets(self, spec: Ia3Spec, model: Any) -> list[str]:
        """Returns key, value and second feed-forward layers in the blocks of `model`, sorted."""
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
    """Returns diag(b) · B · diag(d) · A per module; raises `InputError` if A and B are missing."""
    if not {"base_model.vera_A", "base_model.vera_B"} <= set(file.tensors):
        raise InputError(
            "its shared matrices are not in its file (save_projection was off). Load it with PEFT "
            "and save it with save_projection=True"
        )
    shared_a, shared_b = (file.tensors.pop(f"base_model.vera_{x}").double() for x in "AB")
    updates = {}
    for name in file.names("vera_lambda_b"):
        d, b = file.take(name, "vera_lambda_d", "vera_lambda_b")
        base = file.read_base(f"{name}.weight").shape
        width = base[1] if base[0] == len(b) else base[0]  # Conv1D weights are (in, out)
        a = d.unsqueeze(-1) * shared_a[:, :width]
        updates[name] = Factors(a, b.unsqueeze(-1) * shared_b[: len(b)])
    file.said.append("VeRA's vectors multiplied into its shared matrices")
    return updates


_ORTHOGONAL_RULES = (
    Rule(
        rows("oft", "boft"),
        "PEFT cannot rotate its Conv1D layers",
        "Use --method lora, or --quant 4bit, which replaces Conv1D by linear layers.",
        families=CONV1D,
        quants=frozenset({"none"}),
    ),
)


def loha_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns s · (B₁A₁) ∘ (B₂A₂) of each module as one product of rank r²."""
    updates = {}
    for name in file.names("hada_w1_a"):
        parts = file.take(name, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        b1, a1, b2, a2 = parts
        a = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(-1, a1.shape[1])
        b = (b1.unsqueeze(2) * b2.unsqueeze(1)).reshape(len(b1), -1)
        updates[name] = Factors(a, b * _scale(file, name, len(a1)))
    file.said.append("LoHa's product of two updates multiplied out: rank r²")
    return updates


def lokr_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns s · W₁ ⊗ W₂ = s · (B₁ ⊗ B₂) · (A₁ ⊗ A₂) of each module, where Wᵢ = Bᵢ · Aᵢ."""
    import torch

    names = {key.rpartition(".lokr_")[0] for key in file.tensors if ".lokr_w" in key}
    updates = {}
    for name in sorted(names):
        (b1, a1), (b2, a2) = (_sides(file, name, f"lokr_w{number}") for number in (1, 2))
        scale = _scale(
            file, name, by_pattern(file.config.get("rank_pattern"), name, file.config["r"])
        )
        updates[name] = Factors(torch.kron(a1, a2), torch.kron(b1, b2) * scale)
    file.said.append("LoKr's Kronecker products multiplied out")
    return updates


def _sides(file: AdapterFile, name: str, factor: str) -> tuple[Any, Any]:
    """Returns B and A of one Kronecker factor; if it is not decomposed, one is the identity."""
    import torch

    if f"{name}.{factor}" not in file.tensors:
        b, a = file.take(name, f"{factor}_a", f"{factor}_b")
        return b, a
    (full,) = file.take(name, factor)
    rows, columns = full.shape
    if rows <= columns:
        return torch.eye(rows, dtype=torch.float64), full
    return full, torch.eye(columns, dtype=torch.float64)


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
    """Returns MiSS as LoRA, where A sums every r-th input; raises `InputError` for init "bat"."""
    import torch

    start = file.config.get("init_weights")
    if start == "bat":
        raise InputError("its update depends on the base's weight (init_weights bat). Merge it")
    updates = {}
    for name in file.names("miss_block"):
        (block,) = file.take(name, "miss_block")
        shape = file.read_base(f"{name}.weight").shape
        if start == "mini":
            block = block.repeat(1, shape[0] // block.shape[1])
        a = torch.zeros(len(block), shape[1], dtype=torch.float64)
        columns = torch.arange(shape[1])
        a[columns % len(block), columns] = 1
        updates[name] = Factors(a, block.T.contiguous())
    file.said.append("MiSS's blocks written as sums over the input")
    return updates


class Miss(LinearUpdate):
    """MiSS."""

    def check(self, spec: MissSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if a linear layer has fewer inputs than r."""
        narrow = {name: fan_in for name, (fan_in, _) in sizes.items() if fan_in < spec.r}
        if narrow:
            name, width = min(narrow.items(), key=lambda item: item[1])
            raise ConfigError(
                f"method.r {spec.r} is more than the inputs of {len(narrow):,} of {len(sizes):,} "
                f"linears, such as {name} ({width:,} wide). Set method.r to {width} or less."
            )


def _set_mask(config: Any) -> None:
    """Make `config` (modified) use `draw_shira_mask`, which also supports meta weights."""
    config.mask_fn = draw_shira_mask


class Shira(LinearUpdate):
    """SHiRA."""

    def check(self, spec: ShiraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `ConfigError` if a linear layer has too few weights for r."""
        largest = {name: i * o // (i + o) for name, (i, o) in sizes.items()}
        small = [name for name, r in largest.items() if r < spec.r]
        if small:
            raise ConfigError(
                f"method.r {spec.r} is larger than {len(small):,} of {len(sizes):,} linear layers "
                f"allow, such as {small[0]}. Set method.r to {min(largest.values())} or less."
            )

    def build(self, spec: MethodSpec, base: Base) -> Any:
        """Returns `peft.ShiraConfig`."""
        config = super().build(spec, base)
        _set_mask(config)
        return config


def gralora_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns the LoRAs of all blocks of each module as one product, of rank k · r.

    In PEFT's file A is `(k, in / k, r)`: each output block has r / k consecutive columns. B is `(k,
    r, out / k)`.
    """
    import torch

    k, r = int(file.config["gralora_k"]), int(file.config["r"])
    scale = file.config["alpha"] / (r + file.config["hybrid_r"])
    diagonal: Any = torch.block_diag  # untyped
    updates = {}
    for name in file.names("gralora_A"):
        down, up = file.take(name, "gralora_A", "gralora_B")
        blocks_in = [block.T.reshape(k, r // k, -1) for block in down]  # (output, r / k, in / k)
        a = torch.cat([diagonal(*(block[j] for block in blocks_in)) for j in range(k)])
        b = diagonal(*(block.T for block in up))
        if file.config["hybrid_r"]:
            general = file.take(name, "gralora_A_general.weight", "gralora_B_general.weight")
            a, b = torch.cat([a, general[0]]), torch.cat([b, general[1]], dim=1)
        updates[name] = Factors(a, b * scale)
    file.said.append(f"GraLoRA's {k} × {k} blocks written as one product: rank k · r")
    return updates


_FULL_RANK = PlainForm(never=FULL_RANK)
METHODS: dict[str, Method] = {
    "ia3": Ia3(),
    "vera": LinearUpdate(
        "vera",
        "two vectors per linear layer",
        "Kopiczko et al., 2024, arXiv:2310.11454",
        1_417_216,
        Rates(
            narrow=5e-2,
            wide=4e-3,
            source="within the paper's range on GLUE",
            tokens=1e-1,
            kinds={"decoder": 6e-2, "encoder-decoder": 1e-1},
        ),
        PlainForm(vera_as_lora),
        "VeraConfig",
        fixed={"save_projection": True},
        passes_fan_in=True,
    ),
    "oft": LinearUpdate(
        "oft",
        "a rotation of the input of every linear layer",
        "Qiu et al., 2023, arXiv:2306.07280; 2025, arXiv:2506.19847",
        17_649_664,
        Rates(narrow=1e-3, wide=3e-4, source="not measured", kinds={"decoder": 3e-4}),
        _FULL_RANK,
        "OFTConfig",
        fixed={"r": 0},
        passes_fan_in=True,
        rules=_ORTHOGONAL_RULES,
        block_size="oft_block_size",
    ),
    "boft": LinearUpdate(
        "boft",
        "a rotation of the input of every linear layer, in butterfly factors",
        "Liu et al., 2024, arXiv:2311.06243",
        5_914_624,
        Rates(narrow=1e-2, wide=4e-4, source="not measured", kinds={"decoder": 3e-3}),
        _FULL_RANK,
        "BOFTConfig",
        fixed={"boft_n_butterfly_factor": 1},
        passes_fan_in=True,
        rules=_ORTHOGONAL_RULES,
        block_size="boft_block_size",
    ),
    "loha": LinearUpdate(
        "loha",
        "an elementwise product of two low-rank updates",
        "Hyeon-Woo et al., 2022, arXiv:2108.06098",
        39_976_960,
        Rates(narrow=1e-2, wide=1e-3, source="not measured"),
        PlainForm(loha_as_lora),
        "LoHaConfig",
        rules=_LYCORIS_RULES,
    ),
    "lokr": LinearUpdate(
        "lokr",
        "a Kronecker product as update",
        "Yeh et al., 2024, arXiv:2309.14859",
        1_331_200,
        Rates(narrow=1e-2, wide=1e-3, source="not measured"),
        PlainForm(lokr_as_lora),
        "LoKrConfig",
        rules=_LYCORIS_RULES,
    ),
    "miss": Miss(
        "miss",
        "one matrix per linear layer, applied to sums of inputs",
        "Kang and Yin, 2024, arXiv:2409.15371",
        87_031_808,
        Rates(
            narrow=3e-4,
            wide=1e-4,
            source="PEFT's method comparison",
            kinds={"encoder-decoder": 1e-3},
        ),
        PlainForm(miss_as_lora),
        "MissConfig",
        rules=(LINEARS_ONLY,),
    ),
    "shira": Shira(
        "shira",
        "a few randomly chosen weights of every linear layer",
        "Bhardwaj et al., 2024, arXiv:2406.13175",
        79_953_920,
        Rates(narrow=1e-3, wide=3e-4, source="PEFT's method comparison"),
        _FULL_RANK,
        "ShiraConfig",
        rules=(LINEARS_ONLY,),
        merge_prepare=_set_mask,
    ),
    "hira": LinearUpdate(
        "hira",
        "a low-rank matrix multiplied elementwise with each weight",
        "Huang et al., 2025, ICLR (openreview TwJrTz9cRS)",
        79_953_920,
        Rates(narrow=1e-2, wide=4.5e-3, source="PEFT's method comparison"),
        _FULL_RANK,
        "HiraConfig",
        passes_fan_in=True,
    ),
    "gralora": LinearUpdate(
        "gralora",
        "LoRA on each block of each weight",
        "Jung et al., 2025, arXiv:2505.20355",
        79_953_920,
        Rates(narrow=1e-3, wide=2e-4, source="PEFT's method comparison"),
        PlainForm(gralora_as_lora),
        "GraloraConfig",
        passes_fan_in=True,
        block_size="gralora_k",
        divides_outputs=True,
        adds_in_place=True,
    ),
    "c3a": LinearUpdate(
        "c3a",
        "circulant blocks per linear layer",
        "Chen et al., 2024, arXiv:2407.19342",
        101_187_584,
        Rates(narrow=3e-1, wide=3e-1, source="PEFT's method comparison"),
        _FULL_RANK,
        "C3AConfig",
        fixed={"init_weights": True},
        rules=(LINEARS_ONLY,),
        block_size="block_size",
        divides_outputs=True,
        adds_in_place=True,
    ),
}
