"""Write a merged model tensor by tensor: load, merge and write one before loading the next."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.files import read_json, write_json
from ftlevel.errors import InputError, RunError, join_names
from ftlevel.events import Listener
from ftlevel.merging.merge_input import MergeInput
from ftlevel.methods.merging import Skeleton, build_skeleton
from ftlevel.models.hardware import DTYPES
from ftlevel.models.kinds import save_legacy_rope
from ftlevel.models.loading import build_task_model, load_tokenizer
from ftlevel.models.module_tree import get_heads
from ftlevel.models.quantization import QuantizationRounding
from ftlevel.models.sources import ModelSource
from ftlevel.models.upstream.architectures import tied_names, unsaved_names
from ftlevel.models.upstream.conversions import revert
from ftlevel.trained.adapt import resize_embeddings
from ftlevel.trained.generation import save_stop_ids
from ftlevel.weights.checkpoint import (
    TOKENIZER_FILES,
    Checkpoint,
    TensorPart,
    TensorSpec,
    copy_files,
    get_local_dir,
    get_tensor_info,
    open_base,
    write_files,
)

_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class MergedFiles:
    """Summary of a merged model's files.

    Attributes:
        merged: number of tensors that belong to an adapted module or were trained in full.
        changed: number of merged tensors that differ from the base's.
        unchanged: number of merged weights that are equal to the base's after rounding.
        untied: whether the output layer no longer shares the embedding's weight.
        unused: tensors of the base's checkpoint that the model does not use.
        stops: `added_stops` of the base's generation_config.json.
    """

    tensors: int
    merged: int
    unchanged: int
    untied: bool
    unused: list[str]
    size_bytes: int
    dtype: str
    stops: Mapping[str, int]
    changed: int


@dataclass
class TensorMerger:
    """Computes any tensor of the merged model from the base's file and the adapter.

    Attributes:
        shapes: tensor name in the model → shape, in the model's order.
        ties: tensor name in the model → name of the tensor that it is tied to.
        dtype: requested dtype of the weights; None keeps the base's.
        rounding: quantizes and dequantizes weights as in training; None keeps them as stored.
        unchanged: names of the tensors merged so far that are equal to the base's.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    dtype: torch.dtype | None
    rounding: QuantizationRounding | None
    unchanged: set[str] = field(default_factory=set)
    _unit: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def adapts(self, name: str) -> bool:
        """Whether the adapter changes or replaces the tensor `name`."""
        return name in self.skeleton.trained or self.skeleton.unit_of(name) is not None

    def tensor_info(self, name: str) -> TensorSpec:
        """Returns dtype and shape of the merged tensor `name` without computing it."""
        return TensorSpec(self._dtype_of(name), self.shapes[name])

    def value(self, name: str) -> torch.Tensor:
        """Returns the merged tensor `name`, rounded to the dtype in which it is written."""
        merged = self._merged(name)
        value = merged.to(self._dtype_of(name))
        if value.dtype == torch.float16 and (value.isinf() & ~merged.isinf()).any():
            raise InputError(
                f"{name} has values above float16's maximum of 65,504. Use --dtype bfloat16."
            )
        return value

    def unrounded(self, name: str) -> torch.Tensor | None:
        """Returns the merged tensor `name` before rounding; None if the model does not have it."""
        return self._merged(name) if name in self.shapes else None

    def loses_in(self, dtype: torch.dtype) -> bool:
        """Whether loading the base in `dtype` loses precision."""
        checkpoint_types = {self.checkpoint.spec(name).dtype for name in self.checkpoint.groups}
        return any(
            d.is_floating_point and torch.promote_types(d, dtype) != dtype for d in checkpoint_types
        )

    def _merged(self, name: str) -> torch.Tensor:
        value = self._compute_merged(name)
        has_new_rows = (
            self.checkpoint.has_tensor(name) and self.checkpoint.spec(name).shape != value.shape
        )
        if has_new_rows and not torch.isfinite(value).all():
            raise InputError(
                f"{name}: the adapter was trained with more tokens than its base has, and its file "
                "does not hold all of their rows here. They would be random. Train again with "
                "this layer in modules_to_save."
            )
        return value

    def _compute_merged(self, name: str) -> torch.Tensor:
        if name in self.skeleton.trained:
            tensor: torch.Tensor = self.skeleton.trained[name]
            return tensor
        unit = self.skeleton.unit_of(name)
        if unit is None:
            return self.base(name)
        if self._unit[0] != unit:
            self._unit = (unit, self._merge(unit))
        return self._unit[1][name]

    def base(self, name: str) -> torch.Tensor:
        """Returns the base's tensor `name` as saved, or as rounded by `rounding` if given."""
        if not self.checkpoint.has_tensor(name):  # bias of a new head, see check_complete
            return torch.zeros(self.shapes[name], dtype=self._dtype_of(name))
        value = self.checkpoint.read(name)
        value = value if self.rounding is None else self.rounding(name, value)
        return self._resize_rows(name, value) if value.shape != self.shapes[name] else value

    def _resize_rows(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Returns `value` with a row per token of the model; new ones are NaN, or 0 for a bias."""
        num_rows = self.shapes[name][0]
        fill = float("nan") if value.dim() > 1 else 0.0
        new = value.new_full((max(num_rows - len(value), 0), *value.shape[1:]), fill)
        return torch.cat([value, new])[:num_rows]

    def check_complete(self, heads: list[str], base: str) -> None:
        """Raise InputError if a tensor is in neither base nor adapter, except a bias of `heads`."""
        not_stored = [name for name in self.shapes if not self.checkpoint.has_tensor(name)]
        missing = [
            name
            for name in not_stored
            if not self.adapts(name)
            and not (name.endswith(".bias") and name.startswith(tuple(f"{h}." for h in heads)))
        ]
        if missing:
            raise InputError(
                f"--base {base} lacks {len(missing):,} weights of the model that was trained, and "
                f"the adapter does not have them: {join_names(missing, 3)}. They would be random. "
                "Check that it is the model that the adapter was trained on."
            )

    def copied(self, name: str) -> bool:
        """Whether the merged tensor `name` has the bytes of the base's file."""
        dtype = self.checkpoint.spec(name).dtype
        is_rounded = self.rounding is not None and (
            name in self.rounding.names
            or (dtype.is_floating_point and dtype != self.rounding.dtype)
        )
        is_same = self.checkpoint.spec(name) == self.tensor_info(name)
        return not self.adapts(name) and not is_rounded and is_same

    def _merge(self, unit: str) -> dict[str, torch.Tensor]:
        """Returns name → merged tensor of module `unit`, in float32 to keep small updates."""
        before: dict[str, torch.Tensor] = {}

        def read(name: str) -> torch.Tensor:
            value = self.base(name)
            before[name] = value.to(self._dtype_of(name), copy=True)
            return value.float() if value.is_floating_point() else value

        merged = self.skeleton.merge(unit, read)
        for name, value in before.items():
            if torch.equal(merged[name].to(value.dtype), value):
                self.unchanged.add(name)
        return merged

    def _dtype_of(self, name: str) -> torch.dtype:
        is_stored = self.checkpoint.has_tensor(name)
        dtype = self.checkpoint.spec(name).dtype if is_stored else self.main_dtype
        if self.dtype is not None and dtype.is_floating_point:
            return self.dtype
        return dtype

    @property
    def main_dtype(self) -> torch.dtype:
        """The dtype of most of the model's values."""
        if self.dtype is not None:
            return self.dtype
        num_values: Counter[torch.dtype] = Counter()
        for name in self.checkpoint.groups:
            info = self.checkpoint.spec(name)
            if info.dtype.is_floating_point:
                num_values[info.dtype] += info.nbytes // info.dtype.itemsize
        return num_values.most_common(1)[0][0]


def open_merger(
    inputs: MergeInput, dtype: str | None, rounding: Callable[[Any], QuantizationRounding] | None
) -> TensorMerger:
    """Open base and adapter for a merge, see `save_merged`; InputError if they do not fit."""
    ref = inputs.ref
    model = build_task_model(ref.model_config, ref.auto_class)
    resize_embeddings(model, ref.adapter_path)
    rounding_function = (
        rounding(build_task_model(ref.model_config, ref.auto_class)) if rounding else None
    )
    checkpoint = open_base(inputs.source, ref.model_config, ref.auto_class, model)
    ties = tied_names(model)
    ignored = set(unsaved_names(model) or ()) - set(ties)
    unused = tuple(f"{module}." for module in inputs.ref.configured_task.get_unused_modules(model))
    ignored |= {
        n for n in model.state_dict() if n.startswith(unused) and not checkpoint.has_tensor(n)
    }
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in ignored}
    heads = get_heads(model) if inputs.card.heads else []
    skeleton = build_skeleton(model, inputs.ref.adapter_path)
    torch_dtype = DTYPES[dtype] if dtype else None
    merger = TensorMerger(checkpoint, skeleton, shapes, ties, torch_dtype, rounding_function)
    merger.check_complete(heads, inputs.source.name)
    return merger


def save_merged(
    output_dir: Path,
    inputs: MergeInput,
    dtype: str | None,
    rounding: Callable[[Any], QuantizationRounding] | None,
    listener: Listener,
) -> tuple[MergedFiles, TensorMerger]:
    """Save the base of `inputs`, merged with its adapter, in the empty `output_dir`.

    `dtype` None keeps the base's. `rounding` maps the meta model to the rounding of training; None
    merges into the base as saved. Raises InputError if tensors do not belong to the model, and
    RunError if the merge changes nothing.
    """
    merger = open_merger(inputs, dtype, rounding)
    checkpoint, model = merger.checkpoint, merger.checkpoint.model
    ties, shapes = merger.ties, merger.shapes
    untied = _are_untied(merger, ties)
    names = [n for n in shapes if n not in ties or untied or n in checkpoint.groups]
    shards = _plan_files(merger, names)
    listener.begin(sum(map(len, shards.values())))
    done = itertools.count(1)
    size = write_files(output_dir, shards, lambda: listener.step(next(done)))
    merged = {name for name in names if merger.adapts(name)}
    if merged <= merger.unchanged:
        raise RunError(
            f"the merge changed nothing: the update of {inputs.ref.directory} is below rounding "
            f"in {str(merger.main_dtype).removeprefix('torch.')} in every tensor. Use --dtype "
            "float32, or train longer."
        )
    stops = _save_config(output_dir, inputs, model, merger.main_dtype, untied=untied)
    files = MergedFiles(
        sum(len(part.specs) for parts in shards.values() for part in parts),
        len(merged),
        sum(name.endswith("weight") for name in merger.unchanged),
        untied,
        checkpoint.unused,
        size,
        str(merger.main_dtype).removeprefix("torch."),
        stops,
        len(merged - merger.unchanged),
    )
    return files, merger


def _are_untied(merger: TensorMerger, ties: Mapping[str, str]) -> bool:
    """Whether tensors that are tied in the base differ after the merge."""
    return any(
        (merger.adapts(target) or merger.adapts(source))
        and not torch.equal(merger.value(target), merger.value(source))
        for target, source in ties.items()
    )


def _plan_files(merger: TensorMerger, names: list[str]) -> dict[str, list[TensorPart]]:
    """Returns file name → tensors to write, as in the base; new tensors are in the last file."""
    shards: dict[str, list[TensorPart]] = defaultdict(list)
    checkpoint, new = merger.checkpoint, []
    for name in names:
        if name in checkpoint.groups:
            shards[checkpoint.file(name) or _SINGLE] += _plan_tensor(merger, name)
        else:
            new += _plan_tensor(merger, name)
    files = sorted(shards) or [_SINGLE]
    shards[files[-1]] += new
    if len(files) == 1:
        return {_SINGLE: shards[files[0]]}
    return {name: shards[name] for name in files}


def _plan_tensor(merger: TensorMerger, name: str) -> list[TensorPart]:
    """Returns the file parts of tensor `name`; if nothing changes, bytes of the base's file."""
    model, names = merger.checkpoint.model, merger.checkpoint.names_with(name)
    if name != names[0]:
        return []  # stored together with the first
    saved = revert(model, {n: merger.tensor_info(n).meta() for n in names})
    specs = {key: get_tensor_info(tensor) for key, tensor in saved.items()}
    if merger.checkpoint.has_tensor(name) and all(map(merger.copied, names)):
        if len(specs) == 1 and (stored := merger.checkpoint.plain(name)) is not None:
            return [TensorPart(specs, stored)]
        if all(key in merger.checkpoint.stored for key in specs):
            tensors = {key: merger.checkpoint.stored[key] for key in specs}
            return [_copy(key, spec, tensors[key]) for key, spec in specs.items()]
    return [TensorPart(specs, lambda: revert(model, {n: merger.value(n) for n in names}))]


def _copy(key: str, info: TensorSpec, stored: Any) -> TensorPart:
    return TensorPart(
        {key: info}, (lambda: {key: stored}) if isinstance(stored, torch.Tensor) else stored
    )


def _save_config(
    output_dir: Path, inputs: MergeInput, model: Any, dtype: torch.dtype, *, untied: bool
) -> dict[str, int]:
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if untied:
        config.tie_word_embeddings = False
        config.get_text_config().tie_word_embeddings = False
    config.save_pretrained(output_dir)
    save_legacy_rope(output_dir)
    copy_tokenizer(output_dir, inputs.ref.tokenizer_source)
    if inputs.ignores_token_types:
        _remove_token_types(output_dir, inputs.tokenizer.model_input_names)
    gguf = inputs.source.kind == "gguf"
    generation_config = None if gguf else get_local_dir(inputs.source) / "generation_config.json"
    if generation_config is not None and generation_config.is_file():
        shutil.copyfile(generation_config, output_dir / generation_config.name)
    elif model.can_generate():
        model.generation_config.save_pretrained(output_dir)
    return save_stop_ids(output_dir, inputs.tokenizer) if model.can_generate() else {}


def _remove_token_types(output_dir: Path, names: Sequence[str]) -> None:
    path = output_dir / "tokenizer_config.json"
    if path.is_file():
        config = read_json(path)
        config["model_input_names"] = [name for name in names if name != "token_type_ids"]
        write_json(path, config)


def copy_tokenizer(output_dir: Path, tokens: ModelSource) -> None:
    """Copy the tokenizer's files; for a .gguf base, save the loaded tokenizer."""
    if tokens.kind == "gguf":
        load_tokenizer(tokens).save_pretrained(output_dir)
        return
    copy_files(get_local_dir(tokens), output_dir, TOKENIZER_FILES)
