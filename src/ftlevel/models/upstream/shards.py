"""Sharded reading and writing of weights, checkpoints and optimizer state.

Until a model is sharded, unread weights are memory-mapped file tensors, or expanded NaN if the
dtype differs, so that accidental use is visible. Distributed checkpoints are safetensors files like
shard-00001-model-00001-of-00001. Each records its rows, so the number of processes can change.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, zeros

from ftlevel.artifacts.files import read_json, write_json
from ftlevel.models.upstream.conversions import KeyMapper
from ftlevel.models.upstream.tensors import direct_tensors

_OF = "{number}.{name}"
_MAX_FILE_BYTES = 2 << 30


class AsyncCheckpointWriter:
    """Writes distributed checkpoints in a thread; all processes must make the same calls.

    Tensors are copied to CPU memory before writing. The writer thread has its own process group, so
    its messages do not mix with those of training steps.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._staged: list[tuple[Any, Any]] = []
        self._futures: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1)

    def copy(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Copy this process's shards of `tensors`; `begin` writes them to the directory `path`."""
        writer: Any = HuggingFaceStorageWriter(str(path), save_distributed=True)
        self._staged.append((writer.stage(_distinct(tensors)), writer))

    def begin(self) -> None:
        """Start writing the copied tensors."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        staged, self._staged = self._staged, []
        self._futures.append(self._thread.submit(self._write, staged))

    def _write(self, staged: list[tuple[Any, Any]]) -> None:
        while staged:
            tensors, writer = staged.pop(0)
            save(tensors, storage_writer=writer, process_group=self._group)

    def then(self, act: Callable[[], None]) -> None:
        """Run `act` in the writer thread once all processes have finished the pending writes."""
        before = self._futures[-1]

        def follow() -> None:
            before.result()
            act()

        self._futures.append(self._thread.submit(follow))

    def end(self) -> None:
        """Wait for all pending writes; if one process failed, all raise its `OSError`."""
        futures, self._futures = self._futures, []
        with _share_errors():
            for future in futures:
                future.result()


def save_distributed_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Save this process's shards (collective); if one process fails, all raise its `OSError`."""
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    with _share_errors():
        save(_distinct(tensors), storage_writer=writer)


@contextlib.contextmanager
def _share_errors() -> Iterator[None]:
    """If one process fails to write in the `with` block, raise the same error in all processes."""
    try:
        yield
    except CheckpointException as failed:
        error: Any = next(iter(failed.failures.values()))[0]
        error.is_reported = distributed.get_rank() > 0
        raise error from None


def load_distributed_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load this process's shards of the checkpoint `path` into `tensors` (modified)."""
    load(_distinct(tensors), storage_reader=HuggingFaceStorageReader(str(path)))


def merge_shards(path: Path, out: Path) -> None:
    """Merge a distributed checkpoint to ordinary safetensors files in `out`."""
    reader: Any = HuggingFaceStorageReader(str(path))
    metadata = reader.read_metadata().state_dict_metadata
    files: list[list[str]] = [[]]
    size = 0
    for name, stored in metadata.items():
        tensor_size = stored.size.numel() * stored.properties.dtype.itemsize
        if files[-1] and size + tensor_size > _MAX_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor_size
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files, 1):
        tensors = {
            n: torch.empty(metadata[n].size, dtype=metadata[n].properties.dtype) for n in names
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # warns about a single process
            load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
        file = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            file = "model.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in names.values()}


def split_optimizer_state(
    state: Mapping[int, Mapping[str, Any]],
) -> tuple[dict[str, DTensor], dict[int, dict[str, Any]]]:
    """Returns the sharded tensors of an optimizer state by name, and the state without them."""
    sharded = {
        _OF.format(number=number, name=name): value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, DTensor)
    }
    unsharded = {
        number: {name: v for name, v in values.items() if not isinstance(v, DTensor)}
        for number, values in state.items()
    }
    return sharded, unsharded


def load_optimizer_state(
    unsharded: Mapping[int, Mapping[str, Any]], parameters: list[Tensor], path: Path
) -> dict[int, dict[str, Any]]:
    """Returns the optimizer state: `unsharded`, with the sharded tensors of checkpoint `path`."""
    checkpoint_metadata: Any = HuggingFaceStorageReader(str(path)).read_metadata()
    state = {number: dict(values) for number, values in unsharded.items()}
    sharded = {}
    for key, metadata in checkpoint_metadata.state_dict_metadata.items():
        number, _, name = key.partition(".")
        like: Any = parameters[int(number)]
        sharded[key] = zeros(
            metadata.size,
            dtype=metadata.properties.dtype,
            device_mesh=like.device_mesh,
            placements=like.placements,
        )
        state.setdefault(int(number), {})[name] = sharded[key]
    load_distributed_checkpoint(sharded, path)
    return state


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of `tensor`; an unsharded tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns the full tensor of a sharded one (a collective operation); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(full_tensor: Tensor, like: Tensor) -> Tensor:
    """Returns the rows of `full_tensor` that this process has of the sharded tensor `like`."""
    if not isinstance(like, DTensor):
        return full_tensor
    start, end = rows_of(like)
    return full_tensor[start:end]


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """Returns the rows `[start, end)` of `tensor` on this process, split like torch.chunk."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each, rank = -(-rows // mesh.size()), mesh.get_local_rank()
    return min(rank * each, rows), min((rank + 1) * each, rows)


_INDEX, _ONE_FILE = "model.safetensors.index.json", "model.safetensors"
_MATRIX = 2  # dimensions
_SUPPORTED_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors dtype names


class LazyWeight:
    """Weight in a safetensors file that is loaded on demand, with a placeholder until then."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._placeholder: Tensor | None = None

    def __getitem__(self, everything: Any) -> LazyWeight:
        return self

    def to(self, *, device: Any, dtype: torch.dtype) -> Tensor:
        """Returns the placeholder: NaN in `dtype`, or the file's tensor if it has that dtype."""
        del device  # always on the CPU
        placeholder = self._rows(slice(None))
        if placeholder.dtype != dtype:
            placeholder = torch.full((), torch.nan, dtype=dtype).expand(placeholder.shape)
        self._placeholder = placeholder
        return placeholder

    def _rows(self, rows: Any) -> Tensor:
        with safe_open(str(self._path), framework="pt") as file:
            return file.get_slice(self._key)[rows]

    def is_in(self, parameter: Tensor) -> bool:
        """Returns whether `parameter` shares the memory of this weight's placeholder."""
        return (
            self._placeholder is not None and self._placeholder.data_ptr() == parameter.data_ptr()
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype to which transformers' loader casts the weight."""
        return (self._rows(slice(0)) if self._placeholder is None else self._placeholder).dtype

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Returns the full weight, cast as by transformers' loader and then to `dtype`."""
        return self._rows(slice(None)).to(self.dtype, copy=True).to(dtype)

    def rows(self, first: int, last: int, *, transposed: bool = False) -> Tensor:
        """Returns rows `first` to `last` (exclusive), of the transposed weight if `transposed`."""
        rows = self._rows((slice(None), slice(first, last)) if transposed else slice(first, last))
        return (rows.T if transposed else rows).to(self.dtype).contiguous()

    def part(self, like: DTensor) -> DTensor:
        """Returns the weight sharded like `like`, reading only this process's rows."""
        rows = self._rows(slice(*rows_of(like)))
        shard = rows.to(like.device_mesh.device_type, like.dtype, copy=True)
        return DTensor.from_local(
            shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )


class LazyTensor(Protocol):
    """A weight that is not loaded yet."""

    def part(self, like: DTensor) -> DTensor:
        """Returns the weight sharded like `like`; a collective operation."""


class LazyWeights:
    """Weights of a base model that are not loaded yet: placeholder parameter → lazy weight.

    `converted` names tensors that were loaded in full, because they combine several stored tensors.
    """

    def __init__(self) -> None:
        self.weights: dict[nn.Parameter, LazyTensor] = {}
        self.converted: list[str] = []

    def load(
        self,
        meta: Any,
        checkpoint_dir: Path,
        location: str,
        revision: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the model with lazy weights, and loading info, like `from_pretrained`."""
        naming = KeyMapper(meta, key_mapping)
        tensors = {name for name, _ in meta.named_parameters(remove_duplicate=False)}
        state_dict, unread = dict[str, Any](), dict[str, LazyWeight]()
        for path in _files(checkpoint_dir):
            file: Any = safe_open(str(path), framework="pt")
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name, pattern = naming(key)
                stored = state_dict[key] = file.get_slice(key)
                if name not in tensors or len(stored.get_shape()) < _MATRIX:
                    continue
                if pattern is not None:
                    self.converted.append(name)
                elif stored.get_dtype() in _SUPPORTED_DTYPES:
                    unread[name] = state_dict[key] = LazyWeight(path, key)
        config, model_class = arguments.pop("config"), type(meta)
        if not isinstance(config, model_class.config_class):  # of a multimodal model
            config = config.get_text_config()
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=state_dict, key_mapping=key_mapping, **arguments
        )
        model.name_or_path = model.config.name_or_path = location
        if model.can_generate():
            model.adjust_generation_fn(
                None,
                True,
                None,
                location,
                revision=revision,
                cache_dir=None,
                token=None,
                force_download=False,
                proxies=None,
                subfolder="",
                trust_remote_code=False,
                local_files_only=arguments["local_files_only"],
            )
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in unread and unread[name].is_in(parameter):
                self.weights[parameter] = unread[name]
        return model, info

    def read(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter) of the parameters of `model` that are already loaded."""
        return (pair for pair in model.named_parameters() if pair[1] not in self.weights)

    def fill(self, model: nn.Module, base_name: Callable[[str], str]) -> list[str]:
        """Load the lazy weights that `model` (modified) trains; returns names of tensors still NaN.

        The latter depend on weights not loaded. `base_name` maps names in `model` to base names.
        """
        bases = {
            base_name(name): stored
            for name, weight in model.named_parameters()
            if isinstance(stored := self.weights.get(weight), LazyWeight)
        }
        missing = [
            name
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and bool(buffer.isnan().any())
        ]
        for name, weight in model.named_parameters():
            if weight.requires_grad and bool(weight.detach().isnan().any()):
                if (stored_weight := bases.get(base_name(name))) is None:
                    missing.append(name)
                else:
                    weight.data = stored_weight.whole(weight.dtype)
                    self.weights.pop(weight, None)
        return missing

    def defer(
        self, parts: Sequence[nn.Module], keep: Collection[nn.Parameter]
    ) -> Callable[[], None]:
        """Replace the lazy weights of `parts` (modified) by meta tensors, except those in `keep`.

        Returns a function to call after sharding, which loads this process's rows of each weight.
        """
        pending: list[tuple[dict[str, Any], str, LazyTensor]] = []
        shapes: dict[nn.Parameter, nn.Parameter] = {}  # tied tensors stay tied
        for module in (inner for part in parts for inner in part.modules()):
            parameters = direct_tensors(module)[0]
            for name, weight in parameters.items():
                if weight is not None and weight in self.weights and weight not in keep:
                    if weight not in shapes:
                        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                        shapes[weight] = nn.Parameter(empty, weight.requires_grad)
                    pending.append((parameters, name, self.weights[weight]))
                    parameters[name] = shapes[weight]

        def read() -> None:
            replaced: dict[nn.Parameter, nn.Parameter] = {}
            for parameters, name, stored in pending:
                like = parameters[name]
                if like not in replaced:
                    replaced[like] = nn.Parameter(stored.part(like), like.requires_grad)
                parameters[name] = replaced[like]

        return read


def _files(path: Path) -> list[Path]:
    if (path / _ONE_FILE).is_file():
        return [path / _ONE_FILE]
    index = read_json(path / _INDEX)
    return [path / name for name in sorted(set(index["weight_map"].values()))]
