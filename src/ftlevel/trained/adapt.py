"""Apply a PEFT method to a loaded model, and save and load adapters.

Adapters in the formats of other libraries are read by the `adapter_readers` of extensions. If
training resized the vocabulary, PEFT saves the resized embeddings, or only the trained rows, with
the adapter. The base must be resized before it is loaded. An adapter is rejected if its file lacks
new rows, because they would be random.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.config import MethodConfig
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names
from ftlevel.extensions import loaded
from ftlevel.methods import METHODS, Base, ensure_registered
from ftlevel.methods.base import shortest_names
from ftlevel.methods.merging import read_peft_config
from ftlevel.models.loading import check_finite
from ftlevel.models.untrusted import FROM_READERS, check_patterns


class ForeignAdapter(Protocol):
    """An adapter in a different library's format, before the weights are loaded."""

    @property
    def base(self) -> str:
        """Name of the base model."""

    @property
    def heads(self) -> Sequence[str]:
        """Modules that are saved with the adapter in full."""

    def task(self, wanted: str | None) -> str:
        """Returns the adapter's task, or `wanted` if it has none; InputError if they differ."""

    def complete(self, card: AdapterCard) -> AdapterCard:
        """Returns the base's card with the labels and options of the adapter added."""

    def convert(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the PEFT config and the weights by PEFT names; does not change `model`, the base.

        Raises InputError if the adapter is corrupted, of a different base, or not supported.
        """


class AdapterReader(Protocol):
    """Reader of adapters in one format of another library.

    Attributes:
        kind: name of the format, as in `Extension.adapter_readers`.
        name: name of the format in messages.
        library: library that writes it, in messages.
        peft_type: PEFT type that all its adapters are converted to.
    """

    kind: str
    name: str
    library: str
    peft_type: str

    def recognizes(self, directory: Path) -> bool:
        """Returns whether the adapter in `directory` has this format."""

    def read(self, directory: Path) -> ForeignAdapter:
        """Load an adapter; raise InputError if it is invalid or names no base."""


@functools.cache
def _readers() -> list[AdapterReader]:
    return list(loaded("adapter_readers").values())


def find_reader(directory: Path) -> AdapterReader | None:
    """Returns the reader of the adapter in `directory`; None if it is in PEFT's format."""
    return next((reader for reader in _readers() if reader.recognizes(directory)), None)


WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def resize_vocabulary(model: Any, directory: Path) -> int | None:
    """Resize the embeddings of `model` (modified) to the vocabulary size of the adapter.

    Added rows are NaN until `check_new_rows`. Returns the former number of rows; None if unchanged.
    """
    former_rows = _rows(model)
    requested = read_vocabulary_size(model, directory) if former_rows else None
    if former_rows is None or requested is None or requested == former_rows:
        return None
    model.resize_token_embeddings(requested, mean_resizing=False)
    for layer in _embeddings(model):
        layer.weight.data[former_rows:] = float("nan")
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[former_rows:] = 0.0
    return former_rows


def check_new_rows(model: Any, former_rows: int | None, directory: Path) -> None:
    """Raise InputError if the adapter lacks embedding rows that `resize_vocabulary` added.

    In the base, added rows are replaced by the adapter; they change from NaN to the mean row.
    """
    import torch

    rows = _rows(model)
    if former_rows is None or rows is None or rows <= former_rows:
        return
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        outputs = {
            "embedding": inputs(torch.arange(former_rows, rows, device=inputs.weight.device))
        }
        if output is not None:
            width = output.weight.shape[-1]
            ones = torch.ones(1, width, dtype=output.weight.dtype, device=output.weight.device)
            outputs["output layer"] = output(ones)[:, former_rows:]
        for layer_name, values in outputs.items():
            if not torch.isfinite(values).all():
                raise InputError(
                    f"{directory} was trained with {rows - former_rows:,} more tokens than its "
                    f"base has, and has no rows of the {layer_name} for them. They would be "
                    f"random. Train again with that layer in modules_to_save."
                )
        for layer in _embeddings(model):
            weight = _plain(layer).weight
            new = weight.data[former_rows:]
            is_unset = torch.isnan(new).any(-1)
            new[is_unset] = weight.data[:former_rows].float().mean(0).to(weight.dtype)


def find_vocabulary_mismatch(model: Any, directory: Path) -> str | None:
    """Returns why the adapter's vocabulary size does not match that of `model`; None if it does."""
    rows, requested = _rows(model), read_vocabulary_size(model, directory)
    if rows is None or requested in (None, rows):
        return None
    return f"it was trained with {requested:,} tokens, and here are {rows:,}"


def read_vocabulary_size(model: Any, directory: Path) -> int | None:
    """Returns the vocabulary size in training, from the adapter's files; None if they lack it."""
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = tuple(f"{names[id(layer)]}." for layer in _embeddings(model) if id(layer) in names)
    sizes = [
        rows
        for name, shape in _shapes(directory / WEIGHTS).items()
        if name.removeprefix(_PREFIX).startswith(prefixes)
        and (rows := _rows_of(name, shape)) is not None
    ]
    if sizes:
        return max(sizes)
    highest = max(_trained_indices(directory), default=-1) + 1
    base_rows = _rows(model) or 0
    return highest if highest > base_rows else None


def _rows_of(name: str, shape: list[int]) -> int | None:
    """Returns the row count of matrix `name`, or of the matrix that LoRA factor `name` updates."""
    suffix = name.rpartition(".")[2]
    if suffix == "lora_embedding_A":
        return shape[1]
    if suffix != "weight" or len(shape) != 2 or (".lora_" in name and ".lora_B." not in name):
        return None
    return shape[0]


def _trained_indices(directory: Path) -> Iterator[int]:
    config = read_peft_config(directory)
    for key in ("trainable_token_indices", "token_indices"):
        value = config.get(key) or []
        for indices in value.values() if isinstance(value, Mapping) else [value]:
            yield from indices


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _rows(model: Any) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    layer = get() if get is not None else None
    weight = getattr(layer, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _embeddings(model: Any) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in layers if layer is not None]


def _plain(layer: Any) -> Any:
    """Returns the original layer that the adapter layer `layer` wraps."""
    for name in ("token_adapter", "original_module", "base_layer"):
        inner = getattr(layer, name, None)
        if inner is not None:
            return _plain(inner)
    return layer


def apply_method(model: Any, method: MethodConfig, base: Base, *, fused: bool = False) -> Any:
    """Returns `model` with the parameters of `method` trainable in float32 and all others frozen.

    Modifies `model`, which may be on the meta device. With `fused`, LoRA layers compute base and
    update in one function. Raises ConfigError if PEFT cannot adapt a target.
    """
    import peft

    definition = METHODS[method.kind]
    if not definition.is_adapter:
        definition.unfreeze(method, base, model)
        return model
    is_meta = next(model.parameters()).is_meta
    targets = compact_targets(model, base.targets)
    config = definition.build(method, replace(base, targets=targets))
    if fused:
        from ftlevel.fast.fused_lora import register_fused_layers  # imports bitsandbytes

        register_fused_layers(config)
    try:
        with _unknown_patterns_ignored():
            peft_model = peft.get_peft_model(model, config, low_cpu_mem_usage=is_meta)
    except (ValueError, TypeError, NotImplementedError) as error:
        if "Target module" not in str(error):
            raise
        raise ConfigError(
            f"--method {method.kind}: PEFT cannot adapt a module of {base.config.model_type} "
            f"({' '.join(str(error).split())[:120]} …). Name others by --target-modules, or use "
            "another --method."
        ) from error
    check_placed(peft_model, method.kind, base)
    definition.prepare(peft_model)
    train_in_float32(peft_model)
    return peft_model


def check_placed(peft_model: Any, method: str, base: Base) -> None:
    """Raise ConfigError if PEFT did not adapt all requested modules.

    For families with fused experts in transformers 5, PEFT 0.21 applies names such as `gate_proj`
    to the experts, even if a dense layer or shared expert was requested.
    """
    import peft

    targeted = getattr(peft_model.base_model, "targeted_module_names", None)
    if not base.targets or targeted is None:
        return
    parts = [name.split(".") for name in targeted]
    suffixes = {".".join(names[at:]) for names in parts for at in range(len(names))}
    missing = sorted(set(base.targets) - suffixes)
    if missing:
        names = sorted({name.rpartition(".")[2] for name in missing})
        others = sorted({name.rpartition(".")[2] for name in base.targets} - set(names))
        raise ConfigError(
            f"--method {method} on {base.config.model_type}: PEFT {peft.__version__} takes "
            f"{join_names(names)} for the experts' tensors, and {len(missing):,} linears of that "
            f"name, such as {missing[0]}, would stay as they are. Use --target-modules "
            f"{','.join(others)}."
        )


def finish_method(model: Any, method: MethodConfig) -> None:
    """Remove the parts of the trained `model` (modified) that only training needs."""
    METHODS[method.kind].finish(model)


def train_in_float32(model: Any) -> None:
    """Convert every trainable parameter of `model` (modified) to float32.

    In bfloat16, rounding would lose most of AdamW's small updates.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compact_targets(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Returns the shortest names that the PEFT suffix match resolves to exactly `targets`."""
    return sorted(shortest_names(targets, (name for name, _ in model.named_modules())))


def copy_start(model: Any, method: MethodConfig) -> dict[str, Any]:
    """Returns the initial state of `model` that `save_adapter` needs; may be empty."""
    return METHODS[method.kind].initialization.copy(model)


def save_adapter(
    model: Any, method: MethodConfig, directory: Path, initial_state: dict[str, Any]
) -> None:
    """Save the adapter for use on the unchanged base.

    `initial_state` is the result of `copy_start`.
    """
    with METHODS[method.kind].initialization.as_saved(model, initial_state) as state:
        # "auto" would query the Hub to find out whether the vocabulary was resized.
        more = {} if state is None else {"state_dict": state}
        model.save_pretrained(str(directory), save_embedding_layers=False, **more)


def load_adapter(base: Any, directory: Path, name: str = "default") -> Any:
    """Load the adapter in `directory` onto `base` (modified), in eval mode with float32 weights.

    Raises:
        InputError: the adapter is corrupted, of unknown type, or of a different base; or weights
            are missing or unexpected.
    """
    import peft

    ensure_registered()
    if (reader := find_reader(directory)) is not None:
        config, weights = reader.read(directory).convert(base)
        peft_model = peft.get_peft_model(base, config, adapter_name=name)
        _fill_adapter(peft_model, weights, directory, name)
        return _frozen(peft_model)
    weights = _read_whole(directory)
    if (put_on := _plain_loader(directory)) is not None:
        return put_on(base, directory, name)
    check_patterns(directory, read_peft_config(directory), base)
    former_rows = resize_vocabulary(base, directory)
    # Load as trainable: PEFT then marks the adapter's parameters, and AdaLoRA requires it.
    try:
        with _unknown_patterns_ignored():
            peft_model = peft.PeftModel.from_pretrained(
                base, str(directory), adapter_name=name, is_trainable=True
            )
    except (*FROM_READERS, RuntimeError) as error:  # modules or shapes differ
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory} does not fit its base model, {base.config.model_type} "
            f"({reason[:200]}). Name the base that it was trained on."
        ) from error
    _fill_adapter(peft_model, weights, directory, name)
    check_new_rows(peft_model.get_base_model(), former_rows, directory)
    return _frozen(peft_model)


def load_initial_weights(peft_model: Any, directory: Path) -> None:
    """Load the weights in `directory` into the untrained adapter of `peft_model` (modified).

    Raises InputError if the weights are corrupted or do not match the adapter.
    """
    _fill_adapter(peft_model, _read_whole(directory), directory, "default")


def describe_state(peft_model: Any) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Returns the tensor names that an adapter file must have, and name → shape of all allowed."""
    import peft

    needed, allowed = (
        peft.get_peft_model_state_dict(peft_model, save_embedding_layers=with_embeddings)
        for with_embeddings in (False, True)
    )
    return set(needed), {name: tuple(tensor.shape) for name, tensor in allowed.items()}


def _frozen(peft_model: Any) -> Any:
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _plain_loader(directory: Path) -> Callable[[Any, Path, str], Any] | None:
    """Returns ftlevel's loader for the adapter's PEFT type, if any; None to use PEFT's."""
    import peft

    peft_type = read_peft_config(directory)["peft_type"]
    for method in METHODS.values():
        if peft_type in method.plain_loaders:
            return method.plain_loaders[peft_type]
    if issubclass(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], peft.PromptLearningConfig):
        raise InputError(
            f"{directory} is an adapter of type {peft_type}, which PEFT {peft.__version__} "
            f"applies at every generation step with transformers 5. Train one with --method "
            f"prefix or prompt."
        )
    return None


def add_adapter(peft_model: Any, directory: Path, name: str) -> None:
    """Load another adapter into `peft_model` (modified) without activating it.

    Raises InputError if it is incomplete or not compatible with those already loaded.
    """
    config: Any = None
    if (reader := find_reader(directory)) is not None:
        config, weights = reader.read(directory).convert(peft_model.get_base_model())
    else:
        weights = _read_whole(directory)
        check_patterns(directory, read_peft_config(directory), peft_model.get_base_model())
        problem = find_vocabulary_mismatch(peft_model.get_base_model(), directory)
        if problem is None and _plain_loader(directory) is not None:
            problem = "a prompt that plain PEFT trained is read alone"
        if problem is not None:
            raise InputError(
                f"{directory} cannot be loaded together with the others: {problem}. Use it alone."
            )
    with _unknown_patterns_ignored():
        try:
            if config is not None:
                peft_model.add_adapter(name, config)
            else:
                peft_model.load_adapter(str(directory), adapter_name=name, is_trainable=True)
        except FROM_READERS as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{directory} cannot be loaded together with the others: {reason}"
            ) from None
    _fill_adapter(peft_model, weights, directory, name)
    _frozen(peft_model)


def _read_whole(directory: Path) -> dict[str, Any]:
    """Read the PEFT weights; InputError if they are missing, corrupted, non-finite or unknown."""
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    peft_type = read_peft_config(directory)["peft_type"]
    if peft_type not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{directory} is an adapter of type {peft_type!r}, which PEFT {peft.__version__} does "
            f"not support.{did_you_mean(peft_type, peft.PEFT_TYPE_TO_CONFIG_MAPPING)} It may need "
            f"a newer PEFT."
        )
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{directory} contains no adapter_model.safetensors. Save the adapter again with "
            f"PEFT's save_pretrained."
        )
    try:
        weights = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}). Is the copy incomplete?") from None
    check_finite(weights.items(), str(path))
    return dict(weights)


def _fill_adapter(peft_model: Any, weights: dict[str, Any], directory: Path, name: str) -> None:
    """Load `weights` into `peft_model` (modified), in float32; InputError if they do not match."""
    import peft

    train_in_float32(peft_model)
    # PEFT casts a head to the base's precision, so the float32 weights are loaded again.
    with _ranks_applied(peft_model.peft_config[name]):
        try:
            peft.set_peft_model_state_dict(peft_model, weights, adapter_name=name)
        except RuntimeError as error:  # shapes differ
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{directory} does not fit its base model: {reason}") from None
    expected, allowed = (
        set(
            peft.get_peft_model_state_dict(
                peft_model, save_embedding_layers=with_embeddings, adapter_name=name
            )
        )
        for with_embeddings in (False, True)  # PEFT also saves adapted or resized embeddings
    )
    names = set(weights)
    missing, unknown = expected - names, names - expected - allowed
    if missing or unknown:
        differing = sorted(missing | unknown)
        raise InputError(
            f"{directory}: {len(missing):,} weights of the adapter are missing and "
            f"{len(unknown):,} are unknown, such as {differing[0]}. The adapter does not belong to "
            "this base model."
        )


@contextlib.contextmanager
def _unknown_patterns_ignored() -> Iterator[None]:
    """Silence PEFT's warning about unknown rank patterns; it is wrong for AdaLoRA's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        yield


@contextlib.contextmanager
def _ranks_applied(config: Any) -> Iterator[None]:
    """Hide AdaLoRA's rank pattern in the `with` block, so that PEFT does not prune again."""
    pattern = getattr(config, "rank_pattern", None)
    if pattern:
        config.rank_pattern = None
    try:
        yield
    finally:
        if pattern:
            config.rank_pattern = pattern
