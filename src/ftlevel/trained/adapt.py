"""Apply a PEFT method to a loaded model, and save and load adapters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.config import MethodConfig
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names
from ftlevel.methods import METHODS, Base, ensure_registered
from ftlevel.methods.base import shortest_names
from ftlevel.methods.merging import read_peft_config
from ftlevel.models.integrity import check_finite
from ftlevel.models.untrusted import FROM_READERS, check_patterns
from ftlevel.trained.adapter_formats import find_reader
from ftlevel.trained.vocabulary import check_new_rows, find_vocabulary_mismatch, resize_vocabulary


def apply_method(model: Any, method: MethodConfig, base: Base, *, fused: bool = False) -> Any:
    """Return `model` with the parameters of `method` trainable in float32 and all others frozen.

    Mutates `model`, which may be on the meta device. With `fused`, LoRA layers compute base and
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

    For families with fused experts in transformers 5, PEFT 0.21 takes names such as `gate_proj` for
    the experts, even if a dense layer or shared expert is meant.
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
    """Remove from the trained `model` what only training needed (mutated)."""
    METHODS[method.kind].finish(model)


def train_in_float32(model: Any) -> None:
    """Convert every trainable parameter of `model` to float32 (mutated).

    In bfloat16, rounding would lose most of AdamW's small updates.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compact_targets(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the shortest names that PEFT's suffix match resolves to exactly `targets`."""
    return sorted(shortest_names(targets, (name for name, _ in model.named_modules())))


def copy_start(model: Any, method: MethodConfig) -> dict[str, Any]:
    """Return the initial state of `model` that `save_adapter` needs; may be empty."""
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
    """Load the adapter in `directory` onto `base` (mutated), in eval mode with float32 weights.

    Raises:
        InputError: It is damaged, of unknown type, or of another base; or weights are missing
            or unexpected.
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
    """Load the weights in `directory` into the untrained adapter of `peft_model` (mutated).

    Raises InputError if they are damaged or do not match the adapter.
    """
    _fill_adapter(peft_model, _read_whole(directory), directory, "default")


def describe_state(peft_model: Any) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the tensors that the adapter's file must have, and the shapes of all allowed ones."""
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
    """Return ftlevel's loader for an adapter of PEFT's own tuner; None to use PEFT's."""
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
    """Load another adapter into `peft_model` (mutated) without activating it.

    Raises InputError if it is incomplete or not compatible with the others.
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
    """Read the weights of PEFT's file; refuse missing, damaged, non-finite or unknown ones."""
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
    """Load the weights in float32, and check that none is missing or unknown (mutated)."""
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
    """Silence PEFT's warning about rank patterns, which misreads AdaLoRA's and its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        yield


@contextlib.contextmanager
def _ranks_applied(config: Any) -> Iterator[None]:
    """Hide the config's rank pattern inside the block, so that AdaLoRA does not prune twice."""
    pattern = getattr(config, "rank_pattern", None)
    if pattern:
        config.rank_pattern = None
    try:
        yield
    finally:
        if pattern:
            config.rank_pattern = pattern
