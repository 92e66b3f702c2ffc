"""Apply a PEFT method to a loaded model, and save and load adapters.

If training resized the vocabulary, PEFT saves the resized embeddings, or only the trained rows,
with the adapter. The base must be resized before it is loaded. An adapter is rejected if its file
lacks new rows, because they would be random.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.files import read_json_object
from ftlevel.config import MethodConfig
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names
from ftlevel.methods import METHODS, Base, ensure_registered
from ftlevel.methods.base import shortest_names
from ftlevel.methods.merging import WEIGHTS, load_peft_config
from ftlevel.models.hardware import autocast
from ftlevel.models.loading import check_finite
from ftlevel.models.untrusted import FROM_READERS, check_patterns

_PREFIX = "base_model.model."


def resize_embeddings(model: Any, adapter_dir: Path) -> int | None:
    """Resize the embeddings of `model` (modified) to the adapter's vocabulary size.

    Added rows are NaN until `check_new_embeddings`. Returns the old size; None if it is unchanged.
    """
    old_vocab_size = _get_vocab_size(model)
    requested = get_adapter_vocab_size(model, adapter_dir) if old_vocab_size else None
    if old_vocab_size is None or requested is None or requested == old_vocab_size:
        return None
    model.resize_token_embeddings(requested, mean_resizing=False)
    for layer in _embeddings(model):
        layer.weight.data[old_vocab_size:] = float("nan")
        if getattr(layer, "bias", None) is not None:
            layer.bias.data[old_vocab_size:] = 0.0
    return old_vocab_size


def check_new_embeddings(model: Any, old_vocab_size: int | None, adapter_dir: Path) -> None:
    """Raise InputError if the adapter lacks rows that `resize_embeddings` added.

    In the base, the added rows change from NaN to the mean of the old rows.
    """
    vocab_size = _get_vocab_size(model)
    if old_vocab_size is None or vocab_size is None or vocab_size <= old_vocab_size:
        return
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        new_ids = torch.arange(old_vocab_size, vocab_size, device=inputs.weight.device)
        outputs = {"embedding": inputs(new_ids)}
        if output is not None:
            width = output.weight.shape[-1]
            ones = torch.ones(1, width, dtype=output.weight.dtype, device=output.weight.device)
            outputs["output layer"] = output(ones)[:, old_vocab_size:]
        for layer_name, values in outputs.items():
            if not torch.isfinite(values).all():
                raise InputError(
                    f"{adapter_dir} was trained with {vocab_size - old_vocab_size:,} more tokens "
                    f"than its base has, and has no rows of the {layer_name} for them. They would "
                    "be random. Train again with that layer in modules_to_save."
                )
        for layer in _embeddings(model):
            weight = _unwrap(layer).weight
            new = weight.data[old_vocab_size:]
            is_unset = torch.isnan(new).any(-1)
            new[is_unset] = weight.data[:old_vocab_size].float().mean(0).to(weight.dtype)


def get_vocab_mismatch(model: Any, adapter_dir: Path) -> str | None:
    """Returns a message if the vocabulary sizes of adapter and `model` differ, else None."""
    vocab_size = _get_vocab_size(model)
    requested = get_adapter_vocab_size(model, adapter_dir) if vocab_size else None
    if vocab_size is None or requested in (None, vocab_size):
        return None
    return f"it was trained with {requested:,} tokens and its base has {vocab_size:,}"


def get_adapter_vocab_size(model: Any, adapter_dir: Path) -> int | None:
    """Returns the vocabulary size in training; None if the adapter's files do not contain it."""
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = tuple(f"{names[id(layer)]}." for layer in _embeddings(model) if id(layer) in names)
    sizes = [
        rows
        for name, shape in _shapes(adapter_dir / WEIGHTS).items()
        if name.removeprefix(_PREFIX).startswith(prefixes)
        and (rows := _get_num_embeddings(name, shape)) is not None
    ]
    if sizes:
        return max(sizes)
    num_trained = max(_trained_indices(adapter_dir), default=-1) + 1
    base_rows = _get_vocab_size(model) or 0
    return num_trained if num_trained > base_rows else None


def _get_num_embeddings(name: str, shape: list[int]) -> int | None:
    """Returns the row count of the matrix that tensor `name` is or, as LoRA, updates; or None."""
    suffix = name.rpartition(".")[2]
    if suffix == "lora_embedding_A":
        return shape[1]
    if suffix != "weight" or len(shape) != 2 or (".lora_" in name and ".lora_B." not in name):
        return None
    return shape[0]


def _trained_indices(adapter_dir: Path) -> Iterator[int]:
    config = load_peft_config(adapter_dir)
    for key in ("trainable_token_indices", "token_indices"):
        value = config.get(key) or []
        for indices in value.values() if isinstance(value, Mapping) else [value]:
            yield from indices


def _shapes(path: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _get_vocab_size(model: Any) -> int | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):  # it reads no tokens
        return None
    return None if weight is None else int(weight.shape[0])


def _embeddings(model: Any) -> list[Any]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer for layer in layers if layer is not None]


def _unwrap(layer: Any) -> Any:
    for name in ("token_adapter", "original_module", "base_layer"):
        inner = getattr(layer, name, None)
        if inner is not None:
            return _unwrap(inner)
    return layer


def apply_method(model: Any, method: MethodConfig, base: Base, *, fused: bool = False) -> Any:
    """Returns `model` with the parameters of `method` trainable in float32 and all others frozen.

    Modifies `model`, which may be on the meta device. With `fused`, LoRA layers compute base and
    update in one function. Raises ConfigError if PEFT cannot adapt a target.
    """
    import peft

    peft_method = METHODS[method.kind]
    if not peft_method.is_adapter:
        peft_method.unfreeze(method, base, model)
        return model
    is_meta = next(model.parameters()).is_meta
    targets = get_shortest_targets(model, base.targets)
    config = peft_method.build(method, replace(base, targets=targets))
    if fused:
        from ftlevel.fast.fused_lora import register_fused_layers  # imports bitsandbytes

        register_fused_layers(config)
    try:
        with _ignore_pattern_warnings():
            peft_model = peft.get_peft_model(model, config, low_cpu_mem_usage=is_meta)
    except (ValueError, TypeError, NotImplementedError) as error:
        if "Target module" not in str(error):
            raise
        raise ConfigError(
            f"--method {method.kind}: PEFT cannot adapt a module of {base.config.model_type} "
            f"({' '.join(str(error).split())[:120]} …). Name others by --target-modules, or use "
            "another --method."
        ) from error
    check_targeted_modules(peft_model, method.kind, base)
    peft_method.prepare(peft_model)
    train_in_float32(peft_model)
    return peft_model


def check_targeted_modules(peft_model: Any, method: str, base: Base) -> None:
    """Raise ConfigError if PEFT did not adapt all `base.targets`; `method` is for the message.

    For families with fused experts in transformers 5, PEFT 0.21 applies names such as `gate_proj`
    to the experts, even if a dense layer or shared expert was requested.
    """
    import peft

    targeted = getattr(peft_model.base_model, "targeted_module_names", None)
    if not base.targets or targeted is None:
        return
    split_names = [name.split(".") for name in targeted]
    targeted_names = {".".join(names[at:]) for names in split_names for at in range(len(names))}
    missing = sorted(set(base.targets) - targeted_names)
    if missing:
        names = sorted({name.rpartition(".")[2] for name in missing})
        remaining = sorted({name.rpartition(".")[2] for name in base.targets} - set(names))
        raise ConfigError(
            f"--method {method} on {base.config.model_type}: PEFT {peft.__version__} takes "
            f"{join_names(names)} for the experts' tensors, and {len(missing):,} linear layers of "
            f"that name, such as {missing[0]}, would not be adapted. Use --target-modules "
            f"{','.join(remaining)}."
        )


def finalize_method(model: Any, method: MethodConfig, device: str, dtype: str) -> None:
    """Replace modules of `model` (modified) that only training needs by what they compute there."""
    with autocast(device, dtype):
        METHODS[method.kind].finish(model)


def train_in_float32(model: Any) -> None:
    """Convert trainable parameters of `model` (modified) to float32, in which updates are kept."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def get_shortest_targets(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Returns the shortest suffixes of `targets` that match no other module of `model`."""
    return sorted(shortest_names(targets, (name for name, _ in model.named_modules())))


def copy_initial_state(model: Any, method: MethodConfig) -> dict[str, Any]:
    """Returns copies of the initial weights that `save_adapter` needs; {} if it needs none."""
    return METHODS[method.kind].initialization.copy(model)


def save_adapter(
    model: Any, method: MethodConfig, adapter_dir: Path, initial_state: dict[str, Any]
) -> None:
    """Save the adapter to fit the original base; `initial_state`: from `copy_initial_state`."""
    with METHODS[method.kind].initialization.as_saved(model, initial_state) as state:
        # "auto" would query the Hub to find out whether the vocabulary was resized.
        kwargs = {} if state is None else {"state_dict": state}
        model.save_pretrained(str(adapter_dir), save_embedding_layers=False, **kwargs)


def load_adapter(base: Any, adapter_dir: Path, name: str = "default") -> Any:
    """Load an adapter onto `base` (modified), in eval mode; InputError if it does not fit."""
    import peft

    ensure_registered()
    weights = _load_weights(adapter_dir)
    if (load_custom := _get_custom_loader(adapter_dir)) is not None:
        return load_custom(base, adapter_dir, name)
    check_patterns(adapter_dir, load_peft_config(adapter_dir), base)
    old_vocab_size = resize_embeddings(base, adapter_dir)
    # Load as trainable: PEFT then marks the adapter's parameters, and AdaLoRA requires it.
    try:
        with _ignore_pattern_warnings():
            peft_model = peft.PeftModel.from_pretrained(
                base, str(adapter_dir), adapter_name=name, is_trainable=True
            )
    except (*FROM_READERS, RuntimeError) as error:  # modules or shapes differ
        message = " ".join(str(error).split())
        raise InputError(
            f"{adapter_dir} does not fit its base model, {base.config.model_type} "
            f"({message[:200]}). Name the base that it was trained on."
        ) from error
    _set_weights(peft_model, weights, adapter_dir, name)
    check_new_embeddings(peft_model.get_base_model(), old_vocab_size, adapter_dir)
    return _frozen(peft_model)


def load_initial_weights(peft_model: Any, adapter_dir: Path) -> None:
    """Load weights into the untrained adapter of `peft_model`; InputError if they do not fit."""
    _set_weights(peft_model, _load_weights(adapter_dir), adapter_dir, "default")


def get_expected_tensors(
    peft_model: Any, name: str = "default"
) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Returns the names of required adapter tensors, and name → shape of all allowed ones."""
    import peft

    required, allowed = (
        peft.get_peft_model_state_dict(
            peft_model, save_embedding_layers=with_embeddings, adapter_name=name
        )
        for with_embeddings in (False, True)  # PEFT also saves adapted or resized embeddings
    )
    return set(required), {name: tuple(tensor.shape) for name, tensor in allowed.items()}


def _frozen(peft_model: Any) -> Any:
    peft_model.requires_grad_(False)
    return peft_model.eval()


def _get_custom_loader(adapter_dir: Path) -> Callable[[Any, Path, str], Any] | None:
    """Returns ftlevel's loader of an adapter, None for PEFT's; InputError if neither loads it."""
    import peft

    peft_type = load_peft_config(adapter_dir)["peft_type"]
    for method in METHODS.values():
        if peft_type in method.peft_loaders:
            return method.peft_loaders[peft_type]
    if issubclass(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], peft.PromptLearningConfig):
        raise InputError(
            f"{adapter_dir} is an adapter of type {peft_type}, which PEFT {peft.__version__} "
            f"applies at every generation step with transformers 5. Train one with --method "
            f"prefix or prompt."
        )
    return None


def add_adapter(peft_model: Any, adapter_dir: Path, name: str) -> None:
    """Load another adapter, without activating it; InputError if it cannot be combined."""
    weights, base = _load_weights(adapter_dir), peft_model.get_base_model()
    check_patterns(adapter_dir, load_peft_config(adapter_dir), base)
    problem = get_vocab_mismatch(base, adapter_dir)
    if problem is None and _get_custom_loader(adapter_dir) is not None:
        problem = "a prompt trained by plain PEFT is loaded alone"
    if problem is not None:
        raise InputError(
            f"{adapter_dir} cannot be loaded together with the others: {problem}. Use it alone."
        )
    with _ignore_pattern_warnings():
        try:
            peft_model.load_adapter(str(adapter_dir), adapter_name=name, is_trainable=True)
        except FROM_READERS as error:
            message = " ".join(str(error).split())
            raise InputError(
                f"{adapter_dir} cannot be loaded together with the others: {message}"
            ) from None
    _set_weights(peft_model, weights, adapter_dir, name)
    _frozen(peft_model)


def _load_weights(adapter_dir: Path) -> dict[str, Any]:
    import peft
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    peft_type = load_peft_config(adapter_dir)["peft_type"]
    if peft_type not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{adapter_dir} is an adapter of type {peft_type!r}, which PEFT {peft.__version__} "
            f"does not support.{did_you_mean(peft_type, peft.PEFT_TYPE_TO_CONFIG_MAPPING)} It may "
            "need a newer PEFT."
        )
    path = adapter_dir / WEIGHTS
    check_weights_exist(adapter_dir)
    try:
        weights = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}). Is the copy incomplete?") from None
    check_finite(weights.items(), str(path))
    return dict(weights)


def check_weights_exist(adapter_dir: Path) -> None:
    """Raise `InputError` if the adapter's weights are missing."""
    if not (adapter_dir / WEIGHTS).is_file():
        raise InputError(
            f"{adapter_dir} contains no {WEIGHTS}. Save the adapter again with PEFT's "
            "save_pretrained."
        )


def check_runs_on_cpu(adapter_dir: Path) -> None:
    """Raise `InputError` if PEFT loads the adapter only on a GPU."""
    config = read_json_object(adapter_dir / "adapter_config.json")
    if str(config.get("init_lora_weights")).lower() == "loftq":
        raise InputError(
            f"{adapter_dir}: init_lora_weights is loftq, and PEFT then rounds the base weights to "
            "4 bits, which it does only on a GPU. Use a machine with a GPU."
        )


def _set_weights(peft_model: Any, weights: dict[str, Any], adapter_dir: Path, name: str) -> None:
    """Set the weights of an adapter of `peft_model` in float32; InputError if they do not match."""
    import peft

    train_in_float32(peft_model)
    # PEFT casts a head to the base's precision, so the float32 weights are loaded again.
    with _hide_rank_pattern(peft_model.peft_config[name]):
        try:
            peft.set_peft_model_state_dict(peft_model, weights, adapter_name=name)
        except RuntimeError as error:  # shapes differ
            message = " ".join(str(error).split())[:200]
            raise InputError(f"{adapter_dir} does not fit its base model: {message}") from None
    expected, allowed = get_expected_tensors(peft_model, name)
    names = set(weights)
    missing, unknown = expected - names, names - expected - set(allowed)
    if missing or unknown:
        mismatched = sorted(missing | unknown)
        raise InputError(
            f"{adapter_dir}: {len(missing):,} weights of the adapter are missing and "
            f"{len(unknown):,} are unknown, such as {mismatched[0]}. The adapter does not belong "
            "to this base model."
        )


@contextlib.contextmanager
def _ignore_pattern_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        yield


@contextlib.contextmanager
def _hide_rank_pattern(config: Any) -> Iterator[None]:
    """Hide AdaLoRA's rank pattern in the `with` block, so that PEFT does not prune again."""
    pattern = getattr(config, "rank_pattern", None)
    if pattern:
        config.rank_pattern = None
    try:
        yield
    finally:
        if pattern:
            config.rank_pattern = pattern
