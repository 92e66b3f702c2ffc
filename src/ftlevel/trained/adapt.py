"""Put a method onto a loaded model, and put a saved adapter onto a fresh one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.config import MethodConfig
from ftlevel.errors import ConfigError, InputError, did_you_mean, listing
from ftlevel.methods import METHODS, Base, ensure_registered
from ftlevel.methods.merging import read_peft_config
from ftlevel.models.integrity import check_finite
from ftlevel.models.untrusted import FROM_READERS, check_patterns
from ftlevel.trained.adapterhub import convert, is_adapterhub, read_hub_adapter
from ftlevel.trained.vocabulary import check_new_rows, fit_vocabulary, why_other_vocabulary


def apply_method(model: Any, method: MethodConfig, base: Base, *, fused: bool = False) -> Any:
    """Return `model` with what `method` trains, in float32, and everything else frozen.

    Args:
        model: the loaded base (mutated by PEFT), or its shape on the meta device.
        method: the method's spec.
        base: facts of the model; its targets are full names of modules.
        fused: train LoRA by layers that compute base and update in one fused function.

    Raises:
        ConfigError: PEFT does not put it on these modules.
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
        from ftlevel.fast.layers.fused_lora import register_fused_layers  # it imports bitsandbytes

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
    """Refuse an adapter that PEFT put on other modules than those asked for.

    For families whose experts became one tensor in transformers 5, PEFT 0.21 reads `gate_proj` and
    its like as the experts, also where a dense layer or a shared expert is meant.

    Raises:
        ConfigError: naming what would not have been adapted, and what can be.
    """
    placed = getattr(adapted.base_model, "targeted_module_names", None)
    if not base.targets or placed is None:
        return
    ends = {".".join(parts[at:]) for p in placed for parts in (p.split("."),)
            for at in range(len(parts))}  # fmt: skip
    lost = sorted(set(base.targets) - ends)
    if lost:
        names = sorted({name.rpartition(".")[2] for name in lost})
        left = sorted({name.rpartition(".")[2] for name in base.targets} - set(names))
        raise ConfigError(
            f"--method {kind} on {base.config.model_type}: PEFT {_peft_version()} takes "
            f"{listing(names)} for the experts' tensors, and {len(lost):,} linears of that name, "
            f"such as {lost[0]}, would stay as they are. Use --target-modules {','.join(left)}."
        )


def _peft_version() -> str:
    import peft

    return str(peft.__version__)


def finish_method(model: Any, method: MethodConfig) -> None:
    """Take from the trained `model` what only training needed (mutated)."""
    finish = METHODS[method.kind].finish
    if finish is not None:
        finish(model)


def train_in_float32(model: Any) -> None:
    """Hold every trainable parameter of `model` in float32 (mutated): updates are small.

    A head that was loaded in bfloat16 would lose most of AdamW's steps to rounding.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def compact_targets(model: torch.nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the shortest names that PEFT's suffix match reads as exactly `targets`.

    `q_proj` instead of 32 full names, if every linear of that name is a target; other programs
    that read adapter_config.json expect such names. Where none will do, the full names.
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
    """Return what `save_adapter` needs of an untrained `model`, empty if its start is lost."""
    start = METHODS[method.kind].start
    return start.copy(model) if start else {}


def save_adapter(model: Any, method: MethodConfig, directory: Path, begun: dict[str, Any]) -> None:
    """Write the adapter of `model`, to be used on the untouched base.

    Args:
        model: a trained PEFT model.
        method: the method's spec.
        directory: where to.
        begun: what `copy_start` returned before training.
    """
    start = METHODS[method.kind].start
    with start.as_saved(model, begun) if start else contextlib.nullcontext() as state:
        # "auto" would ask the Hub whether the vocabulary was resized.
        more = {} if state is None else {"state_dict": state}
        model.save_pretrained(str(directory), save_embedding_layers=False, **more)


def load_adapter(base: Any, directory: Path, name: str = "default") -> Any:
    """Return `base` with the adapter saved in `directory`, in eval mode, its weights in float32.

    Raises:
        InputError: it is damaged, of a kind that PEFT does not know, or of another base; the file
            lacks weights that its configuration promises, or has others.
    """
    from peft import PeftModel, get_peft_model

    ensure_registered()
    if is_adapterhub(directory):
        config, weights = convert(read_hub_adapter(directory), base)
        adapted = get_peft_model(base, config, adapter_name=name)
        _fill_adapter(adapted, weights, directory, name)
        return _frozen(adapted)
    weights = _read_whole(directory)
    if (put_on := _plain_loader(directory)) is not None:
        return put_on(base, directory, name)
    check_patterns(directory, read_peft_config(directory), base)
    had = fit_vocabulary(base, directory)
    # Trainable at first: PEFT marks what belongs to the adapter, and AdaLoRA needs it to load.
    try:
        with _unknown_patterns_ignored():
            adapted = PeftModel.from_pretrained(
                base, str(directory), adapter_name=name, is_trainable=True
            )
    except (*FROM_READERS, RuntimeError) as error:  # other modules, or other shapes
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory} does not fit its base model, {base.config.model_type} "
            f"({reason[:200]}). Name the base that it was trained on."
        ) from error
    _fill_adapter(adapted, weights, directory, name)
    check_new_rows(adapted.get_base_model(), had, directory)
    return _frozen(adapted)


def begin_from(adapted: Any, directory: Path) -> None:
    """Give the untrained adapter of `adapted` (mutated) the weights of the one in `directory`.

    Raises:
        InputError: they are damaged, or not those of this adapter.
    """
    _fill_adapter(adapted, _read_whole(directory), directory, "default")


def describe_state(adapted: Any) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Return the tensors that a file of the adapter must have, and the shapes of all it may have.

    Args:
        adapted: with its adapter, on any device.
    """
    from peft import get_peft_model_state_dict

    needed, allowed = (
        get_peft_model_state_dict(adapted, save_embedding_layers=whole) for whole in (False, True)
    )
    return set(needed), {name: tuple(tensor.shape) for name, tensor in allowed.items()}


def _frozen(adapted: Any) -> Any:
    """Return `adapted` (mutated), to be asked and not trained."""
    adapted.requires_grad_(False)
    return adapted.eval()


def _plain_loader(directory: Path) -> Callable[[Any, Path, str], Any] | None:
    """Return what puts an adapter of PEFT's own tuner on by ours; None where PEFT's is used.

    Raises:
        InputError: it is one that PEFT cannot use with this transformers.
    """
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
    """Put another adapter beside those of `adapted` (mutated), not switched on.

    Raises:
        InputError: it does not go with the others, or its file is not whole.
    """
    config: Any = None
    if is_adapterhub(directory):
        config, weights = convert(read_hub_adapter(directory), adapted.get_base_model())
    else:
        weights = _read_whole(directory)
        check_patterns(directory, read_peft_config(directory), adapted.get_base_model())
        other = why_other_vocabulary(adapted.get_base_model(), directory)
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
    """Return the weights of PEFT's file, which is there, whole, finite and of a known kind."""
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
        raise InputError(f"{path} cannot be read ({error}). Was a copy cut short?") from None
    check_finite(weights.items(), str(path))
    return dict(weights)


def _fill_adapter(adapted: Any, weights: dict[str, Any], directory: Path, name: str) -> None:
    """Put the weights into float32, and check that all are there (mutated)."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    train_in_float32(adapted)
    # PEFT has put a head into the base's precision, and rounded it: put it into float32 again.
    with _ranks_applied(adapted.peft_config[name]):
        try:
            set_peft_model_state_dict(adapted, weights, adapter_name=name)
        except RuntimeError as error:  # other shapes
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{directory} does not fit its base model: {reason}") from None
    promised, allowed = (
        set(get_peft_model_state_dict(adapted, save_embedding_layers=whole, adapter_name=name))
        for whole in (False, True)  # PEFT saves embeddings too where they were adapted or resized
    )
    found = set(weights)
    missing, unknown = promised - found, found - promised - allowed
    if missing or unknown:
        odd = sorted(missing | unknown)
        raise InputError(
            f"{directory}: {len(missing):,} weights of the adapter are missing and "
            f"{len(unknown):,} are unknown, such as {odd[0]}. It does not belong to this "
            "base model."
        )


@contextlib.contextmanager
def _unknown_patterns_ignored() -> Iterator[None]:
    """Silence PEFT, which reads AdaLoRA's ranks as LoRA's, and then applies them all the same.

    It also warns of patterns that it made itself; the user's were checked before.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following .*_pattern keys", RuntimeWarning)
        yield


@contextlib.contextmanager
def _ranks_applied(config: Any) -> Iterator[None]:
    """Hide a config's ranks inside the block: AdaLoRA would prune by them a second time."""
    ranks = getattr(config, "rank_pattern", None)
    if ranks:
        config.rank_pattern = None
    try:
        yield
    finally:
        if ranks:
            config.rank_pattern = ranks
