"""The normal form itself, of what a method's algebra or the probe gave, and what cannot be one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.errors import InputError, listing
from ftlevel.merging.normal_form.peft_only import PLAIN_FORMS
from ftlevel.methods.merging import WEIGHTS
from ftlevel.methods.plain_form.factors import (
    OUTPUT_LAYERS,
    PREFIX,
    AdapterFile,
    Factors,
    PlainForm,
)
from ftlevel.models.loading import build_task_model, load_model, rename_prefix
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream.architectures import tied_names
from ftlevel.trained.vocabulary import trained_rows
from ftlevel.weights.checkpoint import Checkpoint, checkpoint_in_memory, open_checkpoint

_BASE = ".base_layer."


@dataclass(frozen=True)
class NormalForm:
    """Plain LoRA on the untouched base.

    Attributes:
        factors: module → its update, all of one rank, in float64.
        kept: name in the base → what was trained in its stead as a whole.
        said: what was changed on the way, for the user.
        way: where it is from.
    """

    factors: dict[str, Factors]
    kept: dict[str, Any]
    said: list[str]
    way: str = "its file"

    @property
    def rank(self) -> int:
        """The rank of every update, which is its alpha as well."""
        return next(iter(self.factors.values())).rank

    @property
    def whole_modules(self) -> list[str]:
        """The modules that were trained as a whole."""
        return sorted({name.rpartition(".")[0] for name in self.kept})

    @property
    def in_vocabulary(self) -> list[str]:
        """The embeddings and output layers that are adapted."""
        return sorted(
            name
            for name, own in self.factors.items()
            if own.is_embedding or name.endswith(OUTPUT_LAYERS)
        )

    def on_every_layer(self, model: Any) -> NormalForm:
        """Return it with zeros on linears of `model` that are called as one that is adapted."""
        import torch

        ends = {name.rpartition(".")[2] for name, own in self.factors.items()}
        more: dict[str, Factors] = {}
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ends and name not in self.factors:
                weight = getattr(module, "weight", None)
                if weight is None or weight.dim() != 2:
                    continue
                rows, columns = weight.shape
                if type(module).__name__ == "Conv1D":
                    rows, columns = columns, rows
                more[name] = Factors(torch.zeros(self.rank, columns, dtype=torch.float64),
                                     torch.zeros(rows, self.rank, dtype=torch.float64))  # fmt: skip
        if not more:
            return self
        said = f"zeros written for {len(more):,} modules that were not adapted, such as {min(more)}"
        return replace(self, factors=self.factors | more, said=[*self.said, said])


@dataclass(frozen=True)
class BaseWeights:
    """The base as far as its files tell it.

    Attributes:
        model: its class on the meta device.
        checkpoint: its weights.
    """

    model: Any
    checkpoint: Checkpoint

    @property
    def tied(self) -> dict[str, list[str]]:
        """Name of the embedding → output layers that share its weight."""
        found: dict[str, list[str]] = {}
        for target, source in tied_names(self.model).items():
            found.setdefault(source.rpartition(".")[0], []).append(target.rpartition(".")[0])
        return found


def open_base(source: ModelSource, config: Any, auto_class: str) -> BaseWeights:
    """Open the weights of a base; those of a .gguf file are read into memory."""
    model = build_task_model(config, auto_class)
    if source.kind == "gguf":
        import torch

        loaded, _ = load_model(source, config, auto_class, dtype=torch.float32, device="cpu")
        return BaseWeights(model, checkpoint_in_memory(model, loaded))
    mapping = rename_prefix(config, auto_class)
    return BaseWeights(model, open_checkpoint(source, model, mapping))


def plain_form_of(config: Mapping[str, Any]) -> PlainForm:
    """Return how an adapter of adapter_config.json becomes plain LoRA.

    Raises:
        InputError: it never does.
    """
    kind = str(config.get("peft_type"))
    form = PLAIN_FORMS.get(kind, PlainForm())
    if form.never:
        raise InputError(f"{kind} {form.never}")
    return form


def form_from_file(
    directory: Path, config: Mapping[str, Any], base: BaseWeights, limit: int
) -> NormalForm | None:
    """Return the normal form by the method's algebra; None where only the layers can be asked.

    Args:
        directory: the adapter.
        config: its adapter_config.json.
        base: its base.
        limit: the highest rank.

    Raises:
        InputError: there is none, or its rank is above `limit`.
    """
    algebra = plain_form_of(config).algebra
    file = read_file(directory, config, base)
    if algebra is None:
        return None
    factors = algebra(file)
    return assemble(factors, file, limit, "its file")


def read_file(directory: Path, config: Mapping[str, Any], base: BaseWeights) -> AdapterFile:
    """Return the adapter's tensors by their names in the base, less copies of the base's own.

    Raises:
        InputError: it was trained with another vocabulary than its base has.
    """
    from safetensors.torch import load_file

    embedding = base.model.get_input_embeddings() if trained_on_text(base.model) else None
    had = None if embedding is None else int(embedding.weight.shape[0])
    rows = trained_rows(base.model, directory) if had else None
    if rows not in (None, had):
        raise InputError(
            f"it was trained with {rows:,} tokens and its base has {had:,}, and no server adds "
            "rows to a base. Merge it"
        )
    tensors = {
        key.removeprefix(PREFIX): tensor
        for key, tensor in load_file(str(directory / WEIGHTS)).items()
    }
    for name in [name for name in tensors if _BASE in f".{name}"]:
        own = base.checkpoint.read(name.replace(_BASE, "."))
        if own.shape != tensors[name].shape or not own.float().equal(tensors.pop(name).float()):
            raise InputError(f"its file holds another {name.replace(_BASE, '.')}. Merge it")
    return AdapterFile(config, tensors, base.checkpoint.read, base.tied)


def trained_on_text(model: Any) -> bool:
    """Whether `model` looks tokens up."""
    try:
        return model.get_input_embeddings() is not None
    except NotImplementedError:
        return False


def is_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor `name` is of a module that was trained as a whole, as PEFT finds them."""
    saved = tuple(config.get("modules_to_save") or ())
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(saved) for count in range(1, len(parts)))


def assemble(factors: dict[str, Factors], file: AdapterFile, limit: int, way: str) -> NormalForm:
    """Return the normal form of the updates and of what is left in the file.

    Raises:
        InputError: something is left that is no module trained as a whole; no update is; or one
            needs a rank above `limit`.
    """
    odd = [name for name in file.tensors if not is_whole(name, file.config)]
    if odd:
        raise InputError(f"its file holds {listing(odd, 2)}, which plain LoRA has no place for")
    if not factors:
        raise InputError("it changes no linear and no embedding")
    ranks = {name: own.rank for name, own in factors.items()}
    rank = max(ranks.values())
    if rank > limit:
        name = max(ranks, key=lambda key: ranks[key])
        raise InputError(
            f"the update of {name} needs rank {rank:,}, above --max-rank {limit}, which may "
            "be as high as the server goes. Merge it"
        )
    said = list(file.said)
    if len(set(ranks.values())) > 1:
        said.append(f"ranks {listing(map(str, sorted(set(ranks.values()))), 6)} → {rank}")
    return NormalForm(
        {name: own.padded(rank) for name, own in sorted(factors.items())},
        dict(file.tensors),
        said,
        way,
    )
