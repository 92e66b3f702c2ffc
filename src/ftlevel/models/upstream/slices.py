"""Weights of which each process reads its own rows, once it is known which these are.

transformers' loader takes for a tensor whatever can be indexed and then cast. It is given what
stands for a tensor of the file until the model is shared out: the file's own memory, of which
nothing is read before it is looked at, or one NaN in the shape of all, where the file has another
type. What is made of a NaN is a NaN, so nothing can be computed from it without being seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from ftlevel.models.upstream.conversions import Naming
from ftlevel.models.upstream.shards import rows_of
from ftlevel.models.upstream.tensors import own_tensors

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
