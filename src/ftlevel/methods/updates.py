"""Methods that change every linear layer with PEFT's own tuners, except LoRA and AdaLoRA.

Each builds PEFT's config, checks that it fits the layers, and converts adapters to plain LoRA.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ftlevel.config.methods.base import MethodSpec
from ftlevel.config.methods.updates import (
    BoftSpec,
    C3aSpec,
    GraloraSpec,
    Ia3Spec,
    MissSpec,
    OftSpec,
    ShiraSpec,
)
from ftlevel.config.sections import Section
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.methods.base import Base, Merging, Method, whole
from ftlevel.methods.facts import CONV1D, MERGES, Rule, method_facts, rows
from ftlevel.methods.plain_form import FULL_RANK, AdapterFile, Factors, PlainForm, by_pattern
from ftlevel.methods.rates import Rates
from ftlevel.methods.upstream import copy_base_outputs, draw_shira_mask


def config_builder(
    name: str, *, fan_in: bool = False, **fixed: Any
) -> Callable[[MethodSpec, Base], Any]:
    """Return what builds PEFT's config class `name` from a spec, whose fields have PEFT's names.

    `fan_in` passes `fan_in_fan_out`; `fixed` are fields that no spec has.
    """

    def build(spec: MethodSpec, base: Base) -> Any:
        import peft

        own = {field: getattr(spec, field) for field in type(spec).model_fields}
        del own["kind"], own["target_modules"]  # the latter, resolved, is in `shared`
        if "alpha" in own:
            own["alpha"] = whole(own["alpha"])
        more = {"fan_in_fan_out": base.fan_in_fan_out} if fan_in else {}
        return getattr(peft, name)(**base.shared, **own, **more, **fixed)

    return build


def _method(
    kind: str,
    trains: str,
    paper: str,
    llama_7b: int,
    plain_form: PlainForm,
    merge_prepare: Callable[[Any], None] = lambda _: None,
    **more: Any,
) -> Method:
    """Return a method that merges exactly, named as its type in PEFT."""
    merging = Merging((kind.upper(),), prepare=merge_prepare, plain_form=plain_form)
    return Method((method_facts(kind, trains, MERGES, paper, llama_7b),), merging=merging, **more)


LINEARS_ONLY = Rule(
    rows("miss", "shira", "c3a"),
    "its linears are Conv1D, which PEFT does not take here",
    "Use --method lora, or --quant 4bit, which makes them linears.",
    families=CONV1D,
    quants=frozenset({"none"}),
)


def check_divides(
    field: str, size: int, sizes: Mapping[str, tuple[int, int]], *, outputs: bool = False
) -> None:
    """Raise `ConfigError` if `size` does not divide the (in, out) in `sizes`; out if `outputs`."""
    sides = {name: pair if outputs else pair[:1] for name, pair in sizes.items()}
    odd = {name: width for name, pair in sides.items() for width in pair if width % size}
    if not odd:
        return
    name, width = next(iter(odd.items()))
    common = math.gcd(*(width for pair in sides.values() for width in pair))
    fits = [n for n in range(2, min(common, 64) + 1) if common % n == 0]
    way = (
        f"Set method.{field} to one of {join_names(map(str, fits), 8)}."
        if fits
        else "Leave out these modules with --target-modules."
    )
    what = "inputs or outputs" if outputs else "inputs"
    raise ConfigError(
        f"method.{field} {size} does not divide the {what} of {len(odd):,} of {len(sizes):,} "
        f"linears, such as {name} ({width:,} wide). {way}"
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


def find_scaled(spec: Section, model: Any) -> list[str]:
    """Return key, value and second feed-forward layers in the blocks of `model`, sorted."""
    return sorted(
        name
        for name, module in model.named_modules()
        if re.search(r"\.\d+\.", name)  # inside a numbered block, not in a head
        and hasattr(module, "weight")
        and (_KEY_VALUE.search(name) or is_feed_forward(name))
    )


def is_feed_forward(name: str) -> bool:
    """Return whether `name`, full or shortened, is a second feed-forward layer."""
    return _FEED_FORWARD.search(name) is not None


def build_ia3(spec: Ia3Spec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    from peft import IA3Config

    return IA3Config(
        **base.shared,
        feedforward_modules=[name for name in base.targets if is_feed_forward(name)],
        fan_in_fan_out=base.fan_in_fan_out,
    )


_IA3 = _method(
    "ia3",
    "a factor for each key, value and inner feature",
    "Liu et al., 2022, arXiv:2205.05638",
    614_400,
    PlainForm(never=FULL_RANK),
    rate=Rates(narrow=3e-2, wide=3e-3, source="T-Few"),
    build=build_ia3,
    find_targets=find_scaled,
)


def vera_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return diag(b) · B · diag(d) · A per module; raises `InputError` without shared A and B."""
    if not {"base_model.vera_A", "base_model.vera_B"} <= set(file.tensors):
        raise InputError(
            "its shared matrices are not in its file (save_projection was off). Load it with PEFT "
            "and save it with save_projection=True"
        )
    shared_a, shared_b = (file.tensors.pop(f"base_model.vera_{x}").double() for x in "AB")
    found = {}
    for name in file.names("vera_lambda_b"):
        d, b = file.take(name, "vera_lambda_d", "vera_lambda_b")
        base = file.read_base(f"{name}.weight").shape
        width = base[1] if base[0] == len(b) else base[0]  # Conv1D weights are (in, out)
        a = d.unsqueeze(-1) * shared_a[:, :width]
        found[name] = Factors(a, b.unsqueeze(-1) * shared_b[: len(b)])
    file.said.append("VeRA's vectors multiplied into its shared matrices")
    return found


_VERA = _method(
    "vera",
    "two vectors per linear layer",
    "Kopiczko et al., 2024, arXiv:2310.11454",
    1_417_216,
    PlainForm(vera_as_lora),
    rate=Rates(
        narrow=5e-2,
        wide=4e-3,
        source="within the paper's range on GLUE",
        tokens=1e-1,
        kinds={"decoder": 6e-2, "encoder-decoder": 1e-1},
    ),
    build=config_builder("VeraConfig", save_projection=True, fan_in=True),
)


def check_oft(spec: OftSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that the block size divides every linear layer; PEFT would adjust it with a warning."""
    check_divides("oft_block_size", spec.oft_block_size, sizes)


def check_boft(spec: BoftSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that the block size divides every linear layer."""
    check_divides("boft_block_size", spec.boft_block_size, sizes)


_ORTHOGONAL_RULES = (
    Rule(
        rows("oft", "boft"),
        "its linears are Conv1D, which PEFT has no rotation for",
        "Use --method lora, or --quant 4bit, which makes them linears.",
        families=CONV1D,
        quants=frozenset({"none"}),
    ),
)
_OFT = _method(
    "oft",
    "a rotation of every linear's input",
    "Qiu et al., 2023, arXiv:2306.07280; 2025, arXiv:2506.19847",
    17_649_664,
    PlainForm(never=FULL_RANK),
    rate=Rates(narrow=1e-3, wide=3e-4, source="not measured", kinds={"decoder": 3e-4}),
    build=config_builder("OFTConfig", r=0, fan_in=True),
    rules=_ORTHOGONAL_RULES,
    check=check_oft,
)
_BOFT = _method(
    "boft",
    "a rotation of every linear's input, in small blocks",
    "Liu et al., 2024, arXiv:2311.06243",
    5_914_624,
    PlainForm(never=FULL_RANK),
    rate=Rates(narrow=1e-2, wide=4e-4, source="not measured", kinds={"decoder": 3e-3}),
    build=config_builder("BOFTConfig", boft_n_butterfly_factor=1, fan_in=True),
    rules=_ORTHOGONAL_RULES,
    check=check_boft,
)


def loha_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return s · (B₁A₁) ∘ (B₂A₂) of each module as one product of rank r²."""
    found = {}
    for name in file.names("hada_w1_a"):
        parts = file.take(name, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        b1, a1, b2, a2 = parts
        a = (a1.unsqueeze(1) * a2.unsqueeze(0)).reshape(-1, a1.shape[1])
        b = (b1.unsqueeze(2) * b2.unsqueeze(1)).reshape(len(b1), -1)
        found[name] = Factors(a, b * _scale(file, name, len(a1)))
    file.said.append("LoHa's product of two updates multiplied out: rank r²")
    return found


def lokr_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return s · W₁ ⊗ W₂ of each module as Kronecker products of the factors."""
    import torch

    names = {key.rpartition(".lokr_")[0] for key in file.tensors if ".lokr_w" in key}
    found = {}
    for name in sorted(names):
        (b1, a1), (b2, a2) = (_sides(file, name, f"lokr_w{number}") for number in (1, 2))
        scale = _scale(
            file, name, by_pattern(file.config.get("rank_pattern"), name, file.config["r"])
        )
        found[name] = Factors(torch.kron(a1, a2), torch.kron(b1, b2) * scale)
    file.said.append("LoKr's Kronecker products multiplied out")
    return found


def _sides(file: AdapterFile, name: str, which: str) -> tuple[Any, Any]:
    """Return B and A of one Kronecker factor; for an undecomposed factor one is the identity."""
    import torch

    if f"{name}.{which}" not in file.tensors:
        b, a = file.take(name, f"{which}_a", f"{which}_b")
        return b, a
    (whole_side,) = file.take(name, which)
    rows, columns = whole_side.shape
    if rows <= columns:
        return torch.eye(rows, dtype=torch.float64), whole_side
    return whole_side, torch.eye(columns, dtype=torch.float64)


def _scale(file: AdapterFile, name: str, rank: int) -> float:
    return by_pattern(file.config.get("alpha_pattern"), name, file.config["alpha"]) / rank


_LYCORIS_RULES = (
    Rule(
        rows("loha", "lokr"),
        "its linears are Conv1D, which PEFT does not take here",
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
_LOHA = _method(
    "loha",
    "a product of two low-rank updates",
    "Hyeon-Woo et al., 2022, arXiv:2108.06098",
    39_976_960,
    PlainForm(loha_as_lora),
    rate=Rates(narrow=1e-2, wide=1e-3, source="not measured"),
    build=config_builder("LoHaConfig"),
    rules=_LYCORIS_RULES,
)
_LOKR = _method(
    "lokr",
    "a Kronecker product as update",
    "Yeh et al., 2024, arXiv:2309.14859",
    1_331_200,
    PlainForm(lokr_as_lora),
    rate=Rates(narrow=1e-2, wide=1e-3, source="not measured"),
    build=config_builder("LoKrConfig"),
    rules=_LYCORIS_RULES,
)


def check_miss(spec: MissSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ConfigError` if a linear layer has fewer inputs than r."""
    narrow = {name: fan_in for name, (fan_in, _) in sizes.items() if fan_in < spec.r}
    if narrow:
        name, width = min(narrow.items(), key=lambda item: item[1])
        raise ConfigError(
            f"method.r {spec.r} is more than the inputs of {len(narrow):,} of {len(sizes):,} "
            f"linears, such as {name} ({width:,} wide). Set method.r to {width} or less."
        )


def miss_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return MiSS as LoRA, where A sums every r-th input; raises `InputError` for `bat`."""
    import torch

    start = file.config.get("init_weights")
    if start == "bat":
        raise InputError("its update depends on the base's weight (init_weights bat). Merge it")
    found = {}
    for name in file.names("miss_block"):
        (block,) = file.take(name, "miss_block")
        shape = file.read_base(f"{name}.weight").shape
        if start == "mini":
            block = block.repeat(1, shape[0] // block.shape[1])
        a = torch.zeros(len(block), shape[1], dtype=torch.float64)
        columns = torch.arange(shape[1])
        a[columns % len(block), columns] = 1
        found[name] = Factors(a, block.T.contiguous())
    file.said.append("MiSS's blocks written as sums over the input")
    return found


_MISS = _method(
    "miss",
    "one matrix per linear layer, for summed inputs",
    "Kang and Yin, 2024, arXiv:2409.15371",
    87_031_808,
    PlainForm(miss_as_lora),
    rate=Rates(
        narrow=3e-4, wide=1e-4, source="PEFT's method comparison", kinds={"encoder-decoder": 1e-3}
    ),
    build=config_builder("MissConfig"),
    rules=(LINEARS_ONLY,),
    check=check_miss,
)


def build_shira(spec: ShiraSpec, base: Base) -> Any:
    """Return PEFT's config for `spec` on `base`."""
    config = config_builder("ShiraConfig")(spec, base)
    forget_mask(config)
    return config


def forget_mask(config: Any) -> None:
    """Make `config` (mutated) skip random masks for meta weights."""
    config.mask_fn = draw_shira_mask


def check_shira(spec: ShiraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `ConfigError` if a linear layer has too few weights for r."""
    room = {
        name: fan_in * fan_out // (fan_in + fan_out) for name, (fan_in, fan_out) in sizes.items()
    }
    small = [name for name, most in room.items() if most < spec.r]
    if small:
        raise ConfigError(
            f"method.r {spec.r} is larger than {len(small):,} of {len(sizes):,} linear layers "
            f"allow, such as {small[0]}. Set method.r to {min(room.values())} or less."
        )


_SHIRA = _method(
    "shira",
    "a few weights of every linear, drawn at random",
    "Bhardwaj et al., 2024, arXiv:2406.13175",
    79_953_920,
    PlainForm(never=FULL_RANK),
    rate=Rates(narrow=1e-3, wide=3e-4, source="PEFT's method comparison"),
    build=build_shira,
    rules=(LINEARS_ONLY,),
    check=check_shira,
    merge_prepare=forget_mask,
)


_HIRA = _method(
    "hira",
    "a low-rank factor of every weight",
    "Huang et al., 2025, ICLR (openreview TwJrTz9cRS)",
    79_953_920,
    PlainForm(never=FULL_RANK),
    rate=Rates(narrow=1e-2, wide=4.5e-3, source="PEFT's method comparison"),
    build=config_builder("HiraConfig", fan_in=True),
)


def check_gralora(spec: GraloraSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that every linear layer can be split into the blocks."""
    check_divides("gralora_k", spec.gralora_k, sizes, outputs=True)


def gralora_as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Return the LoRAs of all blocks of each module as one product, of rank k · r.

    In PEFT's file A is `(k, in / k, r)`, where the j-th r / k columns belong to output block j;
    B is `(k, r, out / k)`.
    """
    import torch

    k, r = int(file.config["gralora_k"]), int(file.config["r"])
    scale = file.config["alpha"] / (r + file.config["hybrid_r"])
    diagonal: Any = torch.block_diag  # untyped
    found = {}
    for name in file.names("gralora_A"):
        down, up = file.take(name, "gralora_A", "gralora_B")
        blocks_in = [block.T.reshape(k, r // k, -1) for block in down]  # (output, r / k, in / k)
        a = torch.cat([diagonal(*(block[j] for block in blocks_in)) for j in range(k)])
        b = diagonal(*(block.T for block in up))
        if file.config["hybrid_r"]:
            more = file.take(name, "gralora_A_general.weight", "gralora_B_general.weight")
            a, b = torch.cat([a, more[0]]), torch.cat([b, more[1]], dim=1)
        found[name] = Factors(a, b * scale)
    file.said.append(f"GraLoRA's {k} × {k} blocks written as one product: rank k · r")
    return found


_GRALORA = _method(
    "gralora",
    "LoRA on each of the blocks of every weight",
    "Jung et al., 2025, arXiv:2505.20355",
    79_953_920,
    PlainForm(gralora_as_lora),
    rate=Rates(narrow=1e-3, wide=2e-4, source="PEFT's method comparison"),
    build=config_builder("GraloraConfig", fan_in=True),
    check=check_gralora,
    prepare=copy_base_outputs,
)


def check_c3a(spec: C3aSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Check that the block size divides every linear layer."""
    check_divides("block_size", spec.block_size, sizes, outputs=True)


_C3A = _method(
    "c3a",
    "circulant blocks per linear layer",
    "Chen et al., 2024, arXiv:2407.19342",
    101_187_584,
    PlainForm(never=FULL_RANK),
    rate=Rates(narrow=3e-1, wide=3e-1, source="PEFT's method comparison"),
    build=config_builder("C3AConfig", init_weights=True),
    rules=(LINEARS_ONLY,),
    check=check_c3a,
    prepare=copy_base_outputs,
)


METHODS = {
    "ia3": _IA3,
    "vera": _VERA,
    "oft": _OFT,
    "boft": _BOFT,
    "loha": _LOHA,
    "lokr": _LOKR,
    "miss": _MISS,
    "shira": _SHIRA,
    "hira": _HIRA,
    "gralora": _GRALORA,
    "c3a": _C3A,
}
