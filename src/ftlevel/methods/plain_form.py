"""Conversion of adapters to plain LoRA on the unchanged base: ΔW = B · A, with all scales in B.

    LoRA:  ΔW = s · B · A,  s = alpha / r, or alpha / √r with rsLoRA (Kalajdzievski, 2023)

With PiSSA or OLoRA the base is W − s · B₀A₀, so the update of W is s · (BA − B₀A₀), of rank 2r. A
trained embedding row is a one-hot row in A and the row's change in B; a tied output layer gets the
transpose. Other methods are converted in their own modules.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftlevel.config.methods.lora import BASE_MODIFYING_INITS
from ftlevel.errors import InputError, join_names

PREFIX = "base_model.model."
"""PEFT's prefix of module names in the base."""
OUTPUT_LAYERS = ("lm_head", "embed_out")
"""Name suffixes of output layers."""


@dataclass(frozen=True)
class Factors:
    """The update B · A of one module in float64: a `(r, in)`, b `(out, r)`.

    For an embedding a is `(r, tokens)`.
    """

    a: Any
    b: Any
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """The rank r."""
        return int(self.a.shape[0])

    def padded(self, rank: int) -> Factors:
        """Returns the same update zero-padded to `rank`."""
        import torch

        rows = rank - self.rank
        a = torch.cat([self.a, self.a.new_zeros(rows, self.a.shape[1])])
        b = torch.cat([self.b, self.b.new_zeros(self.b.shape[0], rows)], dim=1)
        return Factors(a, b, self.is_embedding)


@dataclass
class AdapterFile:
    """A saved adapter during conversion.

    Attributes:
        config: the content of adapter_config.json.
        tensors: name -> tensor; converted ones are removed, so any left at the end are unsupported.
        read_base: returns a base tensor by name.
        tied: embedding name -> output layers that share the weight.
        said: notes for the user about the conversion.
    """

    config: Mapping[str, Any]
    tensors: dict[str, Any]
    read_base: Callable[[str], Any]
    tied: Mapping[str, list[str]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def names(self, end: str) -> list[str]:
        """Returns the modules that have a tensor with suffix `end`."""
        return [key.removesuffix(f".{end}") for key in self.tensors if key.endswith(f".{end}")]

    def take(self, name: str, *ends: str) -> list[Any]:
        """Remove and return tensors `ends` of module `name` in float64; `InputError` if missing."""
        missing = [end for end in ends if f"{name}.{end}" not in self.tensors]
        if missing:
            raise InputError(f"its file has no {name}.{missing[0]}. Is the copy incomplete?")
        return [self.tensors.pop(f"{name}.{end}").double() for end in ends]


AsLora = Callable[[AdapterFile], dict[str, Factors]]
"""Converts a saved adapter to updates by module name; raises `InputError` if unsupported."""


@dataclass(frozen=True)
class PlainForm:
    """Conversion to plain LoRA by `algebra` from the file; if None, from the layers of a model.

    `never` is the reason why no low-rank LoRA is equivalent; empty if one may exist.
    """

    algebra: AsLora | None = None
    never: str = ""


FULL_RANK = "changes every weight by a matrix of full rank, which no small A and B hold. Merge it"


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches the module `name`, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def spread(numbers: set[Any]) -> str:
    """Returns the range of `numbers` as text: `2`, or `0.5 to 5.66`."""
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


_NOT_PLAIN = {
    "use_dora": "DoRA scales each row of the merged weight by a norm of it",
    "lora_bias": "B has a bias",
    "use_qalora": "QA-LoRA pools its input",
    "use_bdlora": "its matrices are in blocks for several devices",
    "kasa_config": "KaSA takes singular values out of the base",
    "monteclora_config": "its weights are drawn at random",
    "arrow_config": "it routes each token among adapters",
    "alora_invocation_tokens": "it acts only after its invocation tokens",
    "layer_replication": "it repeats layers",
    "target_parameters": "it adapts tensors of experts, for which plain LoRA has no names",
    "megatron_config": "it is laid out for Megatron",
}
_LOST_STARTS = {"corda": "statistics of activations", "lora_ga": "gradients of the base"}
_LOFTQ = (
    "it was initialized with LoftQ on the 4-bit rounding of the base, and the difference has full "
    "rank: serve that base, or merge into it"
)
_TOKENS = "token_adapter.trainable_tokens_delta"


def as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns the update of every adapted module; raises `InputError` for other LoRA variants."""
    _check_form(file)
    updates = {
        name: _fold(file, name, "lora_A.weight", "lora_B.weight")
        for name in file.names("lora_A.weight")
    }
    updates |= {
        name: _fold(file, name, "lora_embedding_A", "lora_embedding_B")
        for name in file.names("lora_embedding_A")
    }
    _say_scale(file, updates)
    start = str(file.config.get("init_lora_weights")).lower()
    if start.startswith(BASE_MODIFYING_INITS):
        updates = {name: _with_start(file, name, update) for name, update in updates.items()}
        word = "OLoRA" if start == "olora" else "PiSSA"
        file.said.append(f"base moved by {word}: rank {_ranks(updates)} on the original")
    return updates | token_rows(file, _TOKENS, file.config.get("trainable_token_indices"))


def _check_form(file: AdapterFile) -> None:
    config = file.config
    problems = [
        f"{key} is set: {message}" for key, message in _NOT_PLAIN.items() if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        problems.append("bias is set: biases of the base were trained")
    if problems:
        raise InputError(f"{problems[0]}. Merge it")
    start = str(config.get("init_lora_weights")).lower()
    if start == "loftq":
        raise InputError(_LOFTQ)
    if start in _LOST_STARTS:
        raise InputError(
            f"it began by {start} inside the base, from {_LOST_STARTS[start]} that its file does "
            "not hold, so PEFT cannot load it either. Save it again with "
            "path_initial_model_for_weight_conversion of save_pretrained"
        )
    tied_names = [name for name in file.names("lora_embedding_A") if file.tied.get(name)]
    if tied_names and config.get("ensure_weight_tying"):
        raise InputError(
            f"{tied_names[0]} was adapted together with the output layer that shares its weight. "
            "Merge it"
        )


def _fold(file: AdapterFile, name: str, first: str, second: str) -> Factors:
    a, b = file.take(name, first, second)
    if a.dim() != 2:
        raise InputError(f"{name} is a convolution. Merge it")
    return Factors(a, b * _scale(file, name, len(a)), first == "lora_embedding_A")


def _scale(file: AdapterFile, name: str, rank: int) -> float:
    alpha = by_pattern(file.config.get("alpha_pattern"), name, file.config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if file.config.get("use_rslora") else rank)


def _say_scale(file: AdapterFile, updates: dict[str, Factors]) -> None:
    scales = {_scale(file, name, update.rank) for name, update in updates.items()}
    message = [
        word
        for word, key in (
            ("rsLoRA", "use_rslora"),
            ("alpha_pattern", "alpha_pattern"),
            ("rank_pattern", "rank_pattern"),
        )
        if file.config.get(key)
    ]
    if scales and scales != {1.0}:
        reason = " and ".join(message) or "lora_alpha / r"
        file.said.append(f"scale {spread(scales)} ({reason}) folded into B")


def _ranks(updates: dict[str, Factors]) -> str:
    return join_names(map(str, sorted({update.rank for update in updates.values()})), 4)


def _with_start(file: AdapterFile, name: str, update: Factors) -> Factors:
    """Returns the update of the original weight: `update` − s · B₀ · A₀; recomputes A₀ and B₀."""
    import torch

    weight = file.read_base(f"{name}.weight").float()
    if update.b.shape[0] != weight.shape[0]:  # a Conv1D, (in, out)
        weight = weight.T
    first = _start_of(weight, file.config, update.rank, _scale(file, name, update.rank))
    return Factors(
        torch.cat([update.a, first.a]), torch.cat([update.b, -first.b], 1), update.is_embedding
    )


def _start_of(weight: Any, config: Any, rank: int, scale: float) -> Factors:
    """Returns A₀ and s · B₀; initialization subtracts their product from `weight` `(out, in)`."""
    import torch
    from peft import LoraConfig, get_peft_model

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    settings = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules=["linear"],
        init_lora_weights=config["init_lora_weights"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(torch.nn.ModuleDict({"linear": linear}), settings)
    layer = model.base_model.model["linear"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Factors(a.detach().double(), b.detach().double() * scale)


def token_rows(file: AdapterFile, end: str, indices: Any) -> dict[str, Factors]:
    """Returns trained embedding rows as an update of rank one per token.

    Args:
        file: the adapter.
        end: suffix of the tensors in the file.
        indices: token ids, or module -> token ids.

    Raises:
        InputError: token ids repeat or are missing in the config, or are not in the base.
    """
    import torch

    updates: dict[str, Factors] = {}
    shared = {head for heads in file.tied.values() for head in heads}
    for name in file.names(end):
        short = indices if isinstance(indices, list) else by_pattern(indices, name, None)
        if not short or len(set(short)) < len(short):
            raise InputError(f"its config names the trained tokens of {name} twice or not at all")
        token_ids = torch.tensor(short)
        (rows,) = file.take(name, end)
        if name in shared:  # handled with its tied embedding
            continue
        old = file.read_base(f"{name}.weight")
        if int(token_ids.max()) >= len(old):
            raise InputError(f"it has rows of {name} for tokens that its base has not. Merge it")
        positions = torch.zeros(len(token_ids), len(old), dtype=torch.float64)
        positions[torch.arange(len(token_ids)), token_ids] = 1
        change = rows - old[token_ids].double()
        heads = [name] if name.endswith(OUTPUT_LAYERS) else file.tied.get(name, [])
        if name not in heads:
            updates[name] = Factors(positions, change.T.contiguous(), is_embedding=True)
        for head in heads:
            updates[head] = Factors(change, positions.T.contiguous())
        also = (
            f", on {join_names(heads)} too, which shares them"
            if name not in heads and heads
            else ""
        )
        file.said.append(
            f"{len(token_ids)} trained rows of {name} written as rank {len(token_ids)}{also}"
        )
    return updates
