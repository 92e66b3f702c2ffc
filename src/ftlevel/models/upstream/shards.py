"""Weights of which each process reads its own rows, once it is known which these are.

transformers' loader takes for a tensor whatever can be indexed and then cast. It is given what
stands for a tensor of the file until the model is shared out: the file's own memory, of which
nothing is read before it is looked at, or one NaN in the shape of all, where the file has another
type. What is made of a NaN is a NaN, so nothing can be computed from it without being seen.

Checkpoints of which each process writes and reads its own part, by torch.distributed.checkpoint.

They are safetensors, as torch and transformers call them: shard-00001-model-00001-of-00001 is the
first process's. Each file says which rows it has, so that another number of processes can read
them, too.

torch's DTensor: a tensor of which each process holds some rows.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, zeros

from ftlevel.artifacts.files import write_json
from ftlevel.models.upstream.conversions import Naming
from ftlevel.models.upstream.tensors import own_tensors

_OF = "{number}.{name}"
_MOST_BYTES = 2 << 30


class PartsWriter:
    """Writes parts while the processes go on, which all of them ask for at the same time.

    Everything is copied to the host's memory before anything is written. The thread that writes
    has a group of processes of its own: what it says there is not taken for a step's.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._copied: list[tuple[Any, Any]] = []
        self._begun: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1)

    def copy(self, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Take a copy of this process's part of `tensors`, which is for `directory`."""
        writer: Any = HuggingFaceStorageWriter(str(directory), save_distributed=True)
        self._copied.append((writer.stage(_distinct(tensors)), writer))

    def begin(self) -> None:
        """Begin to write what was copied."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        copied, self._copied = self._copied, []
        self._begun.append(self._thread.submit(self._write, copied))

    def _write(self, copied: list[tuple[Any, Any]]) -> None:
        while copied:
            parts, writer = copied.pop(0)
            save(parts, storage_writer=writer, process_group=self._group)

    def then(self, act: Callable[[], None]) -> None:
        """Have `act` done when what was begun before is written by all processes."""
        before = self._begun[-1]

        def follow() -> None:
            before.result()
            act()

        self._begun.append(self._thread.submit(follow))

    def end(self) -> None:
        """Wait for all that was begun.

        Raises:
            OSError: as of `write_parts`.
        """
        begun, self._begun = self._begun, []
        with _naming_failures():
            for future in begun:
                future.result()


def write_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write this process's part of `tensors`, as all do at the same time; of tied ones the first.

    Raises:
        OSError: in all of them, what one of them could not write; the first one says it.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _naming_failures():
        save(_distinct(tensors), storage_writer=writer)


@contextlib.contextmanager
def _naming_failures() -> Iterator[None]:
    """Raise inside the block what a process could not write, in all of them."""
    try:
        yield
    except CheckpointException as failed:
        error: Any = next(iter(failed.failures.values()))[0]
        error.is_told = distributed.get_rank() > 0
        raise error from None


def read_parts(tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Fill `tensors` (mutated) with this process's part of what lies in `directory`."""
    reader = HuggingFaceStorageReader(str(directory))
    load(_distinct(tensors), storage_reader=reader)


def put_together(directory: Path, out: Path) -> None:
    """Write the model whose parts are in `directory` to `out`, as any program reads it.

    A file of two gigabytes at most, or of one tensor, is held in memory at a time.
    """
    reader: Any = HuggingFaceStorageReader(str(directory))
    known = reader.read_metadata().state_dict_metadata
    files: list[list[str]] = [[]]
    size = 0
    for name, stored in known.items():
        own = stored.size.numel() * stored.properties.dtype.itemsize
        if files[-1] and size + own > _MOST_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += own
    places: dict[str, str] = {}
    for index, names in enumerate(files, 1):
        tensors = {n: torch.empty(known[n].size, dtype=known[n].properties.dtype) for n in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is one process
            load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
        file = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        if len(files) == 1:
            file = "model.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def _distinct(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return each of `tensors` once, by the first of its names."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name].detach() for name in names.values()}


def parts_of_state(
    state: Mapping[int, Mapping[str, Any]],
) -> tuple[dict[str, DTensor], dict[int, dict[str, Any]]]:
    """Return what of an optimizer's state each process has a part of, by name, and the rest."""
    parts = {
        _OF.format(number=number, name=name): value
        for number, values in state.items()
        for name, value in values.items()
        if isinstance(value, DTensor)
    }
    rest = {
        number: {name: v for name, v in values.items() if not isinstance(v, DTensor)}
        for number, values in state.items()
    }
    return parts, rest


def read_state(
    rest: Mapping[int, Mapping[str, Any]], parameters: list[torch.Tensor], directory: Path
) -> dict[int, dict[str, Any]]:
    """Return an optimizer's state of the `rest` and what `directory` has of it.

    Args:
        rest: what `parts_of_state` gave.
        parameters: of the optimizer, in its order.
        directory: where the parts were written.
    """
    stored: Any = HuggingFaceStorageReader(str(directory)).read_metadata()
    state = {number: dict(values) for number, values in rest.items()}
    parts = {}
    for key, known in stored.state_dict_metadata.items():
        number, _, name = key.partition(".")
        like: Any = parameters[int(number)]
        parts[key] = zeros(
            known.size, dtype=known.properties.dtype, device_mesh=like.device_mesh,
            placements=like.placements,
        )  # fmt: skip
        state.setdefault(int(number), {})[name] = parts[key]
    read_parts(parts, directory)
    return state


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, which all processes must ask for at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(all_of_it: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the rows of `all_of_it` that this process holds of `like`, which has its shape."""
    if not isinstance(like, DTensor):
        return all_of_it
    start, end = rows_of(like)
    return all_of_it[start:end]


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """Return the first row of `tensor` that this process holds, and the one after its last.

    fully_shard cuts along the first dimension, as torch.chunk does; the last parts may be empty.
    """
    rows, mesh = tensor.shape[0], tensor.device_mesh
    each, rank = -(-rows // mesh.size()), mesh.get_local_rank()
    return min(rank * each, rows), min((rank + 1) * each, rows)


_INDEX, _ONE_FILE = "model.safetensors.index.json", "model.safetensors"
_MATRIX = 2  # dimensions
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them


class StoredWeight:
    """A weight of a file, that is not read.

    Args:
        path: of the file.
        key: the weight's name in it.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._stands: torch.Tensor | None = None

    def __getitem__(self, everything: Any) -> StoredWeight:
        """Return itself, as the loader's `[...]` asks for all of it."""
        return self

    def to(self, *, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return what stands for it in `dtype`; it is real where the file has that type."""
        del device  # the host's
        stands = self._rows(slice(None))
        if stands.dtype != dtype:
            stands = torch.full((), torch.nan, dtype=dtype).expand(stands.shape)
        self._stands = stands
        return stands

    def _rows(self, rows: Any) -> torch.Tensor:
        """Return `rows` in the file's own memory, which is given back with the tensor."""
        with safe_open(str(self._path), framework="pt") as file:
            found: torch.Tensor = file.get_slice(self._key)[rows]
            return found

    def is_in(self, parameter: torch.Tensor) -> bool:
        """Whether `parameter` is what stands for it."""
        return self._stands is not None and self._stands.data_ptr() == parameter.data_ptr()

    @property
    def dtype(self) -> torch.dtype:
        """What the loader casts it to."""
        return (self._rows(slice(0)) if self._stands is None else self._stands).dtype

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all of it, read and cast as the loader would, and then to `dtype`."""
        return self._rows(slice(None)).to(self.dtype, copy=True).to(dtype)

    def rows(self, first: int, last: int, *, turned: bool = False) -> torch.Tensor:
        """Return the rows from `first` to before `last`, of what is `turned` over: its columns."""
        found = self._rows((slice(None), slice(first, last)) if turned else slice(first, last))
        return (found.T if turned else found).to(self.dtype).contiguous()

    def part(self, like: DTensor) -> DTensor:
        """Return it cut as `like` is: of the file this process's rows alone are read."""
        rows = self._rows(slice(*rows_of(like)))
        own = rows.to(like.device_mesh.device_type, like.dtype, copy=True)
        return DTensor.from_local(
            own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )


class Unread(Protocol):
    """What stands for a weight that is not read."""

    def part(self, like: DTensor) -> DTensor:
        """Return it cut as `like` is, which all processes ask for together."""


class Slices:
    """The weights of a base that are not read yet.

    Attributes:
        weights: parameter → the weight that it stands for.
        converted: names of the model's tensors that had to be read whole, since they are put
            together of what the checkpoint holds.
    """

    def __init__(self) -> None:
        self.weights: dict[nn.Parameter, Unread] = {}
        self.converted: list[str] = []

    def load(
        self,
        meta: Any,
        directory: Path,
        location: str,
        revision: str | None = None,
        key_mapping: Mapping[str, str] | None = None,
        **arguments: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Return what `from_pretrained` does, with weights that are not read.

        Args:
            meta: the model's shape.
            directory: where its files are.
            location: directory or Hub id, as `from_pretrained` takes it, like what follows.
            revision: of a Hub id.
            key_mapping: how names begin.
            arguments: further ones.
        """
        naming = Naming(meta, key_mapping)
        tensors = {name for name, _ in meta.named_parameters(remove_duplicate=False)}
        held, named = dict[str, Any](), dict[str, StoredWeight]()
        for path in _files(directory):
            file: Any = safe_open(str(path), framework="pt")
            for key in file.keys():  # noqa: SIM118 - it is no dict
                name, pattern = naming(key)
                stored = held[key] = file.get_slice(key)
                if name not in tensors or len(stored.get_shape()) < _MATRIX:
                    continue
                if pattern is not None:
                    self.converted.append(name)
                elif stored.get_dtype() in _FLOATS:
                    named[name] = held[key] = StoredWeight(path, key)
        config, own = arguments.pop("config"), type(meta)
        if not isinstance(config, own.config_class):  # of a model that sees, too
            config = config.get_text_config()
        model, info = own.from_pretrained(
            None, config=config, state_dict=held, key_mapping=key_mapping, **arguments
        )
        model.name_or_path = model.config.name_or_path = location
        if model.can_generate():
            model.adjust_generation_fn(
                None, True, None, location, revision=revision, cache_dir=None, token=None,
                force_download=False, proxies=None, subfolder="", trust_remote_code=False,
                local_files_only=arguments["local_files_only"],
            )  # fmt: skip
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in named and named[name].is_in(parameter):
                self.weights[parameter] = named[name]
        return model, info

    def read(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Give the parameters of `model` that are read, with their names."""
        return (pair for pair in model.named_parameters() if pair[1] not in self.weights)

    def fill(self, model: nn.Module, named: Callable[[str], str]) -> list[str]:
        """Read what `model` (mutated) trains in full of the weights that are not read yet.

        Args:
            model: with its method, which trains other tensors than the base's own.
            named: gives the name in the base of a tensor of the model.

        Returns:
            The tensors that were computed from what was not read.
        """
        bases = {
            named(name): stored
            for name, weight in model.named_parameters()
            if isinstance(stored := self.weights.get(weight), StoredWeight)
        }
        lost = [
            name
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and bool(buffer.isnan().any())
        ]
        for name, weight in model.named_parameters():
            if weight.requires_grad and bool(weight.detach().isnan().any()):
                if (own := bases.get(named(name))) is None:
                    lost.append(name)
                else:
                    weight.data = own.whole(weight.dtype)
                    self.weights.pop(weight, None)
        return lost

    def put_aside(
        self, parts: Sequence[nn.Module], keep: Collection[nn.Parameter]
    ) -> Callable[[], None]:
        """Leave the shapes of what is not read yet of `parts` (mutated).

        Args:
            parts: about to be shared out.
            keep: what is not.

        Returns:
            What reads this process's rows of it, when `parts` have been shared out.
        """
        waiting: list[tuple[dict[str, Any], str, Unread]] = []
        shapes: dict[nn.Parameter, nn.Parameter] = {}  # tied tensors stay so
        for module in (inner for part in parts for inner in part.modules()):
            own = own_tensors(module)[0]
            for name, weight in own.items():
                if weight is not None and weight in self.weights and weight not in keep:
                    if weight not in shapes:
                        empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                        shapes[weight] = nn.Parameter(empty, weight.requires_grad)
                    waiting.append((own, name, self.weights[weight]))
                    own[name] = shapes[weight]

        def read() -> None:
            filled: dict[nn.Parameter, nn.Parameter] = {}
            for own, name, stored in waiting:
                like = own[name]
                if like not in filled:
                    filled[like] = nn.Parameter(stored.part(like), like.requires_grad)
                own[name] = filled[like]

        return read


def _files(directory: Path) -> list[Path]:
    """Return the files of the checkpoint in `directory`, as `from_pretrained` finds them."""
    if (directory / _ONE_FILE).is_file():
        return [directory / _ONE_FILE]
    index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
    return [directory / name for name in sorted(set(index["weight_map"].values()))]
