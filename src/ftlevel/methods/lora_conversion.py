"""Conversion of adapters to plain LoRA on the unchanged base: ΔW = B · A, with all scales in B.

    LoRA:  ΔW = s · B · A,  s = alpha / r, or alpha / √r with rsLoRA (Kalajdzievski, 2023)

With PiSSA or OLoRA the base is W − s · B₀A₀, so the update of W is s · (BA − B₀A₀), of rank 2r. A
trained embedding row is a one-hot row in A and the row's change in B; a tied output layer gets the
transpose. Other methods are converted in their own modules.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.methods.lora import BASE_MODIFYING_INITS
from ftlevel.errors import InputError, join_names
from ftlevel.methods.upstream import pattern_of

PREFIX = "base_model.model."
"""PEFT's prefix of module names in the base."""
OUTPUT_LAYERS = ("lm_head", "embed_out")
"""Name suffixes of output layers."""


@dataclass(frozen=True)
class Factors:
    """LoRA factors of one module in float64: the update of its weight is B · A.

    `a` is `(r, in)`, or `(r, vocab)` for an embedding; `b` is `(out, r)`.
    """

    a: Any
    b: Any
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """LoRA rank r of the update."""
        return int(self.a.shape[0])

    def padded(self, rank: int) -> Factors:
        """Returns the same update with `a` and `b` zero-padded to `rank`."""
        import torch

        num_zeros = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(num_zeros, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], num_zeros)], dim=1)
        return Factors(a, b, self.is_embedding)


@dataclass
class AdapterFile:
    """Content of a saved adapter that a `LoraConversion` converts step by step.

    Attributes:
        config: the content of adapter_config.json.
        tensors: tensors by name that are not converted yet; those that remain are unsupported.
        get_base_tensor: returns a tensor of the base model by name.
        tied: output layers that share the weight of an embedding, by name of the embedding.
        notes: what the conversion changed, for the user.
    """

    config: Mapping[str, Any]
    tensors: dict[str, Any]
    get_base_tensor: Callable[[str], Any]
    tied: Mapping[str, list[str]]
    notes: list[str] = field(default_factory=list)

    def names(self, end: str) -> list[str]:
        """Returns the names of the modules that have a tensor named `end` in `tensors`."""
        return [key.removesuffix(f".{end}") for key in self.tensors if key.endswith(f".{end}")]

    def pop(self, name: str, *ends: str) -> list[Any]:
        """Remove the tensors `ends` of module `name` from `tensors`; returns them in float64.

        Raises `InputError` if one is missing.
        """
        missing = [end for end in ends if f"{name}.{end}" not in self.tensors]
        if missing:
            raise InputError(f"its file has no {name}.{missing[0]}. Is the copy incomplete?")
        return [self.tensors.pop(f"{name}.{end}").double() for end in ends]


AsLora = Callable[[AdapterFile], dict[str, Factors]]
"""Function that converts a saved adapter to `Factors` by module name; raises `InputError`."""


@dataclass(frozen=True)
class LoraConversion:
    """How a method's adapters are converted to plain LoRA.

    Attributes:
        from_file: converts the saved tensors; if None, the layers of a loaded model are converted.
        error: why no low-rank LoRA is equivalent; empty if one may be.
    """

    from_file: AsLora | None = None
    error: str = ""


FULL_RANK = "changes every weight by a matrix of full rank, which LoRA cannot represent. Merge it"


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Returns the value of the first regular expression that matches `name`, else `default`."""
    return (patterns or {}).get(pattern_of(patterns or {}, name), default)


def format_range(values: set[Any]) -> str:
    """Returns minimum and maximum as text, such as `0.5 to 5.66`, or the only value."""
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


_NOT_LORA = {
    "use_dora": "DoRA scales each row of the merged weight by a norm of it",
    "lora_bias": "B has a bias",
    "use_qalora": "QA-LoRA pools its input",
    "use_bdlora": "its matrices are in blocks for several devices",
    "kasa_config": "KaSA takes singular values out of the base",
    "monteclora_config": "its weights are random",
    "arrow_config": "it routes each token among adapters",
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts tensors of experts, for which plain LoRA has no names",
    "megatron_config": "it is laid out for Megatron",
}
_UNSAVED_INITS = {"corda": "statistics of activations", "lora_ga": "gradients of the base"}


def get_unsaved_error(init: Any) -> str:
    """Returns why PEFT's `init_lora_weights` cannot be repeated, and a fix; "" if it can be."""
    if (source := _UNSAVED_INITS.get(str(init).lower())) is None:
        return ""
    return (
        f"it was initialized by {init} from {source}, which its file lacks, so PEFT cannot load it "
        "either. Save it again with path_initial_model_for_weight_conversion of save_pretrained"
    )


_LOFTQ = (
    "it was initialized with LoftQ on the 4-bit rounding of the base, and the difference has full "
    "rank: serve that base, or merge into it"
)
_TOKENS = "token_adapter.trainable_tokens_delta"


def convert_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → LoRA factors; raises `InputError` for unsupported LoRA variants."""
    _raise_unless_lora(file)
    factors = {
        name: _fold(file, name, "lora_A.weight", "lora_B.weight")
        for name in file.names("lora_A.weight")
    }
    factors |= {
        name: _fold(file, name, "lora_embedding_A", "lora_embedding_B")
        for name in file.names("lora_embedding_A")
    }
    _note_scale(file, factors)
    start = str(file.config.get("init_lora_weights")).lower()
    if start.startswith(BASE_MODIFYING_INITS):
        factors = {
            name: _relative_to_original(file, name, update) for name, update in factors.items()
        }
        word = "OLoRA" if start == "olora" else "PiSSA"
        file.notes.append(f"base moved by {word}: rank {_ranks(factors)} on the original")
    return factors | convert_token_rows(file, _TOKENS, file.config.get("trainable_token_indices"))


def _raise_unless_lora(file: AdapterFile) -> None:
    config = file.config
    problems = [f"{key} is set: {message}" for key, message in _NOT_LORA.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append("bias is set: biases of the base were trained")
    if problems:
        raise InputError(f"{problems[0]}. Merge it")
    start = str(config.get("init_lora_weights")).lower()
    if start == "loftq":
        raise InputError(_LOFTQ)
    if message := get_unsaved_error(start):
        raise InputError(message)
    tied_names = [name for name in file.names("lora_embedding_A") if file.tied.get(name)]
    if tied_names and config.get("ensure_weight_tying"):
        raise InputError(
            f"{tied_names[0]} was adapted together with the output layer that shares its weight. "
            "Merge it"
        )


def _fold(file: AdapterFile, name: str, first: str, second: str) -> Factors:
    a, b = file.pop(name, first, second)
    if a.dim() != 2:
        raise InputError(f"{name} is a convolution. Merge it")
    return Factors(a, b * get_scale(file.config, name, len(a)), first == "lora_embedding_A")


def get_scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Returns the LoRA scale of module `name`: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    alpha = by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _note_scale(file: AdapterFile, factors: dict[str, Factors]) -> None:
    scales = {get_scale(file.config, name, update.rank) for name, update in factors.items()}
    variants = [
        word
        for word, key in (
            ("rsLoRA", "use_rslora"),
            ("alpha_pattern", "alpha_pattern"),
            ("rank_pattern", "rank_pattern"),
        )
        if file.config.get(key)
    ]
    if scales and scales != {1.0}:
        message = " and ".join(variants) or "lora_alpha / r"
        file.notes.append(f"scale {format_range(scales)} ({message}) folded into B")


def _ranks(factors: dict[str, Factors]) -> str:
    return join_names(map(str, sorted({update.rank for update in factors.values()})), 4)


def _relative_to_original(file: AdapterFile, name: str, update: Factors) -> Factors:
    """Returns `update` − s · B₀A₀ (initial factors): the update of the weight before PiSSA."""
    import torch
    from peft import LoraConfig, get_peft_model

    weight = file.get_base_tensor(f"{name}.weight").float()
    if file.config.get("fan_in_fan_out"):  # a Conv1D, (in, out)
        weight = weight.T
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    scale = get_scale(file.config, name, update.rank)
    lora_config = LoraConfig(
        r=update.rank,
        lora_alpha=scale * update.rank,
        target_modules=["linear"],
        init_lora_weights=file.config["init_lora_weights"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(torch.nn.ModuleDict({"linear": linear}), lora_config)
    layer = model.base_model.model["linear"]
    a = layer.lora_A["default"].weight.detach().double()
    b = layer.lora_B["default"].weight.detach().double() * scale
    return Factors(torch.cat([update.a, a]), torch.cat([update.b, -b], 1), update.is_embedding)


def convert_token_rows(file: AdapterFile, end: str, indices: Any) -> dict[str, Factors]:
    """Returns module name → update of trained embedding rows, of rank 1 per token.

    Args:
        file: the adapter.
        end: name, in each module, of the tensor with the trained rows.
        indices: ids of the trained tokens, or mapping from pattern of module names to ids.

    Raises:
        InputError: token ids repeat, are missing, or are not in the base model.
    """
    import torch

    factors: dict[str, Factors] = {}
    shared = {head for heads in file.tied.values() for head in heads}
    for name in file.names(end):
        short = indices if isinstance(indices, list) else by_pattern(indices, name, None)
        if not short or len(set(short)) < len(short):
            raise InputError(f"its config names the trained tokens of {name} twice or not at all")
        token_ids = torch.tensor(short)
        (values,) = file.pop(name, end)
        if name in shared:  # handled with its tied embedding
            continue
        old = file.get_base_tensor(f"{name}.weight")
        if int(token_ids.max()) >= len(old):
            raise InputError(f"it has rows of {name} for tokens that its base has not. Merge it")
        positions = torch.zeros(len(token_ids), len(old), dtype=torch.float64)
        positions[torch.arange(len(token_ids)), token_ids] = 1
        delta = values - old[token_ids].double()
        heads = [name] if name.endswith(OUTPUT_LAYERS) else file.tied.get(name, [])
        if name not in heads:
            factors[name] = Factors(positions, delta.T.contiguous(), is_embedding=True)
        for head in heads:
            factors[head] = Factors(delta, positions.T.contiguous())
        suffix = (
            f", on {join_names(heads)} too, which shares them"
            if name not in heads and heads
            else ""
        )
        file.notes.append(
            f"{len(token_ids)} trained rows of {name} written as rank {len(token_ids)}{suffix}"
        )
    return factors
