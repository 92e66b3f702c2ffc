"""Load config, tokenizer, meta model and weights of a model source, and check the loaded weights.

Raises errors where transformers only warns or trains with a wrong model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ftlevel.artifacts.files import Workspace
from ftlevel.artifacts.hub import first_line
from ftlevel.errors import InputError, join_names, reading
from ftlevel.models.module_tree import get_heads, get_modules_to_not_convert
from ftlevel.models.quantization import as_quant_config, get_quantization_config
from ftlevel.models.sources import ModelSource, snapshot
from ftlevel.models.untrusted import FROM_READERS, check_config
from ftlevel.models.upstream.architectures import forget_gguf, forget_renaming, model_classes
from ftlevel.models.upstream.conversions import quick_headers
from ftlevel.models.upstream.quantizers import cast_unquantized, keep_trainable_layout, scales_of
from ftlevel.models.upstream.tensors import direct_tensors, inner_tensors

if TYPE_CHECKING:
    from ftlevel.models.upstream.shards import LazyWeights


_SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_MAX_WEIGHT = 1e10  # the largest weights of published models are below 1e5

_SUPPORTED_DTYPES = ("F64", "F32", "F16", "BF16")  # safetensors dtype names

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Parameter name, shape in the checkpoint, shape in the model."""


def check_shapes(model: Any, mismatched: Iterable[Mismatch], label: str) -> list[str]:
    """Returns the names of head weights with a different shape in the checkpoint, not loaded.

    Raises InputError if the shape of a weight outside the heads differs from the checkpoint's.
    """
    heads = tuple(f"{head}." for head in get_heads(model))
    rows = sorted(mismatched)
    invalid = [row for row in rows if not row[0].startswith(heads) or not heads]
    if invalid:
        name, stored, expected = invalid[0]
        raise InputError(
            f"{label}: {len(invalid):,} weights do not have the shape given by its config.json, "
            f"such as {name}: {_by(stored)} in the checkpoint, {_by(expected)} in the model. Check "
            "that config.json belongs to the weights."
        )
    return [name for name, _, _ in rows]


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def check_unexpected(model: nn.Module, unexpected_keys: Iterable[str], label: str) -> None:
    """Raise `InputError` if a checkpoint has layers or biases that the config's `model` lacks."""
    lengths = {
        name: len(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    names = sorted(unexpected_keys)
    for name in names:
        layer = re.match(r"(.+?)\.(\d+)\.", name)
        length = _lookup(lengths, layer[1]) if layer else None
        if layer and length is not None and int(layer[2]) >= length:
            raise InputError(
                f"{label} has weights of layer {layer[2]} ({name}), and its config.json has "
                f"{length:,} layers, counted from 0. The model would be truncated silently. Check "
                "that config.json belongs to the weights."
            )
    modules = dict(model.named_modules())
    for name in names:
        owner, _, part = name.rpartition(".")
        module = _lookup(modules, owner)
        if module is not None and direct_tensors(module)[0].get(part, "none") is None:
            raise InputError(
                f"{label} has {name}, and its config.json describes a model without it. Check "
                "that config.json belongs to the weights."
            )


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    """Returns the value of `name`, or of a key that differs only by a module prefix, or None."""
    if name in values:
        return values[name]
    if not name:
        return None
    return next(
        (
            value
            for key, value in values.items()
            if key and (key.endswith(f".{name}") or name.endswith(f".{key}"))
        ),
        None,
    )


def check_dtypes(tensor_types: Mapping[str, str], label: str) -> None:
    """Raise `InputError` for integer weights in an unquantized checkpoint: they have no scale."""
    quantized = {
        name: dtype
        for name, dtype in tensor_types.items()
        if name.endswith((".weight", ".bias")) and dtype not in _SUPPORTED_DTYPES
    }
    if quantized:
        name, dtype = next(iter(quantized.items()))
        raise InputError(
            f"{label} stores {len(quantized):,} of its weights as {dtype}, such as {name}, and its "
            "config.json has no quantization_config that describes them. Download the matching "
            "config.json, or the model in floating point."
        )


def check_finite(tensors: Iterable[tuple[str, Any]], label: str) -> None:
    """Raise `InputError` for weights or scales that are NaN, infinite or larger than 1e10."""
    weights = [(name, part) for name, tensor in tensors for part in _floats(tensor)]
    if not weights:
        return
    # One pass over each tensor: NaN and infinity show in the sum, and so do large values that do
    # not cancel. A sum may also overflow by itself, so suspects are checked again.
    sums = torch.stack([part.sum().float().cpu() for _, part in weights])
    is_valid = sums.abs() <= _MAX_WEIGHT  # False for NaN
    flagged = [pair for pair, ok in zip(weights, is_valid.tolist(), strict=True) if not ok]
    max_values = {name: float(part.abs().max()) for name, part in flagged if part.numel()}
    nonfinite = [name for name, value in max_values.items() if not math.isfinite(value)]
    if nonfinite:
        raise InputError(
            f"{label} has NaN or infinity in {len(nonfinite):,} of its tensors: "
            f"{join_names(nonfinite, 3)}. Download or create it again."
        )
    too_large = [
        f"{name} ({value:.2g})" for name, value in max_values.items() if value > _MAX_WEIGHT
    ]
    if too_large:
        raise InputError(
            f"{label} has values above {_MAX_WEIGHT:.0e} in {len(too_large):,} of its "
            f"tensors, which is not plausible for trained weights: {join_names(too_large, 3)}. "
            "Download or create it again."
        )


def _floats(tensor: Any) -> Iterator[Tensor]:
    yield from (scales for scales in scales_of(tensor) if scales.dtype in _SUMMED)
    if tensor.dtype in _SUMMED and not inner_tensors(tensor) and not tensor.is_meta:
        yield tensor.detach()


def check_missing(missing: list[str], allowed: list[str], label: str) -> None:
    """Raise `InputError` if any of the `missing` weights is outside the modules `allowed`."""
    forbidden = [key for key in missing if not any(_inside(key, module) for module in allowed)]
    if forbidden:
        raise InputError(
            f"{label} lacks {len(forbidden)} weights of its architecture, such as "
            f"{join_names(forbidden, 3)}. They would be random. Check that config.json belongs to "
            "the weights."
        )


def _inside(key: str, module: str) -> bool:
    return key == module or key.startswith(module + ".")


_UNREADABLE = (OSError, json.JSONDecodeError, struct.error, SafetensorError)
"""Exceptions raised for corrupted safetensors, index or .gguf files."""


@contextlib.contextmanager
def _convert_read_errors(source: ModelSource) -> Iterator[None]:
    try:
        with reading(source.label):
            yield
    except _UNREADABLE as error:
        raise InputError(
            f"{source.label}: its weights cannot be read ({first_line(error)}). "
            "Was a download or a copy cut short?"
        ) from error


@contextlib.contextmanager
def silence_loggers() -> Iterator[None]:
    """Suppress warnings and progress bars of libraries inside the `with` block."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    others = ("bitsandbytes", "accelerate", "datasets", "peft", "huggingface_hub")
    changed = []
    for name, level in [("transformers", logging.ERROR), *((n, logging.CRITICAL) for n in others)]:
        logger = logging.getLogger(name)
        if logger.level != level:  # each change clears the caches of a thousand loggers
            changed.append((logger, logger.level))
            logger.setLevel(level)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for logger, level in changed:
            logger.setLevel(level)


@quick_headers()
def load_config(source: ModelSource, **overrides: Any) -> Any:
    """Load the config of `source` with `overrides`; raises `InputError` for an unusable one."""
    try:
        if source.kind in ("gguf", "hub"):  # directories are already checked
            raw, kwargs = transformers.PreTrainedConfig.get_config_dict(
                source.location, **source.arguments(), **overrides
            )
            check_config(raw, source.label)
        if source.gguf_file:  # reading the header takes a second
            return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(
                raw, **kwargs, name_or_path=source.location
            )
        config = transformers.AutoConfig.from_pretrained(
            source.location, **source.arguments(), **overrides
        )
        if source.kind == "builtin":
            config.name_or_path = source.name  # for messages
        if not source.trust_remote_code:
            _drop_auto_map(config)
        return config
    except struct.error as error:  # truncated .gguf header
        raise InputError(
            f"{source.label} ends before its header says ({first_line(error)}). Is the download "
            "incomplete?"
        ) from error
    except (*FROM_READERS, StrictDataclassError) as error:
        raise InputError(f"{source.label}: {_explain_error(error)}") from error


def _drop_auto_map(config: Any) -> None:
    """Remove `auto_map` from `config` and the configs in it: transformers asks on stdin for it."""
    vars(config).pop("auto_map", None)
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            _drop_auto_map(value)


def _explain_error(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it needs custom Python code (auto_map in its config.json), which is not run by "
            "default. If you trust it: train and preview run it with --trust-remote-code."
        )
    if "cannot reshape array" in str(error):  # truncated .gguf tensors
        return f"its tensors are incomplete ({first_line(error)}). Is the download incomplete?"
    if not isinstance(error, (OSError, ValueError)) or isinstance(error, StrictDataclassError):
        return f"its config.json is not one of a model: {' '.join(str(error).split())}"
    return first_line(error)


def label_overrides(names: Sequence[str]) -> dict[str, Any]:
    """Returns the keyword arguments of `load_config` that set the labels: class or tag `names`."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


@quick_headers()
def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer of `source`; raises `InputError` for a missing or unreadable one."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.location, **source.arguments()
        )
    except Exception as error:
        if not isinstance(error, FROM_READERS) and type(error) is not Exception:  # from Rust
            raise
        _check_vocabulary(source)
        raise InputError(f"{source.label} has no usable tokenizer: {first_line(error)}") from error
    # Without files, transformers builds a tokenizer that knows only special tokens.
    if files := getattr(tokenizer, "vocab_files_names", None):  # none for bytes, as in ByT5
        _check_vocabulary(source, files.values())
    if source.kind in ("builtin", "gguf"):
        tokenizer.name_or_path = source.name  # for messages
    return tokenizer


def get_vocabulary(tokenizer: Any) -> Any:
    """Returns the vocabulary of `tokenizer`, with all rules if it is a fast one.

    Truncation and padding in tokenizer files are ignored: each call of the tokenizer replaces them.
    """
    if not tokenizer.is_fast:
        return tokenizer.get_vocab()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in rules.items() if key not in ("truncation", "padding")}


def _check_vocabulary(source: ModelSource, names: Iterable[str] = ()) -> None:
    """Raise `InputError` if the directory `source` has no vocabulary file, usual or in `names`."""
    patterns = ("tokenizer.*", "vocab*", "merges.txt", "*.model", "tekken.json", *names)
    model_dir = Path(source.location)
    if source.kind != "directory" or any(next(model_dir.glob(p), None) for p in patterns):
        return
    raise InputError(
        f"{source.label} has no tokenizer. Expected tokenizer.json in {source.location}: "
        "copy it there from the model that the weights come from."
    )


def build_task_model(config: Any, auto_class: str) -> Any:
    """Build the `auto_class` model of `config` on the meta device; `InputError` if unsupported.

    Code that ships with the model is run if `config` has its `auto_map`: see `load_config`.
    """
    try:
        with torch.device("meta"), silence_loggers():
            return getattr(transformers, auto_class).from_config(
                copy.deepcopy(config), trust_remote_code=hasattr(config, "auto_map")
            )
    except FROM_READERS as error:
        if "Unrecognized configuration class" not in str(error):
            raise InputError(
                f"a model of type {config.model_type} cannot be built from its config.json "
                f"({type(error).__name__}: {first_line(error)}). Check that it is complete."
            ) from error
        raise InputError(
            f"{config.model_type} has no {auto_class} in transformers {transformers.__version__}. "
            "Code that ships with a model is run by train and preview with --trust-remote-code."
        ) from None


def load_model(
    source: ModelSource,
    config: Any,
    auto_class: str,
    *,
    dtype: torch.dtype,
    device: str,
    quantization: Any = None,
    attn_implementation: str = "auto",
    slices: LazyWeights | None = None,
) -> tuple[Any, list[str]]:
    """Load the weights of `source` into a model in eval mode.

    Returns the model, and the names of randomly initialized parameters. With `slices`, matrices
    are loaded later, unchecked. InputError if a file is corrupted or does not fit the config.
    """
    if source.gguf_file and quantization is not None:
        return _load_gguf_quantized(
            source,
            config,
            auto_class,
            dtype=dtype,
            device=device,
            quantization=quantization,
            attn_implementation=attn_implementation,
        )
    config = copy.deepcopy(config)  # transformers writes the quantization into it
    arguments = source.arguments()
    if mapping := rename_prefix(config, auto_class):
        arguments["key_mapping"] = mapping
    if attn_implementation != "auto":
        arguments["attn_implementation"] = attn_implementation
    quantization_config = get_quantization_config(config)
    if quantization_config is not None:
        config = _keep_new_heads(quantization_config, source, config, auto_class, dtype)
    elif quantization is not None:
        arguments["quantization_config"] = keep_heads(quantization, config, auto_class, source)
    if quantization_config is None:
        check_dtypes(_load_tensor_types(source), source.label)
    is_quantized = quantization_config is not None or quantization is not None
    if is_quantized or (device == "cuda" and not source.gguf_file):
        # Loads shard by shard, so host memory does not grow with the number of GPUs.
        target = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        arguments["device_map"] = {"": target}
    model, info = _load_weights(source, auto_class, slices, config=config, dtype=dtype, **arguments)
    reinitialized = check_shapes(model, info["mismatched_keys"], source.label)
    check_unexpected(model, info["unexpected_keys"], source.label)
    check_finite(model.named_parameters() if slices is None else slices.read(model), source.label)
    if quantization_config is not None and as_quant_config(quantization_config) is not None:
        cast_unquantized(model, dtype)
    if mapping:
        forget_renaming(model, mapping)
    if source.gguf_file:
        forget_gguf(model)
    if not is_quantized:
        model.to(device)
    keep_trainable_layout(model)
    return model, sorted({*info["missing_keys"], *reinitialized})


def _load_weights(
    source: ModelSource, auto_class: str, slices: LazyWeights | None, **arguments: Any
) -> tuple[Any, dict[str, Any]]:
    """Returns the model and loading info, like `from_pretrained` with `output_loading_info`."""
    arguments["output_loading_info"] = True
    arguments["ignore_mismatched_sizes"] = True  # checked by check_shapes
    arguments["use_kernels"] = False  # on a GPU, transformers would fetch code from the Hub
    with _convert_read_errors(source), silence_loggers(), quick_headers():
        if slices is not None:
            meta = build_task_model(arguments["config"], auto_class)
            quantization = arguments.pop("quantization_config", None)
            arguments.pop("device_map", None)  # nothing is read yet
            model, info = slices.load(meta, snapshot(source), source.location, **arguments)
            if quantization is not None:
                from ftlevel.models.upstream.quantizers import pack_lazy  # imports DTensor

                pack_lazy(model, quantization, slices.weights)
            return model, info
        return getattr(transformers, auto_class).from_pretrained(
            source.location, use_safetensors=None if source.gguf_file else True, **arguments
        )


def _load_gguf_quantized(
    source: ModelSource, config: Any, auto_class: str, *, dtype: torch.dtype, **kwargs: Any
) -> tuple[Any, list[str]]:
    """Load a .gguf file in `dtype`, save it, and load the saved model quantized (`kwargs`)."""
    with Workspace("gguf") as folder:
        model, missing = load_model(source, config, auto_class, dtype=dtype, device="cpu")
        model.save_pretrained(folder, max_shard_size="2GB")
        del model
        saved_model = ModelSource(folder, "directory", folder, local_files_only=True)
        return load_model(saved_model, config, auto_class, dtype=dtype, **kwargs)[0], missing


def keep_heads(quantization: Any, config: Any, auto_class: str, source: ModelSource) -> Any:
    """Returns a copy of `quantization` that leaves heads and untrained poolers unquantized.

    Given a list of modules to skip, transformers would quantize and untie a tied output layer, too.
    """
    result = copy.copy(quantization)
    meta = build_task_model(config, auto_class)
    new_poolers = get_new_poolers(meta, source)  # `BertModel` calls its pooler
    excluded = [*get_heads(meta), *new_poolers, *get_modules_to_not_convert(meta)]
    result.llm_int8_skip_modules = sorted({*(quantization.llm_int8_skip_modules or ()), *excluded})
    return result


def _keep_new_heads(
    quantization_config: dict[str, Any],
    source: ModelSource,
    config: Any,
    auto_class: str,
    dtype: torch.dtype,
) -> Any:
    """Returns a copy of `config` by which heads stay unquantized if the checkpoint's are."""
    if as_quant_config(quantization_config) is None:
        return config
    quantized = [name for name in _load_tensor_types(source) if name.endswith((".absmax", ".SCB"))]
    heads = [
        head
        for head in get_heads(build_task_model(config, auto_class))
        if not any(f".{head}." in f".{name}" for name in quantized)
    ]
    new_config = copy.deepcopy(config)
    new_config.quantization_config = {
        **quantization_config,
        "llm_int8_skip_modules": sorted(
            {*(quantization_config.get("llm_int8_skip_modules") or ()), *heads}
        ),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }
    return new_config


def rename_prefix(config: Any, auto_class: str) -> dict[str, str]:
    """Returns the `key_mapping` from checkpoint names to those of `auto_class`; may be empty.

    In transformers 5.24 the question-answering classes of Llama and Qwen name their base
    `transformer`, while checkpoints use `model`.
    """
    base_classes, task_classes = model_classes("AutoModel"), model_classes(auto_class)
    if type(config) not in base_classes or type(config) not in task_classes:
        return {}
    base_prefix, task_prefix = (
        _prefix(mapping[type(config)]) for mapping in (base_classes, task_classes)
    )
    return {} if task_prefix == base_prefix else {rf"^{base_prefix}\.": f"{task_prefix}."}


def _prefix(entry: Any) -> str:
    first = entry[0] if isinstance(entry, tuple) else entry
    return str(first.base_model_prefix)


def get_new_poolers(meta: torch.nn.Module, source: ModelSource) -> list[str]:
    """Returns the names of poolers that the checkpoint lacks; they are trained like new heads."""
    checkpoint_names = _load_tensor_types(source)
    if not checkpoint_names:
        return []
    return [
        name
        for name, module in meta.named_modules()
        if name.rpartition(".")[2] == "pooler"
        and (parameters := [key for key, _ in module.named_parameters()])
        and not any(stored.endswith(f"pooler.{parameters[0]}") for stored in checkpoint_names)
    ]


def get_new_heads(meta: torch.nn.Module, source: ModelSource, heads: list[str]) -> list[str]:
    """Returns the `heads` that the checkpoint lacks; all `heads` of a .gguf file."""
    checkpoint_names = _load_tensor_types(source)

    def is_in_checkpoint(head: str) -> bool:
        parameters = [name for name, _ in meta.get_submodule(head).named_parameters(prefix=head)]
        return any(stored.endswith(name) for stored in checkpoint_names for name in parameters)

    return [head for head in heads if not is_in_checkpoint(head)]


def _load_tensor_types(source: ModelSource) -> dict[str, str]:
    if source.kind == "gguf":
        return {}
    if source.kind == "hub" and not source.local_files_only:
        return _load_hub_tensor_types(source.location, source.revision)
    dtypes: dict[str, str] = {}
    for path in snapshot(source).glob("*.safetensors"):
        with _convert_read_errors(source), safe_open(str(path), framework="pt") as file:
            names = file.keys()
            dtypes.update((name, file.get_slice(name).get_dtype()) for name in names)
    return dtypes


@functools.cache
def _load_hub_tensor_types(name: str, revision: str | None) -> dict[str, str]:
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision)
    except Exception:  # noqa: BLE001 - if weights cannot be read either, loading them reports it
        return {}
    files = metadata.files_metadata.values()
    return {key: tensor.dtype for file in files for key, tensor in file.tensors.items()}
