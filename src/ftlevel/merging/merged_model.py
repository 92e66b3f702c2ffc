"""Write the merged model: every tensor read, merged and written before the next one is read."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.files import write_json
from ftlevel.errors import InputError, RunError, listing
from ftlevel.merging.merge_input import MergeInput
from ftlevel.methods.merging import Skeleton, build_skeleton
from ftlevel.models.hardware import DTYPES
from ftlevel.models.kinds import write_former_rope
from ftlevel.models.loading import build_task_model, load_model, load_tokenizer, rename_prefix
from ftlevel.models.quantization import Rounding
from ftlevel.models.sources import ModelSource
from ftlevel.models.targets import find_heads
from ftlevel.models.upstream.architectures import tied_names, unsaved_names
from ftlevel.trained.vocabulary import fit_vocabulary
from ftlevel.weights.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    as_saved,
    checkpoint_in_memory,
    local_directory,
    open_checkpoint,
)
from ftlevel.weights.tensor_files import Part, Spec, spec_of, write_files

_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        tensors: how many tensors the files hold.
        merged: how many tensors of the base the adapter was merged into.
        unchanged: how many of these are what they were, because the update is below their rounding.
        untied: whether the output layer has weights of its own now.
        unused: tensors of the base's checkpoint that the model has no use for.
        size_bytes: of all tensors.
        dtype: of most numbers.
    """

    tensors: int
    merged: int
    unchanged: int
    untied: bool
    unused: list[str]
    size_bytes: int
    dtype: str


@dataclass
class TensorMerger:
    """Makes each tensor of the merged model of the base and the adapter.

    Attributes:
        checkpoint: the base's weights.
        skeleton: the adapter.
        shapes: name of a tensor of the model → its shape; in the model's order.
        ties: name of a tensor of the model → name of the one that it shares.
        dtype: wished type of the weights; None keeps the base's.
        rounding: quantizes and dequantizes as the base was in training; None leaves it as it is.
        unchanged: tensors that merging did not change, as far as they were merged.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    dtype: torch.dtype | None
    rounding: Rounding | None
    unchanged: set[str] = field(default_factory=set)
    _unit: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def adapts(self, name: str) -> bool:
        """Whether the adapter has a part in the tensor `name`."""
        return name in self.skeleton.supplied or self.skeleton.unit_of(name) is not None

    def spec(self, name: str) -> Spec:
        """Return what the merged tensor `name` is, without reading it."""
        return Spec(self._dtype_of(name), self.shapes[name])

    def value(self, name: str) -> torch.Tensor:
        """Return the merged tensor `name` as it is written."""
        return self._merged(name).to(self._dtype_of(name))

    def unrounded(self, name: str) -> torch.Tensor | None:
        """Return the merged tensor `name` before it is rounded; None where the model has none."""
        return self._merged(name) if name in self.shapes else None

    def base(self, name: str) -> torch.Tensor:
        """Return the tensor `name` before merging, as it was in training."""
        return self._read(name)

    def loses_in(self, dtype: torch.dtype) -> bool:
        """Whether numbers of the base are lost where it is loaded in `dtype`."""
        stored = {self.checkpoint.spec(name).dtype for name in self.checkpoint.groups}
        return any(d.is_floating_point and torch.promote_types(d, dtype) != dtype for d in stored)

    def _merged(self, name: str) -> torch.Tensor:
        value = self._find_merged(name)
        grown = self.checkpoint.holds(name) and self.checkpoint.spec(name).shape != value.shape
        if grown and not torch.isfinite(value).all():
            raise InputError(
                f"{name}: the adapter was trained with more tokens than its base has, and its file "
                "does not hold all of their rows here. They would be random. Train it again with "
                "this layer in modules_to_save, by which PEFT saves it."
            )
        return value

    def _find_merged(self, name: str) -> torch.Tensor:
        if name in self.skeleton.supplied:
            supplied: torch.Tensor = self.skeleton.supplied[name]
            return supplied
        unit = self.skeleton.unit_of(name)
        if unit is None:
            return self._read(name)
        if self._unit[0] != unit:
            self._unit = (unit, self._merge(unit))
        return self._unit[1][name]

    def _read(self, name: str) -> torch.Tensor:
        """Return the base's tensor `name` as precise as it is stored, or as it was quantized."""
        if not self.checkpoint.holds(name):  # the bias of a new head: check_whole let it pass
            return torch.zeros(self.shapes[name], dtype=self._dtype_of(name))
        value = self.checkpoint.read(name)
        value = value if self.rounding is None else self.rounding(name, value)
        return self._fit_rows(name, value) if value.shape != self.shapes[name] else value

    def _fit_rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return `value` with a row a token; new ones are NaN, or zero for a bias."""
        rows = self.shapes[name][0]
        fill = float("nan") if value.dim() > 1 else 0.0
        new = value.new_full((max(rows - len(value), 0), *value.shape[1:]), fill)
        return torch.cat([value, new])[:rows]

    def check_whole(self, heads: list[str], base: str) -> None:
        """Refuse a base that lacks tensors which the adapter does not bring.

        Args:
            heads: new heads; a bias of theirs that was not trained is zero, as it began.
            base: name of the base.

        Raises:
            InputError: naming what is missing.
        """
        lost = [
            name
            for name in self.shapes
            if not self.checkpoint.holds(name)
            and not self.adapts(name)
            and not (name.endswith(".bias") and name.startswith(tuple(f"{h}." for h in heads)))
        ]
        if lost:
            raise InputError(
                f"--base {base} lacks {len(lost):,} weights of the model that was trained, and the "
                f"adapter does not have them: {listing(lost, 3)}. They would be random. Check that "
                "it is the model that the adapter was trained on."
            )

    def copied(self, name: str) -> bool:
        """Whether the tensor `name` is the base's, byte for byte."""
        stored = self.checkpoint.spec(name).dtype
        rounds = self.rounding is not None and (
            name in self.rounding.names
            or (stored.is_floating_point and stored != self.rounding.dtype)
        )
        same = self.checkpoint.spec(name) == self.spec(name)
        return not self.adapts(name) and not rounds and same

    def _merge(self, unit: str) -> dict[str, torch.Tensor]:
        """Merge in float32, to be rounded once.

        In the narrower type of a base most of a small update is below the rounding: it is lost, not
        spread.
        """
        before: dict[str, torch.Tensor] = {}

        def read(name: str) -> torch.Tensor:
            value = self._read(name)
            before[name] = value.to(self._dtype_of(name), copy=True)
            return value.float() if value.is_floating_point() else value

        merged = self.skeleton.merge(unit, read)
        for name, value in before.items():
            if name.endswith("weight") and torch.equal(merged[name].to(value.dtype), value):
                self.unchanged.add(name)
        return merged

    def _dtype_of(self, name: str) -> torch.dtype:
        held = self.checkpoint.holds(name)
        stored = self.checkpoint.spec(name).dtype if held else self.main_dtype
        if self.dtype is not None and stored.is_floating_point:
            return self.dtype
        return stored

    @property
    def main_dtype(self) -> torch.dtype:
        """The type of most of the model's numbers."""
        if self.dtype is not None:
            return self.dtype
        counts: Counter[torch.dtype] = Counter()
        for name in self.checkpoint.groups:
            spec = self.checkpoint.spec(name)
            if spec.dtype.is_floating_point:
                counts[spec.dtype] += spec.nbytes // spec.dtype.itemsize
        return counts.most_common(1)[0][0]


def open_merger(
    inputs: MergeInput, dtype: str | None, rounding: Callable[[Any], Rounding] | None
) -> TensorMerger:
    """Return what makes the tensors of the merged model; as of `write_merged`.

    Raises:
        InputError: a tensor of the adapter or of the base cannot be placed.
    """
    model = build_task_model(inputs.config, inputs.auto_class)
    fit_vocabulary(model, inputs.directory)
    rounds = rounding(build_task_model(inputs.config, inputs.auto_class)) if rounding else None
    checkpoint = _open(inputs, model)
    ties = tied_names(model)
    ignored = set(unsaved_names(model) or ()) - set(ties)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in ignored}
    heads = find_heads(model) if inputs.card.heads else []
    skeleton = build_skeleton(model, inputs.directory)
    wished = DTYPES[dtype] if dtype else None
    merger = TensorMerger(checkpoint, skeleton, shapes, ties, wished, rounds)
    merger.check_whole(heads, inputs.source.name)
    return merger


def write_merged(
    directory: Path,
    inputs: MergeInput,
    dtype: str | None,
    rounding: Callable[[Any], Rounding] | None,
) -> tuple[Written, TensorMerger]:
    """Write the base of `inputs` with its adapter merged in, as a plain model, to `directory`.

    Args:
        directory: exists and is empty.
        inputs: the adapter and its base.
        dtype: type of the weights; None keeps the base's.
        rounding: model on the meta device → how its weights were quantized in training; None
            merges into the base as it is.

    Returns:
        What was written, and what made its tensors and can make them again.

    Raises:
        InputError: a tensor of the adapter or of the base cannot be placed.
        RunError: the merge changed nothing.
    """
    merger = open_merger(inputs, dtype, rounding)
    checkpoint, model = merger.checkpoint, merger.checkpoint.model
    ties, shapes = merger.ties, merger.shapes
    untied = _are_untied(merger, ties)
    names = [n for n in shapes if n not in ties or untied or n in checkpoint.groups]
    shards = _plan_files(merger, names)
    size = write_files(directory, shards)
    merged = sum(merger.adapts(name) for name in names)
    if len(merger.unchanged) == merged or merged == 0:
        raise RunError(
            f"the merge changed nothing: the update of {inputs.directory} is below the rounding "
            f"of {str(merger.main_dtype).removeprefix('torch.')} in every tensor. Use --dtype "
            "float32, or train longer."
        )
    _write_config(directory, inputs, model, merger.main_dtype, untied=untied)
    written = Written(
        sum(len(part.specs) for parts in shards.values() for part in parts),
        merged, len(merger.unchanged), untied, checkpoint.unused, size,
        str(merger.main_dtype).removeprefix("torch."),
    )  # fmt: skip
    return written, merger


def _open(inputs: MergeInput, model: Any) -> Checkpoint:
    """Return the base's weights: in files, or of a .gguf file in memory, as precise as it is."""
    if inputs.source.kind == "gguf":
        loaded, _ = load_model(
            inputs.source,
            inputs.config,
            inputs.auto_class,
            dtype=torch.float32,
            device="cpu",
        )
        return checkpoint_in_memory(model, loaded)
    mapping = rename_prefix(inputs.config, inputs.auto_class)
    return open_checkpoint(inputs.source, model, mapping)


def _are_untied(merger: TensorMerger, ties: Mapping[str, str]) -> bool:
    """Whether tensors that the base shares are no longer the same once the adapter is merged.

    An update of an embedding is not one of the output layer that shares its weights: PEFT adds it
    to the lookup only, and a merge into the shared tensor would be another model.
    """
    return any(
        (merger.adapts(target) or merger.adapts(source))
        and not torch.equal(merger.value(target), merger.value(source))
        for target, source in ties.items()
    )


def _plan_files(merger: TensorMerger, names: list[str]) -> dict[str, list[Part]]:
    """Return the files to write: as the base's, with new tensors in the last one."""
    shards: dict[str, list[Part]] = defaultdict(list)
    checkpoint, new = merger.checkpoint, []
    for name in names:
        if name in checkpoint.groups:
            shards[checkpoint.file(name) or _SINGLE] += _parts(merger, name)
        else:
            new += _parts(merger, name)
    files = sorted(shards) or [_SINGLE]
    shards[files[-1]] += new
    if len(files) == 1:
        return {_SINGLE: shards[files[0]]}
    return {name: shards[name] for name in files}


def _parts(merger: TensorMerger, name: str) -> list[Part]:
    """Return what is written for the tensor `name`: copied where it can be."""
    model = merger.checkpoint.model
    saved = as_saved(model, name, merger.spec(name).meta())
    specs = {key: spec_of(tensor) for key, tensor in saved.items()}
    if merger.checkpoint.holds(name) and merger.copied(name):
        if len(specs) == 1 and (stored := merger.checkpoint.plain(name)) is not None:
            return [Part(specs, stored)]
        if all(key in merger.checkpoint.stored for key in specs):
            tensors = {key: merger.checkpoint.stored[key] for key in specs}
            return [_copy(key, spec, tensors[key]) for key, spec in specs.items()]
    return [Part(specs, lambda: as_saved(model, name, merger.value(name)))]


def _copy(key: str, spec: Spec, stored: Any) -> Part:
    return Part(
        {key: spec}, (lambda: {key: stored}) if isinstance(stored, torch.Tensor) else stored
    )


def _write_config(
    directory: Path, inputs: MergeInput, model: Any, dtype: torch.dtype, *, untied: bool
) -> None:
    """Write what stands beside the weights, so that the directory is a model by itself."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if untied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(directory)
    write_former_rope(directory)
    _write_tokenizer(directory, inputs.tokens)
    if inputs.ignores_token_types:
        _leave_out_token_types(directory, inputs.tokenizer.model_input_names)
    gguf = inputs.source.kind == "gguf"
    own = None if gguf else local_directory(inputs.source) / "generation_config.json"
    if own is not None and own.is_file():
        shutil.copyfile(own, directory / own.name)
    elif model.can_generate():
        model.generation_config.save_pretrained(directory)


def _leave_out_token_types(directory: Path, names: Sequence[str]) -> None:
    """Let the tokenizer in `directory` return its inputs `names` but for `token_type_ids`."""
    path = directory / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["model_input_names"] = [name for name in names if name != "token_type_ids"]
        write_json(path, settings)


def _write_tokenizer(directory: Path, tokens: ModelSource) -> None:
    """Copy the tokenizer's files as they are; of a .gguf file, write what it holds."""
    if tokens.kind == "gguf":
        load_tokenizer(tokens).save_pretrained(directory)
        return
    folder = local_directory(tokens)
    for path in sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}):
        if path.is_file():
            target = directory / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
