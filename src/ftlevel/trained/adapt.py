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
    own = METHODS[method.kind]
    if own.build is None:
        if own.unfreeze is not None:
            own.unfreeze(method, base, model)
        return model
    from peft import get_peft_model

    compact = replace(base, targets=compact_targets(model, base.targets))
    shape_only = next(model.parameters()).is_meta
    config = own.build(method, compact)
    if fused:
        from ftlevel.fast.layers.fused_lora import register_fused_layers  # imports bitsandbytes

        register_fused_layers(config)
    try:
        with _unknown_patterns_ignored():
            adapted = get_peft_model(model, config, low_cpu_mem_usage=shape_only)
    except (ValueError, TypeError, NotImplementedError) as error:
        if "Target module" not in str(error):
            raise
        raise ConfigError(
            f"--method {method.kind}: PEFT cannot adapt a module of {base.config.model_type} "
            f"({' '.join(str(error).split())[:120]} …). Name others by --target-modules, or use "
            "another --method."
        ) from error
    check_placed(adapted, method.kind, base)
    if own.prepare is not None:
        own.prepare(adapted)
    train_in_float32(adapted)
    return adapted


def check_placed(adapted: Any, kind: str, base: Base) -> None:
    """Raise ConfigError if PEFT did not adapt all requested modules.

    For families with fused experts in transformers 5, PEFT 0.21 takes names such as `gate_proj` for
    the experts, even if a dense layer or shared expert is meant.
    """
    placed = getattr(adapted.base_model, "targeted_module_names", None)
    if not base.targets or placed is None:
        return
    ends = {
        ".".join(parts[at:])
        for p in placed
        for parts in (p.split("."),)
        for at in range(len(parts))
    }
    lost = sorted(set(base.targets) - ends)
    if lost:
        names = sorted({name.rpartition(".")[2] for name in lost})
        left = sorted({name.rpartition(".")[2] for name in base.targets} - set(names))
        raise ConfigError(
            f"--method {kind} on {base.config.model_type}: PEFT {_peft_version()} takes "
            f"{join_names(names)} for the experts' tensors, and {len(lost):,} linears of that "
            "name, "
            f"such as {lost[0]}, would stay as they are. Use --target-modules {','.join(left)}."
        )


def _peft_version() -> str:
    import peft

    return str(peft.__version__)


def finish_method(model: Any, method: MethodConfig) -> None:
    """Remove from the trained `model` what only training needed (mutated)."""
    finish = METHODS[method.kind].finish
    if finish is not None:
        finish(model)


def train_in_float32(model: Any) -> None:
    """Convert every trainable parameter of `model` to float32 (mutated).

    In bfloat16, rounding would lose most of AdamW's small updates.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compact_targets(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the shortest names that PEFT's suffix match resolves to exactly `targets`.

    Other programs expect `q_proj` instead of full names in adapter_config.json.
    """
    wanted = set(targets)
    if not wanted:
        return []
    names = [name for name, _ in model.named_modules()]
    for depth in (1, 2, 3):
        short = {".".join(name.split(".")[-depth:]) for name in wanted}
        matched = {
            name for name in names if any(name == s or name.endswith("." + s) for s in short)
        }
        if matched == wanted:
            return sorted(short)
    return sorted(wanted)


def copy_start(model: Any, method: MethodConfig) -> dict[str, Any]:
    """Return the initial state of `model` that `save_adapter` needs; may be empty."""
    start = METHODS[method.kind].start
    return start.copy(model) if start else {}


def save_adapter(model: Any, method: MethodConfig, directory: Path, begun: dict[str, Any]) -> None:
    """Save the adapter for use on the unchanged base; `begun` is the result of `copy_start`."""
    start = METHODS[method.kind].start
    with start.as_saved(model, begun) if start else contextlib.nullcontext() as state:
        # "auto" would query the Hub to find out whether the vocabulary was resized.
        more = {} if state is None else {"state_dict": state}
        model.save_pretrained(str(directory), save_embedding_layers=False, **more)


def load_adapter(base: Any, directory: Path, name: str = "default") -> Any:
    """Load the adapter in `directory` onto `base` (mutated), in eval mode with float32 weights.

    Raises:
        InputError: It is damaged, of unknown type, or of another base; or weights are missing
            or unexpected.
    """
    from peft import PeftModel, get_peft_model

    ensure_registered()
    if (reader := find_reader(directory)) is not None:
        config, weights = reader.read(directory).convert(base)
        adapted = get_peft_model(base, config, adapter_name=name)
        _fill_adapter(adapted, weights, directory, name)
        return _frozen(adapted)
    weights = _read_whole(directory)
    if (put_on := _plain_loader(directory)) is not None:
        return put_on(base, directory, name)
    check_patterns(directory, read_peft_config(directory), base)
    had = resize_vocabulary(base, directory)
    # Load as trainable: PEFT then marks the adapter's parameters, and AdaLoRA requires it.
    try:
        with _unknown_patterns_ignored():
            adapted = PeftModel.from_pretrained(
                base, str(directory), adapter_name=name, is_trainable=True
            )
    except (*FROM_READERS, RuntimeError) as error:  # modules or shapes differ
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory} does not fit its base model, {base.config.model_type} "
            f"({reason[:200]}). Name the base that it was trained on."
        ) from error
    _fill_adapter(adapted, weights, directory, name)
    check_new_rows(adapted.get_base_model(), had, directory)
    return _frozen(adapted)


def load_initial_weights(adapted: Any, directory: Path) -> None:
    """Load the weights in `directory` into the untrained adapter of `adapted` (mutated).

    Raises InputError if they are damaged or do not match the adapter.
    """
    _fill_adapter(adapted, _read_whole(directory), directory, "default")


def describe_state(adapted: Any) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the tensors that the adapter's file must have, and the shapes of all allowed ones."""
    from peft import get_peft_model_state_dict

    needed, allowed = (
        get_peft_model_state_dict(adapted, save_embedding_layers=whole) for whole in (False, True)
    )
    return set(needed), {name: tuple(tensor.shape) for name, tensor in allowed.items()}


def _frozen(adapted: Any) -> Any:
    adapted.requires_grad_(False)
    return adapted.eval()


def _plain_loader(directory: Path) -> Callable[[Any, Path, str], Any] | None:
    """Return ftlevel's loader for an adapter of PEFT's own tuner; None to use PEFT's."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

    kind = _kind_of(directory)
    for method in METHODS.values():
        if kind in method.plain:
            return method.plain[kind]
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], PromptLearningConfig):
        raise InputError(
            f"{directory} is an adapter of type {kind}, which PEFT {_peft_version()} gives to "
            "every step of an answer anew with transformers 5. Train one with --method prefix or "
            "prompt."
        )
    return None


def add_adapter(adapted: Any, directory: Path, name: str) -> None:
    """Load another adapter into `adapted` (mutated) without activating it.

    Raises InputError if it is incomplete or not compatible with the others.
    """
    config: Any = None
    if (reader := find_reader(directory)) is not None:
        config, weights = reader.read(directory).convert(adapted.get_base_model())
    else:
        weights = _read_whole(directory)
        check_patterns(directory, read_peft_config(directory), adapted.get_base_model())
        other = find_vocabulary_mismatch(adapted.get_base_model(), directory)
        if other is None and _plain_loader(directory) is not None:
            other = "a prompt that plain PEFT trained is read alone"
        if other is not None:
            raise InputError(
                f"{directory} cannot stand beside the others: {other}. Ask it by itself."
            )
    with _unknown_patterns_ignored():
        try:
            if config is not None:
                adapted.add_adapter(name, config)
            else:
                adapted.load_adapter(str(directory), adapter_name=name, is_trainable=True)
        except FROM_READERS as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{directory} cannot stand beside the others: {reason}") from None
    _fill_adapter(adapted, weights, directory, name)
    _frozen(adapted)


def _kind_of(directory: Path) -> Any:
    return read_peft_config(directory)["peft_type"]


def _read_whole(directory: Path) -> dict[str, Any]:
    """Return the weights of PEFT's file; refuse missing, damaged, non-finite or unknown ones."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind = _kind_of(directory)
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(
            f"{directory} is an adapter of type {kind!r}, which PEFT {_peft_version()} does not "
            f"know.{did_you_mean(kind, PEFT_TYPE_TO_CONFIG_MAPPING)} Was it made by a newer PEFT?"
        )
    path = directory / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(
            f"{directory} holds no adapter_model.safetensors. Save the adapter again with PEFT's "
            "save_pretrained."
        )
    try:
        weights = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}). Is the copy incomplete?") from None
    check_finite(weights.items(), str(path))
    return dict(weights)


def _fill_adapter(adapted: Any, weights: dict[str, Any], directory: Path, name: str) -> None:
    """Load the weights in float32, and check that none is missing or unknown (mutated)."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    train_in_float32(adapted)
    # PEFT casts a head to the base's precision, so the float32 weights are loaded again.
    with _ranks_applied(adapted.peft_config[name]):
        try:
            set_peft_model_state_dict(adapted, weights, adapter_name=name)
        except RuntimeError as error:  # shapes differ
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{directory} does not fit its base model: {reason}") from None
    promised, allowed = (
        set(get_peft_model_state_dict(adapted, save_embedding_layers=whole, adapter_name=name))
        for whole in (False, True)  # PEFT also saves adapted or resized embeddings
    )
    found = set(weights)
    missing, unknown = promised - found, found - promised - allowed
    if missing or unknown:
        odd = sorted(missing | unknown)
        raise InputError(
            f"{directory}: {len(missing):,} weights of the adapter are missing and "
            f"{len(unknown):,} are unknown, such as {odd[0]}. The adapter does not belong to "
            f"this base model."
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
    ranks = getattr(config, "rank_pattern", None)
    if ranks:
        config.rank_pattern = None
    try:
        yield
    finally:
        if ranks:
            config.rank_pattern = ranks
