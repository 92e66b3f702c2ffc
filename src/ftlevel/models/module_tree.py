"""Locate blocks, linear layers, heads, norms and embeddings of any model.

Blocks are the outermost `ModuleList`s that contain linear layers, so no table of families is
needed. Works on the meta device and on quantized models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

Location = Literal["block", "router", "kernel", "aside", "head", "other"]

# Names of layers that route tokens to experts, or of modules that contain such layers.
_ROUTERS = frozenset({"gate", "router", "router_gate", "shared_expert_gate"})
# Mamba's scan, or in training mamba-ssm's fused kernel, reads these weights past their modules, so
# an adapter would have no effect; PEFT 0.21 refuses some (`_check_lora_target_modules_mamba`).
_KERNEL_LAYERS = {
    "jamba": ("dt_proj",),
    **dict.fromkeys(("falcon_mamba", "mamba"), ("out_proj", "dt_proj", "x_proj")),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid"), ("out_proj",)),
    **dict.fromkeys(("mamba2", "nemotron_h", "zamba2"), ("out_proj",)),
}
# Used only with entity inputs, which no task has, or with global attention. A layer of an `indexer`
# has no gradient either: its scores choose the tokens that attention sees.
_OPTIONAL_LAYERS = {
    "led": ("query_global", "key_global", "value_global"),
    "longformer": ("query_global", "key_global", "value_global"),
    "luke": ("w2e_query", "e2w_query", "e2e_query"),
}
# The forward pass casts or scales these, or reads their dtype, so they are not quantized.
_FULL_PRECISION_LAYERS = {
    # The output is divided in place, which bitsandbytes does not support.
    "led": ("query_global",),
    "longformer": ("query_global",),
    "longt5": ("wo",),
    "rwkv": ("attention.output", "feed_forward.value"),
    "switch_transformers": ("router.classifier", "wo"),
}
# Attention to an encoder; a decoder without one never calls it.
_CROSS_ATTENTION = ("encoder_attn", "encoder_attn_layer_norm", "crossattention", "ln_cross_attn")
# PEFT 0.21 renames their adapters while it loads them, and loses them.
_LOST_ADAPTERS = {"laguna": "shared_experts"}
_INDEX_LETTERS = "ijklmn"
_OTHER_INPUTS = re.compile("vision|visual|image|audio")  # encoders of inputs that no task has


@dataclass(frozen=True)
class LinearModule:
    """A linear layer; `pattern` is its name without layer index: `model.layers.{i}.mlp.up_proj`.

    `location` is `other` outside blocks and heads (BERT's pooler), `kernel` if the model reads the
    weight without calling the module (no adapter possible), `aside` if only some inputs use it.
    """

    name: str
    pattern: str
    type: str
    in_features: int
    out_features: int
    location: Location


@dataclass(frozen=True)
class ExpertParameter:
    """A tensor `(experts, ·, ·)` that stacks one linear layer of all experts in a block."""

    name: str
    pattern: str
    experts: int
    in_features: int
    out_features: int


def linear_size(module: nn.Module) -> tuple[str, int, int] | None:
    """Returns (type, inputs, outputs) of a linear layer of any library; None for other modules."""
    if isinstance(module, Conv1D):
        return "Conv1D", int(module.nx), int(module.nf)
    fan_in, fan_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(fan_in, int) or not isinstance(fan_out, int):
        return None
    is_plain = isinstance(module, nn.Linear) and type(module).__module__.startswith(
        ("torch.", "transformers.")
    )
    return "Linear" if is_plain else type(module).__name__, fan_in, fan_out


class ModuleTree:
    """Modules of a model by name; finds its blocks (repeated layers), heads and linear layers."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.lists = {
            name for name, part in self.modules.items() if isinstance(part, nn.ModuleList)
        }
        stacks = [name for name in self.modules if name in self.lists and self._is_blocks(name)]
        self.blocks = [name for name in stacks if not _OTHER_INPUTS.search(name)] or stacks
        self.heads = self._get_heads(stacks)
        is_alone = not getattr(getattr(model, "config", None), "is_encoder_decoder", True)
        self.uncalled = [n for n in self.modules if is_alone and n.endswith(_CROSS_ATTENTION)]

    def _is_blocks(self, name: str) -> bool:
        parents = name.split(".")[:-1]
        if any(".".join(parents[:end]) in self.lists for end in range(1, len(parents) + 1)):
            return False
        return any(
            linear_size(part) is not None
            for block in self.modules[name].children()
            for part in block.modules()
            if part is not block
        )

    def in_blocks(self, name: str) -> bool:
        """Returns whether the module is inside a repeated block."""
        return any(name.startswith(f"{block}.") for block in self.blocks)

    def in_heads(self, name: str) -> bool:
        """Returns whether the module is a head or part of one."""
        return any(name == head or name.startswith(f"{head}.") for head in self.heads)

    def _get_heads(self, stacks: list[str]) -> list[str]:
        base = getattr(self.model, "base_model", self.model)
        if base is not self.model:
            candidates = [name for name, part in self.model.named_children() if part is not base]
        elif type(self.model).__name__.endswith("Model"):
            return []  # a bare model has no head: BertModel's pooler is not one
        else:  # T5 is its own base: the head is a sibling of encoder and decoder
            candidates = [
                name
                for name, part in self.model.named_children()
                if any(linear_size(inner) for inner in part.modules())
            ]
        return [
            self._unwrap(name)
            for name in candidates
            if any(True for _ in self.modules[name].parameters())
            and not any(f"{stack}.".startswith(f"{name}.") for stack in stacks)
        ]

    def _unwrap(self, name: str) -> str:
        children = list(self.modules[name].named_children())
        if len(children) == 1 and any(True for _ in children[0][1].children()):
            return self._unwrap(f"{name}.{children[0][0]}")
        return name

    def pattern(self, name: str) -> str:
        """Returns `name` with `{i}`, `{j}`, … in place of the indices of repeated modules."""
        names, letters = name.split("."), iter(_INDEX_LETTERS)
        for position, part in enumerate(names):
            parent = ".".join(name.split(".")[:position])
            if not part.isdigit() or parent not in self.lists:
                continue
            types = {type(member) for member in self.modules[parent].children()}
            if parent in self.blocks or len(types) == 1:
                names[position] = f"{{{next(letters)}}}"
        return ".".join(names)

    def is_called(self, name: str) -> bool:
        """Returns whether the model uses the module: False in cross-attention without encoder."""
        return not any(f"{name}.".startswith(f"{part}.") for part in self.uncalled)

    def _classify(self, name: str) -> Location:
        if self.in_heads(name):
            return "head"
        if not self.in_blocks(name):
            return "other"
        names = name.split(".")
        model_type = getattr(getattr(self.model, "config", None), "model_type", "")
        if names[-1] in _KERNEL_LAYERS.get(model_type, ()):
            return "kernel"
        if names[-1] in _OPTIONAL_LAYERS.get(model_type, ()) or "indexer" in names:
            return "aside"
        if not self.is_called(name) or _LOST_ADAPTERS.get(model_type) in names:
            return "aside"
        return "block" if _ROUTERS.isdisjoint(names) else "router"

    def linears(self) -> Iterator[LinearModule]:
        """Yields every linear layer, including heads, in the model's order."""
        for name, module in self.modules.items():
            size = linear_size(module)
            if size is not None:
                yield LinearModule(name, self.pattern(name), *size, self._classify(name))

    def experts(self) -> Iterator[ExpertParameter]:
        """Yields the 3-D expert tensors in the blocks."""
        for owner, module in self.modules.items():
            if not self.in_blocks(owner) or "expert" not in owner:
                continue
            # transformers stores (experts, out, in) unless the class has `is_transposed`.
            flip = bool(getattr(module, "is_transposed", False))
            for key, value in module.named_parameters(recurse=False):
                if value.ndim == 3:
                    count, first, second = value.shape
                    fan_in, fan_out = (first, second) if flip else (second, first)
                    pattern = f"{self.pattern(owner)}.{key}"
                    yield ExpertParameter(f"{owner}.{key}", pattern, count, fan_in, fan_out)

    def norms(self) -> Iterator[tuple[str, str, int]]:
        """Yields (name pattern, class, width) of the norms that have weights, outside heads."""
        for name in self.norm_names():
            module = self.modules[name]
            first = next(module.parameters(recurse=False))
            yield self.pattern(name), type(module).__name__, first.numel()

    def norm_names(self) -> list[str]:
        """Returns the full names of the norms that have weights and are not in heads."""
        return [
            name
            for name, module in self.modules.items()
            if re.search(r"norm", type(module).__name__, re.IGNORECASE)
            and any(True for _ in module.parameters(recurse=False))
            and not self.in_heads(name)
            and not _OTHER_INPUTS.search(name)
        ]

    def layer(self, name: str) -> int | None:
        """Returns the block index of the module, or None outside of blocks."""
        for block in self.blocks:
            if name.startswith(f"{block}."):
                return int(name[len(block) + 1 :].partition(".")[0])
        return None

    def embeddings(self) -> Iterator[tuple[str, str, int, int]]:
        """Yields (name pattern, class, rows, width) of the embeddings."""
        for name, module in self.modules.items():
            if isinstance(module, nn.Embedding):
                module_type = type(module).__name__
                yield self.pattern(name), module_type, module.num_embeddings, module.embedding_dim


def get_stacks(model: nn.Module) -> list[list[nn.Module]]:
    """Returns a list of blocks per stack of the model; the encoder's is before the decoder's."""
    tree = ModuleTree(model)
    return [list(tree.modules[name].children()) for name in tree.blocks]


def get_blocks(model: nn.Module) -> list[nn.Module]:
    """Returns the blocks of `model` if it has a single stack, else an empty list."""
    stacks = get_stacks(model)
    return stacks[0] if len(stacks) == 1 else []


def get_block_owners(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `model` that contain its single stack of blocks, innermost first."""
    (name,) = ModuleTree(model).blocks
    owners = []
    while name:
        name = name.rpartition(".")[0]
        owners.append(model.get_submodule(name))
    return owners


def get_modules_to_not_convert(model: nn.Module) -> list[str]:
    """Returns the names of linear layers that must not be quantized in models of this type."""
    model_type = str(getattr(model.config, "model_type", ""))
    suffixes = (*_KERNEL_LAYERS.get(model_type, ()), *_FULL_PRECISION_LAYERS.get(model_type, ()))
    return (
        [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name.endswith(tuple(f".{end}" for end in suffixes))
        ]
        if suffixes
        else []
    )


def replace_conv1d(model: nn.Module) -> None:
    """Replace the Conv1D layers of the meta `model` (modified) by `nn.Linear`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, nn.Linear(module.nx, module.nf, device="meta"))


def get_heads(model: nn.Module) -> list[str]:
    """Returns the names of modules on top of the base model, such as `lm_head`; may be empty."""
    return ModuleTree(model).heads


def get_new_language_head(model: nn.Module) -> tuple[list[str], list[str]]:
    """Returns the modules of a masked-LM head that are not in the checkpoint, and all head modules.

    If `architectures` names no masked LM, all but the tied output embedding is new, such as BERT's
    transform. Both lists are empty for a pretrained head.
    """
    config: Any = model.config
    if any(_has_language_head(name, config.model_type) for name in config.architectures or ()):
        return [], []
    heads = get_heads(model)
    output = model.get_output_embeddings() if config.tie_word_embeddings else None  # type: ignore[operator]
    modules = dict(model.named_modules())
    new: list[str] = []
    candidates = list(heads)
    while candidates:
        name = candidates.pop(0)
        if not any(part is output for part in modules[name].modules()):
            new.append(name)
        elif modules[name] is not output:
            children = modules[name].named_children()
            candidates += [
                f"{name}.{key}" for key, part in children if any(True for _ in part.parameters())
            ]
    return new, heads


def _has_language_head(architecture: str, model_type: str) -> bool:
    if model_type == "electra":  # its ForPreTraining is the discriminator
        return architecture.endswith("ForMaskedLM")
    return architecture.endswith(("ForMaskedLM", "ForPreTraining"))
