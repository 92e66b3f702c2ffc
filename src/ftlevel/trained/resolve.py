"""Resolve a name to a `ModelRef`: a run, checkpoint, adapter or model. Must not load weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, load_card
from ftlevel.artifacts.files import (
    base_fingerprint,
    check_regular,
    file_fingerprint,
    hash_weights,
)
from ftlevel.artifacts.paths import resolve_relative
from ftlevel.artifacts.run_directory import CHECKPOINTS, CONFIG, get_run_dir
from ftlevel.config.methods.lora import BASE_MODIFYING_INITS
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.errors import InputError, join_names, reading, with_article
from ftlevel.methods.merging import WEIGHTS, load_peft_config
from ftlevel.models.hardware import select_dtype
from ftlevel.models.kinds import checkpoint_class, max_positions, model_kind
from ftlevel.models.loading import build_task_model, load_config, load_tokenizer
from ftlevel.models.module_tree import get_heads
from ftlevel.models.quantization import (
    as_quant_config,
    get_quantization_config,
    get_quantization_info,
    quantization_name,
)
from ftlevel.models.sources import ModelSource, check_revision, resolve_source
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import check_weights_exist
from ftlevel.trained.model_ref import PLAIN, ModelRef, get_tokenizer_source
from ftlevel.weights.checkpoint import get_local_dir, load_header, merge_sharded_checkpoint

ADAPTER_CONFIG = "adapter_config.json"
_DEFAULT_TASK = "text-generation"


def resolve_model(
    name: str,
    task: str | None = None,
    base: str | ModelSource | None = None,
    *,
    device: str,
    dtype: str = "auto",
    label: str = "",
    revision: str | None = None,
    trust_remote_code: bool = False,
    require_task: bool = True,
) -> ModelRef:
    """Resolve `name` to a `ModelRef`.

    Args:
        name: a run, checkpoint, adapter or model directory, a `.gguf` file, Hub id or builtin:NAME.
        task: value of `--task`; None uses the card, adapter_config.json or the architecture.
        base: new location of an adapter's base model, if it has moved.
        device: torch device type.
        dtype: value of `--dtype`; auto uses that of training.
        label: name of the model in messages; defaults to `name`.
        revision: revision of a model on the Hub.
        trust_remote_code: whether an adapter's base may run its own code.
        require_task: whether a model without a card must have a task and a tokenizer.

    Raises ConfigError if the device or model type does not support `dtype`, and InputError if the
    model does not exist or has a different task, its base has other weights, or an argument does
    not apply.
    """
    if isinstance(base, str):
        base = resolve_source(base, display_name=f"--model {base}")
    with reading(name):
        path = get_model_dir(name)
        if (path / CARD).is_file():
            ref = _resolve_with_card(path, label or name, task, base)
        else:
            check_adapter_checkpoint(path)
            if (path / ADAPTER_CONFIG).is_file():
                ref = _resolve_peft(path, device, task, base, trust_remote_code)
            else:
                ref = _resolve_model(name, device, task, label or name, revision, require_task)
    if base is not None and ref.directory is None:
        raise InputError(
            f"--model {base.name}: it names the base of an adapter, and {label or name} is a whole "
            "model. Drop it."
        )
    if revision is not None and ref.directory is not None:
        raise InputError(
            f"--revision {revision}: {label or name} is an adapter, and its base is the one that "
            "it was trained on. Drop it."
        )
    if trust_remote_code:
        ref = replace(ref, source=replace(ref.source, trust_remote_code=True))
    return _with_dtype(with_quantization(ref), dtype, device)


def with_quantization(ref: ModelRef) -> ModelRef:
    """Returns `ref`; if its weights are stored quantized, with their quantization in its card."""
    config_dict = (
        None if ref.source.kind == "gguf" else get_quantization_config(load_config(ref.source))
    )
    if config_dict is None:
        return replace(ref, is_prequantized=False)
    ref = ref.with_card(quantization=get_quantization_info(config_dict))
    return replace(ref, is_prequantized=True)


def _with_dtype(ref: ModelRef, dtype: str, device: str) -> ModelRef:
    if dtype in ("auto", ref.card.dtype):
        return ref
    config = load_config(ref.source)
    config_dict = get_quantization_config(config)
    if config_dict is not None and as_quant_config(config_dict) is None:
        raise InputError(
            f"--dtype {dtype}: {ref.source.label} is stored quantized "
            f"({quantization_name(config_dict)}), and its kernels compute in the type that it was "
            f"saved with ({config.dtype}). Drop --dtype, or name the original model."
        )
    compute_dtype = select_dtype(dtype, device, config.model_type).value
    return ref.with_card(dtype=compute_dtype)


def get_dtype_source(ref: ModelRef, dtype: str) -> str:
    """Returns what set the compute precision: "--dtype", "as in training" or "auto"."""
    if dtype != "auto":
        return "--dtype"
    return "as in training" if ref.is_ours else "auto"


def _resolve_with_card(
    model_dir: Path, label: str, task: str | None, base: ModelSource | None
) -> ModelRef:
    card, run = load_card(model_dir), get_run_dir(model_dir)
    if task not in (None, card.task):
        raise InputError(
            f"{label} was trained for {card.task}, not for {task}. Name a model for {task}."
        )
    if card.method == "full":
        source = resolve_source(
            str(merge_sharded_checkpoint(model_dir)), display_name=str(model_dir)
        )
        return ModelRef(replace(source, name=str(model_dir)), None, card, run)
    return ModelRef(resolve_base(card, model_dir, base), model_dir, card, run)


def _resolve_model(
    name: str, device: str, task: str | None, label: str, revision: str | None, require_task: bool
) -> ModelRef:
    source = resolve_source(name, revision, display_name=label)
    check_revision(source, revision)
    config = load_config(source)
    base_task = None
    if require_task:
        own = (task for task, one in TASKS.items() if one.recognizes(get_model_dir(name)))
        base_task = TASKS[task or next(own, "") or _task_of_model(config, label)]
        base_task.check_model(source, config)
    card = create_default_card(source, config, base_task, device)
    return ModelRef(source, None, card, is_ours=False)


def _resolve_peft(
    adapter_dir: Path,
    device: str,
    task: str | None,
    base: ModelSource | None,
    trust_remote_code: bool,
) -> ModelRef:
    peft_config = load_peft_adapter_config(adapter_dir)
    name = peft_config.get("base_model_name_or_path")
    if base is None and not (name and isinstance(name, str)):
        raise InputError(
            f"{adapter_dir / ADAPTER_CONFIG} names no base model. Write it as "
            "base_model_name_or_path."
        )
    source = base or _resolve_base_source(str(name), adapter_dir, peft_config.get("revision"))
    source = replace(source, trust_remote_code=trust_remote_code or source.trust_remote_code)
    config = load_config(source)
    base_task = TASKS[_adapter_task(adapter_dir, peft_config, config, task)]
    if base_task.has_new_head:
        auto_class = base_task.auto_class(model_kind(config), config.model_type)
        outputs = _count_outputs(adapter_dir, build_task_model(config, auto_class))
        if outputs not in (0, config.num_labels):
            config = load_config(source, num_labels=outputs)
    card = create_default_card(source, config, base_task, device, adapter_dir, peft_config)
    message = (
        f"{adapter_dir} was not created by ftlevel: its base, {source.name}, cannot be verified"
    )
    return ModelRef(source, adapter_dir, card, None, [message], is_ours=False)


def get_model_dir(name: str) -> Path:
    """Returns the directory with the files of `name`; for a run, its subdirectory `adapter`.

    The directory may not exist. Raises InputError if the run has not finished.
    """
    path = Path(name).expanduser()
    inner = path / "adapter"
    if not (path / ADAPTER_CONFIG).is_file() and (inner / ADAPTER_CONFIG).is_file():
        path = inner if get_card_dir(path) is None else path
    return get_card_dir(path) or path


def is_model(name: str) -> bool:
    """Whether `name` is a local or builtin full model, not an adapter or a run with an adapter."""
    path = get_model_dir(name)
    if (path / ADAPTER_CONFIG).is_file():
        return False
    is_gguf = path.suffix == ".gguf" and path.is_file()
    return is_gguf or name.startswith("builtin:") or (path / "config.json").is_file()


def get_card_dir(path: Path) -> Path | None:
    """Returns `path` or `path/adapter` with a card, or None; InputError for an unfinished run."""
    if (path / CARD).is_file():
        return path
    if (path / "adapter" / CARD).is_file():
        return path / "adapter"
    if (path / CONFIG).is_file():
        raise InputError(
            f"{path} is an unfinished run: it has no adapter yet. Resume it: "
            f"ftlevel train --output-dir {quote(str(path))} --resume"
        )
    return None


def _task_of_model(config: Any, label: str) -> str:
    tasks = _tasks_of_class(checkpoint_class(config))
    if tasks:
        return tasks[0]
    if model_kind(config) in TASKS[_DEFAULT_TASK].auto_classes:
        return _DEFAULT_TASK
    architecture = join_names(config.architectures or ()) or config.model_type
    raise InputError(
        f"{label} does not say what it was trained for: its config.json names {architecture}, a "
        "model without a head. Name the task: --task NAME."
    )


def _tasks_of_class(auto_class: str) -> list[str]:
    return [name for name, task in TASKS.items() if auto_class in task.auto_classes.values()]


def _adapter_task(
    adapter_dir: Path, peft_config: Mapping[str, Any], base_config: Any, task: str | None
) -> str:
    """Returns the task of an adapter that PEFT saved without ftlevel.

    `peft_config`, its adapter_config.json, may name a task type or, for masked language models, the
    model class; otherwise, `base_config` decides. Raises InputError if ftlevel has no such task, or
    `task` differs.
    """
    peft_type = peft_config.get("task_type")
    class_name = (peft_config.get("auto_mapping") or {}).get("base_model_class")
    if peft_type is not None:
        description = f"task_type {peft_type}"
        tasks = [name for name in TASKS if peft_type in TASKS[name].peft_types.values()]
    elif class_name is not None:
        description, config = f"auto_mapping {class_name}", copy(base_config)
        config.architectures = [class_name]
        tasks = _tasks_of_class(checkpoint_class(config))
    else:
        return task or _task_of_model(base_config, str(adapter_dir))
    if not tasks:
        known = dict.fromkeys(kind for task in TASKS.values() for kind in task.peft_types.values())
        raise InputError(
            f"{adapter_dir / ADAPTER_CONFIG} has {description}, for which ftlevel has no task. "
            f"Expected a task_type of {join_names(known)}, or a masked language model."
        )
    if task not in (None, *tasks):
        raise InputError(
            f"{adapter_dir} was trained for {tasks[0]} ({description} in its {ADAPTER_CONFIG}), "
            f"not for {task}. Drop --task."
        )
    return task or tasks[0]


def _count_outputs(adapter_dir: Path, meta: Any) -> int:
    tensors, _ = load_header(adapter_dir / WEIGHTS)
    shapes = {f".{name}": tensor.spec.shape for name, tensor in tensors.items()}
    outputs = 0
    for head in get_heads(meta):
        for name, _ in meta.get_submodule(head).named_parameters(prefix=head):
            matches = [shape for stored, shape in shapes.items() if stored.endswith(f".{name}")]
            if matches and name.endswith("weight"):
                outputs = matches[0][0]  # rows of the last layer
    return outputs


def load_peft_adapter_config(adapter_dir: Path) -> dict[str, Any]:
    """Load adapter_config.json; InputError if it is invalid, or the weights are missing."""
    check_regular(adapter_dir.iterdir(), str(adapter_dir))
    peft_config = load_peft_config(adapter_dir)
    check_weights_exist(adapter_dir)
    return peft_config


def _resolve_base_source(name: str, adapter_dir: Path, revision: str | None = None) -> ModelSource:
    return resolve_source(name, revision, display_name=f"{name} (the base of {adapter_dir})")


def create_default_card(
    source: ModelSource,
    config: Any,
    task: BaseTask | None,
    device: str,
    adapter_dir: Path | None = None,
    peft_config: Mapping[str, Any] | None = None,
) -> AdapterCard:
    """Create a card for a model, or an adapter on a model, that ftlevel did not train.

    Prompts are formatted as `train` would. `config` must have as many labels as the head.
    `peft_config` is adapter_config.json, if any. If `task` is None, the card has no task.
    """
    defaults: dict[str, Any] = {}
    if task is not None:
        kind = model_kind(config)
        task.auto_class(kind, config.model_type)  # raises if the model does not support the task
        tokenizer = load_tokenizer(get_tokenizer_source(source, adapter_dir))
        ensure_pad_token(tokenizer)
        defaults = task.card_defaults(source, config, tokenizer, kind)
    return AdapterCard(
        method=str(peft_config["peft_type"]).lower().replace("_", "-") if peft_config else PLAIN,
        task=task.name if task is not None else "",
        base={"name": source.name, "kind": source.kind, "revision": source.revision},
        quantization={"kind": "none"},
        dtype=select_dtype("auto", device, config.model_type).value,
        max_length=max_positions(config) or 0,
        **defaults,
        heads=list((peft_config or {}).get("modules_to_save") or ()),
    )


def check_adapter_checkpoint(adapter_dir: Path) -> None:
    """Raise InputError for a checkpoint if its initialization, such as PiSSA, changed the base."""
    run = get_run_dir(adapter_dir) if adapter_dir.absolute().parent.name == CHECKPOINTS else None
    if (
        run is None
        or (adapter_dir / CARD).is_file()
        or not (adapter_dir / ADAPTER_CONFIG).is_file()
    ):
        return
    init = load_peft_config(adapter_dir).get("init_lora_weights")
    if init in BASE_MODIFYING_INITS:
        raise InputError(
            f"{adapter_dir} is a checkpoint of a run that began with init_lora_weights={init!r}, "
            "which changes the base weights until the run ends. Resume it first: ftlevel train "
            f"--output-dir {quote(str(run))} --resume"
        )


_LOCAL = ("directory", "gguf")
_WAY_OUT = "If it was moved, pass its path: --model PATH."


def resolve_base(
    card: AdapterCard, adapter_dir: Path, base: ModelSource | None = None
) -> ModelSource:
    """Resolve the base of the adapter in `adapter_dir`, and check its weights.

    `base` is the user's choice, if any. A local base is first looked up relative to the adapter, so
    that both may be moved together. Raises InputError if the base is missing or has other weights.
    """
    if base is not None:
        source = base
    elif card.base.get("kind") in _LOCAL:
        source = _resolve_local_base(card, adapter_dir)
    else:
        try:
            source = _resolve_base_source(card.base["name"], adapter_dir, card.base.get("revision"))
        except InputError as error:
            raise InputError(f"{error} {_WAY_OUT}") from None
    check_base(source, card, adapter_dir)
    return source


def get_original_base(ref: ModelRef) -> ModelRef | None:
    """Returns the base of a fully fine-tuned `ref`; None if missing, or for other methods."""
    card, path = ref.card, ref.source.path
    if card.method != "full" or card.merge or card.quantized or card.heads or path is None:
        return None
    try:
        source = resolve_base(card, path)
    except InputError:
        return None
    return replace(ref, source=source, run=None, notes=[])


def _resolve_local_base(card: AdapterCard, adapter_dir: Path) -> ModelSource:
    name, relative = card.base["name"], card.base.get("path")
    paths = [resolve_relative(relative, adapter_dir)] if relative else []
    paths = list(dict.fromkeys([*paths, Path(name)]))
    existing = [path for path in paths if path.exists()]
    if not existing:
        raise InputError(
            f"the base model of {adapter_dir} is not there (looked for at "
            f"{join_names(map(str, paths))}). Pass its path: --model PATH."
        )
    expected = card.base.get("fingerprint")
    if len(existing) > 1:
        existing = [p for p in existing if base_fingerprint(p) == expected] or existing
    return _resolve_base_source(str(existing[0]), adapter_dir)


def check_base(
    source: ModelSource,
    card: AdapterCard,
    adapter_dir: Path,
    advice: str = "Name the base that it was trained on: --model PATH, or train again.",
) -> None:
    """Raise InputError if the weights of `source` are not those of the base in training."""
    expected = card.base.get("fingerprint")
    if source.path is None or expected is None:
        return
    actual = base_fingerprint(source.path)
    if actual == expected and (digest := card.base.get("digest")) and source.path.is_dir():
        expected, actual = digest, hash_weights(source.path)
    if actual != expected:
        raise InputError(
            f"{adapter_dir} was trained on {card.base['name']} with weights {expected[:12]}…, and "
            f"{source.label} has other weights ({actual[:12]}…). On them the adapter would be "
            f"wrong silently. {advice}"
        )


def check_cached_base(ref: ModelRef) -> None:
    """Raise InputError if the weights of a base on the Hub changed after training; may download."""
    if ref.source.kind == "hub" and ref.card.base.get("fingerprint") is not None:
        source = replace(ref.source, kind="directory", location=str(get_local_dir(ref.source)))
        check_base(source, ref.card, ref.adapter_path)


@dataclass(frozen=True)
class ReferenceModel:
    """Resolved reference, teacher or guide; `fingerprint` identifies weights and quantization."""

    name: str
    ref: ModelRef
    fingerprint: str


def resolve_reference(
    flag: str, name: str, kind: str, tokenizer: Any, device: str
) -> ReferenceModel:
    """Resolve the reference or teacher `name`, and check that it can score the run's rows.

    `flag` names it in messages; `kind` and `tokenizer` are those of the model being trained. Raises
    InputError if the model does not exist, generates no text, or differs in kind or vocabulary.
    """
    label = f"{flag} {name}"
    ref = resolve_model(name, device=device, label=label)
    if not ref.configured_task.generates_text:
        raise InputError(
            f"{label} was trained for {ref.task}: it writes no text. Name one that does."
        )
    if ref.model_kind != kind:
        raise InputError(
            f"{label} is {with_article(ref.model_kind)}, and the model that is trained is "
            f"{with_article(kind)}. Name {with_article(kind)}."
        )
    if ref.load_tokenizer().get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{label}: its tokenizer differs from that of the model that is trained, so it cannot "
            "be used on the same tokens. Choose a model with the same tokenizer."
        )
    return ReferenceModel(name, ref, compute_fingerprint(ref))


def compute_fingerprint(ref: ModelRef) -> str:
    """Returns a SHA-256 of base (on the Hub: name and revision), adapter and quantization."""
    path, hasher = ref.source.path, hashlib.sha256()
    if path is None:
        hasher.update(f"{ref.base}@{ref.source.revision}".encode())
    else:
        hasher.update((hash_weights(path) if path.is_dir() else file_fingerprint(path)).encode())
    for pattern in ("*.safetensors", "*.bin", "adapter_config.json"):
        for file in sorted(ref.directory.glob(pattern)) if ref.directory else []:
            hasher.update(f"{file.name} {file_fingerprint(file)}".encode())
    hasher.update(json.dumps(ref.quantization, sort_keys=True, default=str).encode())
    return hasher.hexdigest()
