"""`list-targets`: target modules of a model type, from a table, or of a model.

Families need neither torch nor transformers. Models are built on the meta device, without weights.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ftlevel.errors import ConfigError, InputError
from ftlevel.models.families import (
    FLOAT32_BYTES,
    BlockLinear,
    Family,
    Stack,
    example_lora_parameters,
    get_family,
    lookup_family,
    lora_parameters,
)

_BLOCK = re.compile(r"(.*\{\w\})\.(.+)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class TargetRow:
    """Linear layers or expert tensors that differ only in their layer index.

    Attributes:
        name: value for `--target-modules`, such as `q_proj`.
        pattern: full name with `{i}` for the layer index.
        block: part of the pattern up to the block; empty outside the blocks.
        shape: `in -> out`; numbers for a model, symbols for a family.
        count: number of such layers; None for a family.
        all_linear: whether `all-linear` selects them.
        default: whether methods adapt them by default.
        lora_parameters: LoRA parameters of all of them together, at the requested rank.
        only: variant of the family that has them; empty if all do.
    """

    name: str
    pattern: str
    block: str
    type: str
    shape: str
    attention: bool = False
    all_linear: bool = False
    default: bool = False
    in_features: int | None = None
    out_features: int | None = None
    count: int | None = None
    lora_parameters: int | None = None
    only: str = ""

    @property
    def path(self) -> str:
        """Module name within the block."""
        return self.pattern.removeprefix(f"{self.block}.") if self.block else self.pattern


@dataclass(frozen=True)
class LoraSize:
    """LoRA parameters with `all-linear` on the model `of`, and bytes of the adapter in float32."""

    r: int
    of: str
    trainable_parameters: int
    adapter_bytes: int
    share: float | None = None


@dataclass(frozen=True)
class TargetReport:
    """Output of `ftlevel list-targets`.

    `heads` maps tasks of a family, or classes of a model, to names for `modules_to_save`.
    `aliases` are families with the same module names.
    """

    source: Literal["family", "model"]
    name: str
    family: str
    kind: str
    linears: tuple[TargetRow, ...]
    experts: tuple[TargetRow, ...]
    heads: dict[str, tuple[str, ...]]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...]
    all_linear: tuple[str, ...]
    attention_only: tuple[str, ...]
    target_parameters: tuple[str, ...]
    lora: LoraSize | None
    aliases: tuple[str, ...]
    total_parameters: int | None = None
    note: str = ""


def list_targets(name: str | Path, r: int = 8) -> TargetReport:
    """Describe a model or a family, with LoRA sizes at rank `r`.

    Directories with `config.json`, names with a slash, .gguf files and `builtin:NAME` are models.
    Raises InputError for unknown names.
    """
    if isinstance(name, Path) or is_model(name):
        return describe_model(str(name), r)
    return describe_family(name, r)


def is_model(name: str) -> bool:
    """Returns whether `name` is a model rather than a family."""
    if name.startswith("builtin:") or name.endswith(".gguf") or "/" in name or os.sep in name:
        return True
    directory = Path(name)
    return directory.is_dir() and ((directory / "config.json").is_file() or not lookup_family(name))


def describe_family(name: str, r: int = 8) -> TargetReport:
    """Describe a family without importing torch; raise InputError if it is unknown."""
    _check_rank(r)
    family = get_family(name)
    return TargetReport(
        source="family",
        name=family.name,
        family=family.name,
        kind=family.kind,
        linears=tuple(
            _family_row(stack, linear) for stack in family.stacks for linear in stack.linears
        ),
        experts=tuple(
            _family_expert(stack, expert) for stack in family.stacks for expert in stack.experts
        ),
        heads=dict(family.heads),
        norms=(
            *(f"{stack.path}.{norm}" for stack in family.stacks for norm in stack.norms),
            *family.outer_norms,
        ),
        embeddings=family.embeddings,
        all_linear=family.default_targets,
        attention_only=family.attention_only,
        target_parameters=family.target_parameters,
        lora=_example_size(family, r),
        aliases=family.aliases,
        note=family.note,
    )


def describe_model(name: str, r: int = 8) -> TargetReport:
    """Describe a directory, a .gguf file, a Hub id or `builtin:NAME`; reads no weights.

    Raises InputError if the model cannot be read, or transformers has no class for it.
    """
    _check_rank(r)
    from huggingface_hub.errors import StrictDataclassError

    from ftlevel.models.kinds import model_kind
    from ftlevel.models.targets import build_meta_model
    from ftlevel.models.untrusted import FROM_READERS

    config = _load_config(name)
    try:
        model = build_meta_model(config)
    except (*FROM_READERS, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise InputError(
            f"{name}: transformers cannot build a model from its configuration: {message} "
            "Expected the config.json of a transformers model."
        ) from error
    return inspect_model(model, name, r, model_kind(config))


def inspect_model(model: Any, name: str = "", r: int = 8, kind: str = "") -> TargetReport:
    """Describe the adaptable modules of `model` (usually on the meta device), named `name`."""
    from ftlevel.models.module_tree import ModuleTree

    tree, config = ModuleTree(model), getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    family, total = lookup_family(model_type), sum(part.numel() for part in model.parameters())
    linears = Counter(
        (part.pattern, part.type, part.in_features, part.out_features, part.location)
        for part in tree.linears()
        if part.location != "head"
    )
    rows = [
        _model_row(count, r, pattern, type_, fan_in, fan_out, is_default=location == "block")
        for (pattern, type_, fan_in, fan_out, location), count in sorted(
            linears.items(), key=lambda item: item[0][-1] == "other"
        )
    ]
    experts = Counter(
        (part.pattern, part.experts, part.in_features, part.out_features) for part in tree.experts()
    )
    selected = [row for row in rows if row.all_linear]
    parameters = sum(row.lora_parameters or 0 for row in selected)
    return TargetReport(
        source="model",
        name=name,
        family=model_type,
        kind=kind,
        linears=tuple(rows),
        experts=tuple(
            _model_row(count, r, pattern, "experts", fan_in, fan_out, experts=number)
            for (pattern, number, fan_in, fan_out), count in experts.items()
        ),
        heads={type(model).__name__: tuple(tree.heads)},
        norms=tuple(pattern for pattern, *_ in dict.fromkeys(tree.norms())),
        embeddings=tuple(pattern for pattern, *_ in dict.fromkeys(tree.embeddings())),
        all_linear=tuple(dict.fromkeys(row.name for row in selected)),
        attention_only=family.attention_only if family else (),
        target_parameters=tuple(split_pattern(pattern)[1] for pattern, *_ in experts),
        lora=LoraSize(r, name, parameters, parameters * FLOAT32_BYTES, parameters / total),
        aliases=family.aliases if family else (),
        total_parameters=total,
    )


def _check_rank(r: int) -> None:
    if not isinstance(r, int) or r < 1:
        raise ConfigError(f"--lora-r {r} is not a rank. Expected 1 or more; 8 is usual.")


def _load_config(name: str) -> Any:
    from ftlevel.models.loading import load_config
    from ftlevel.models.sources import ModelSource, resolve_source
    from ftlevel.models.untrusted import check_directory

    directory = Path(name).expanduser()
    if not (directory / "config.json").is_file():
        return load_config(resolve_source(name, display_name=name))
    check_directory(directory, name)
    return load_config(
        ModelSource(name, "directory", str(directory), local_files_only=True, display_name=name)
    )


def split_pattern(pattern: str) -> tuple[str, str]:
    """Returns the block of a module pattern ("" outside blocks), and the name within the block."""
    match = _BLOCK.fullmatch(pattern)
    return (match[1], match[2]) if match else ("", pattern)


def _family_row(stack: Stack, linear: BlockLinear) -> TargetRow:
    return TargetRow(
        linear.name,
        f"{stack.path}.{linear.path}",
        stack.path,
        linear.type,
        f"{linear.fan_in} -> {linear.fan_out}",
        attention=linear.attention,
        all_linear=True,
        default=True,
        only=linear.only,
    )


def _family_expert(stack: Stack, expert: BlockLinear) -> TargetRow:
    name, shape = expert.path.rpartition(".")[2], f"experts of {expert.fan_in} -> {expert.fan_out}"
    return TargetRow(name, f"{stack.path}.{expert.path}", stack.path, "experts", shape)


def _model_row(
    count: int,
    r: int,
    pattern: str,
    type_: str,
    fan_in: int,
    fan_out: int,
    *,
    is_default: bool = False,
    experts: int = 0,
) -> TargetRow:
    block, path = split_pattern(pattern)
    return TargetRow(
        pattern.rpartition(".")[2],
        pattern,
        block,
        type_,
        f"{f'{experts} of ' if experts else ''}{fan_in} -> {fan_out}",
        attention=is_default and _ATTENTION.search(path) is not None,
        all_linear=is_default,
        default=is_default,
        in_features=fan_in,
        out_features=fan_out,
        count=count,
        lora_parameters=count * (experts or 1) * lora_parameters(fan_in, fan_out, r),
    )


def _example_size(family: Family, r: int) -> LoraSize | None:
    if family.example is None:
        return None
    parameters = example_lora_parameters(family, r)
    return LoraSize(r, family.example.name, parameters, parameters * FLOAT32_BYTES)
