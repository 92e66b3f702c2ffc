"""Resolve a name to a `ModelRef`: a run, checkpoint, adapter or model. Must not load weights.

Reference and teacher models are identified by a fingerprint.
"""

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
    write_json,
)
from ftlevel.artifacts.places import relative_path, resolve_relative
from ftlevel.artifacts.run_directory import CHECKPOINTS, CONFIG, get_run_dir
from ftlevel.artifacts.sentence_transformers import find_task
from ftlevel.config.methods.lora import BASE_MODIFYING_INITS
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.errors import InputError, join_names, reading, with_article
from ftlevel.models.hardware import choose_dtype
from ftlevel.models.kinds import checkpoint_class, max_positions, model_kind
from ftlevel.models.loading import build_task_model, load_config, load_tokenizer
from ftlevel.models.module_tree import find_heads
from ftlevel.models.quantization import (
    as_quant_config,
    quantization_facts,
    quantization_name,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource, check_revision, resolve_source
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapt import AdapterReader, find_reader
from ftlevel.trained.model_ref import PLAIN, ModelRef, find_tokenizer
from ftlevel.weights.checkpoint import local_directory, merge_sharded_checkpoint, read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DEFAULT_TASK = "text-generation"


def resolve_model(
    name: str,
    task: str | None = None,
    base: str | ModelSource | None = None,
    *,
    device: str,
    dtype: str = "auto",
    said: str = "",
    revision: str | None = None,
    trust_remote_code: bool = False,
    needs_task: bool = True,
) -> ModelRef:
    """Resolve `name` to a `ModelRef`.

    Args:
        name: a run, checkpoint, adapter or model directory, a `.gguf` file, a Hub id, or
            builtin:NAME.
        task: value of `--task`; None uses the card, adapter_config.json or the model's
            architecture.
        base: new location of an adapter's base model, if it has moved.
        device: torch device type.
        dtype: value of `--dtype`; auto uses that of training.
        said: name of the model in messages; defaults to `name`.
        revision: revision of a model on the Hub.
        trust_remote_code: whether an adapter's base may run its own code.
        needs_task: whether a model without a card must have a task and a tokenizer.

    Raises:
        ConfigError: the device or model type does not support `dtype`.
        InputError: the model does not exist or is of a different task, its base has other weights,
            or an argument does not apply.
    """
    if isinstance(base, str):
        base = resolve_source(base, said=f"--model {base}")
    with reading(name):
        path = find_directory(name)
        reader = find_reader(path)
        if (path / CARD).is_file():
            ref = _resolve_ours(path, said or name, task, base)
        elif reader is not None:
            ref = _resolve_foreign(path, reader, device, task, base)
        else:
            check_whole_adapter(path)
            if (path / ADAPTER_CONFIG).is_file():
                ref = _resolve_peft(path, device, task, base, trust_remote_code)
            else:
                ref = _resolve_model(name, device, task, said or name, revision, needs_task)
    if base is not None and ref.directory is None:
        raise InputError(
            f"--model {base.name}: it names the base of an adapter, and {said or name} is a whole "
            "model. Drop it."
        )
    if revision is not None and ref.directory is not None:
        raise InputError(
            f"--revision {revision}: {said or name} is an adapter, and its base is the one that it "
            "was trained on. Drop it."
        )
    if trust_remote_code:
        ref = replace(ref, source=replace(ref.source, trust_remote_code=True))
    return _with_dtype(resolve_stored(ref), dtype, device)


def resolve_stored(ref: ModelRef) -> ModelRef:
    """Returns `ref` with the quantization of the stored weights in its card."""
    stored = None if ref.source.kind == "gguf" else stored_quantization(load_config(ref.source))
    if stored is None:
        return replace(ref, is_stored_quantized=False)
    ref = ref.with_card(quantization=quantization_facts(stored))
    return replace(ref, is_stored_quantized=True)


def _with_dtype(ref: ModelRef, dtype: str, device: str) -> ModelRef:
    if dtype in ("auto", ref.card.dtype):
        return ref
    config = load_config(ref.source)
    stored = stored_quantization(config)
    if stored is not None and as_quant_config(stored) is None:
        raise InputError(
            f"--dtype {dtype}: {ref.source.label} is stored quantized "
            f"({quantization_name(stored)}), and its kernels compute in the type that it was saved "
            f"with ({config.dtype}). Drop --dtype, or name the original model."
        )
    chosen = choose_dtype(dtype, device, ref.card.method, config.model_type).value
    return ref.with_card(dtype=chosen)


def describe_dtype(ref: ModelRef, dtype: str) -> str:
    """Returns where the compute precision comes from, for display; `dtype` is `--dtype`."""
    if dtype != "auto":
        return "--dtype"
    return "as in training" if ref.is_ours else "auto"


def _resolve_ours(
    directory: Path, said: str, task: str | None, base: ModelSource | None
) -> ModelRef:
    """Returns the `ModelRef` of a directory with a card; arguments as in `resolve_model`."""
    card, run = load_card(directory), get_run_dir(directory)
    if task not in (None, card.task):
        raise InputError(f"{said} was trained for {card.task}, not for {task}. Drop --task.")
    if card.method == "full":
        source = resolve_source(str(merge_sharded_checkpoint(directory)), said=str(directory))
        return ModelRef(replace(source, name=str(directory)), None, card, run)
    return ModelRef(find_base(card, directory, base), directory, card, run)


def _resolve_model(
    name: str, device: str, task: str | None, said: str, revision: str | None, needs_task: bool
) -> ModelRef:
    """Returns the `ModelRef` of a model without a card; arguments as in `resolve_model`."""
    source = resolve_source(name, revision, said=said)
    check_revision(source, revision)
    config = load_config(source)
    definition = None
    if needs_task:
        task = task or find_task(find_directory(name)) or _task_of_model(config, said)
        definition = TASKS[task]
    card = build_default_card(source, config, definition, device)
    return ModelRef(source, None, card, is_ours=False)


def _resolve_peft(
    directory: Path, device: str, task: str | None, base: ModelSource | None, trusts: bool
) -> ModelRef:
    """Returns the `ModelRef` of an adapter of plain PEFT; `trusts` allows the base its own code."""
    settings = read_plain_adapter(directory)
    name = settings.get("base_model_name_or_path")
    if base is None and not (name and isinstance(name, str)):
        raise InputError(
            f"{directory / ADAPTER_CONFIG} names no base model. Write it as "
            "base_model_name_or_path."
        )
    source = base or _resolve_base(str(name), directory, settings.get("revision"))
    source = replace(source, trust_remote_code=trusts or source.trust_remote_code)
    config = load_config(source)
    definition = TASKS[_adapter_task(directory, settings, config, task)]
    if definition.has_new_head:
        auto_class = definition.auto_class(model_kind(config), config.model_type)
        outputs = _count_outputs(directory, build_task_model(config, auto_class))
        if outputs not in (0, config.num_labels):
            config = load_config(source, num_labels=outputs)
    card = build_default_card(source, config, definition, device, directory, settings)
    message = f"{directory} was not created by ftlevel: its base, {source.name}, cannot be verified"
    return ModelRef(source, directory, card, None, [message], is_ours=False)


def _resolve_foreign(
    directory: Path, reader: AdapterReader, device: str, task: str | None, base: ModelSource | None
) -> ModelRef:
    """Returns the `ModelRef` of an adapter in a different library's format."""
    adapter = reader.read(directory)
    definition = TASKS[adapter.task(task)]
    source = base or _resolve_base(adapter.base, directory)
    settings = {"peft_type": reader.peft_type, "modules_to_save": adapter.heads}
    card = build_default_card(source, load_config(source), definition, device, directory, settings)
    message = (
        f"{directory} was created by {reader.library}: its base, {source.name}, cannot be verified"
    )
    return ModelRef(source, directory, adapter.complete(card), None, [message], is_ours=False)


def find_directory(name: str) -> Path:
    """Returns the directory with the files of `name`; for a run, its subdirectory `adapter`.

    The directory may not exist. Raises InputError if the run has not finished.
    """
    path = Path(name).expanduser()
    inner = path / "adapter"
    if not (path / ADAPTER_CONFIG).is_file() and (inner / ADAPTER_CONFIG).is_file():
        path = inner if card_directory(path) is None else path
    return card_directory(path) or path


def is_model(name: str) -> bool:
    """Whether `name` is a local or builtin full model, not an adapter or a run with an adapter."""
    path = find_directory(name)
    if (path / ADAPTER_CONFIG).is_file():
        return False
    is_gguf = path.suffix == ".gguf" and path.is_file()
    return is_gguf or name.startswith("builtin:") or (path / "config.json").is_file()


def card_directory(path: Path) -> Path | None:
    """Returns the directory, `path` or its `adapter`, that has a card; None for a plain model.

    Raises InputError if the run has not finished.
    """
    if (path / CARD).is_file():
        return path
    if (path / "adapter" / CARD).is_file():
        return path / "adapter"
    if (path / CONFIG).is_file():
        raise InputError(
            f"{path} is a run that has no adapter yet: it did not come to its end. "
            f"Go on with it: ftlevel train --output-dir {quote(str(path))} --resume"
        )
    return None


def _task_of_model(config: Any, said: str) -> str:
    """Returns the task of a model that ftlevel did not train, by architecture; `said` names it."""
    tasks = _tasks_of_class(checkpoint_class(config))
    if tasks:
        return tasks[0]
    if model_kind(config) in TASKS[_DEFAULT_TASK].auto_classes:
        return _DEFAULT_TASK
    architecture = join_names(config.architectures or ()) or config.model_type
    raise InputError(
        f"{said} does not say what it was trained for: its config.json names {architecture}, a "
        "model without a head. Name the task: --task NAME."
    )


def _tasks_of_class(auto_class: str) -> list[str]:
    return [name for name, task in TASKS.items() if auto_class in task.auto_classes.values()]


def _adapter_task(
    directory: Path, settings: Mapping[str, Any], base_config: Any, task: str | None = None
) -> str:
    """Returns the task of an adapter that plain PEFT wrote.

    `settings` is its adapter_config.json, which may name a task type or, for masked language
    models, the model class; otherwise, `base_config` decides. Raises InputError if ftlevel has no
    such task, or `task` differs.
    """
    peft_type = settings.get("task_type")
    class_name = (settings.get("auto_mapping") or {}).get("base_model_class")
    if peft_type is not None:
        description = f"task_type {peft_type}"
        tasks = [name for name in TASKS if peft_type in TASKS[name].peft_types.values()]
    elif class_name is not None:
        description, config = f"auto_mapping {class_name}", copy(base_config)
        config.architectures = [class_name]
        tasks = _tasks_of_class(checkpoint_class(config))
    else:
        return task or _task_of_model(base_config, str(directory))
    if not tasks:
        raise InputError(
            f"{directory / ADAPTER_CONFIG} has {description}, for which ftlevel has no task. "
            f"Expected a task_type of {join_names(_peft_types())}, or a masked language model."
        )
    if task not in (None, *tasks):
        raise InputError(
            f"{directory} was trained for {tasks[0]} ({description} in its {ADAPTER_CONFIG}), not "
            f"for {task}. Drop --task."
        )
    return task or tasks[0]


def _peft_types() -> list[str]:
    return list(dict.fromkeys(kind for task in TASKS.values() for kind in task.peft_types.values()))


def _count_outputs(directory: Path, meta: Any) -> int:
    """Returns the number of outputs of the head saved with an adapter; 0 if it has none."""
    tensors, _ = read_header(directory / ADAPTER_WEIGHTS)
    shapes = {f".{name}": tensor.spec.shape for name, tensor in tensors.items()}
    outputs = 0
    for head in find_heads(meta):
        for name, _ in meta.get_submodule(head).named_parameters(prefix=head):
            matches = [shape for stored, shape in shapes.items() if stored.endswith(f".{name}")]
            if matches and name.endswith("weight"):
                outputs = matches[0][0]  # rows of the last layer
    return outputs


def read_plain_adapter(directory: Path) -> dict[str, Any]:
    """Returns the adapter_config.json of an adapter that PEFT wrote.

    Raises InputError if the file is invalid or the weights are missing.
    """
    path = directory / ADAPTER_CONFIG
    check_regular(directory.iterdir(), str(directory))
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Is the copy incomplete?") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no configuration of an adapter. Expected an object.")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{directory} contains no {ADAPTER_WEIGHTS}. Save the adapter again with PEFT's "
            f"save_pretrained."
        )
    return settings


def _resolve_base(name: str, directory: Path, revision: str | None = None) -> ModelSource:
    return resolve_source(name, revision, said=f"{name} (the base of {directory})")


def build_default_card(
    source: ModelSource,
    config: Any,
    task: BaseTask | None,
    device: str,
    directory: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AdapterCard:
    """Build a card for a model, or an adapter on a model, that ftlevel did not train.

    Prompts are formatted as `train` would. `config` must have as many labels as the head.
    `settings` is the adapter_config.json, if any. If `task` is None, the card has no task.
    """
    defaults: dict[str, Any] = {}
    if task is not None:
        kind = model_kind(config)
        task.auto_class(kind, config.model_type)  # raises if the model does not support the task
        tokenizer = load_tokenizer(find_tokenizer(source, directory))
        ensure_pad_token(tokenizer)
        defaults = task.card_defaults(source, config, tokenizer, kind)
    return AdapterCard(
        method=str(settings["peft_type"]).lower().replace("_", "-") if settings else PLAIN,
        task=task.name if task is not None else "",
        base={"name": source.name, "kind": source.kind, "revision": source.revision},
        quantization={"kind": "none"},
        dtype=choose_dtype("auto", device, "lora", config.model_type).value,
        max_length=max_positions(config) or 0,
        **defaults,
        heads=list((settings or {}).get("modules_to_save") or ()),
    )


def check_whole_adapter(directory: Path) -> None:
    """Raise InputError for a checkpoint whose adapter needs a base rewritten by initialization."""
    run = get_run_dir(directory) if directory.absolute().parent.name == CHECKPOINTS else None
    if run is None or (directory / CARD).is_file() or not (directory / ADAPTER_CONFIG).is_file():
        return
    from ftlevel.methods.merging import read_peft_config  # imports PEFT tuners

    init = read_peft_config(directory).get("init_lora_weights")
    if init in BASE_MODIFYING_INITS:
        raise InputError(
            f"{directory} is a checkpoint of a run that began with init_lora_weights={init!r}, "
            "which changes the base weights until the run ends. Resume it first: ftlevel train "
            f"--output-dir {quote(str(run))} --resume"
        )


_LOCAL = ("directory", "gguf")
_WAY_OUT = "If it is elsewhere now, name its place: --model PATH."


def find_base(card: AdapterCard, directory: Path, base: ModelSource | None = None) -> ModelSource:
    """Returns the base of the adapter in `directory`, after checking its weights.

    `base` is the user's choice, if any. A local base is first looked up relative to the adapter, so
    that both may be moved together. Raises InputError if the base is missing or has other weights.
    """
    if base is not None:
        source = base
    elif card.base.get("kind") in _LOCAL:
        source = _find_local(card, directory)
    else:
        try:
            source = _resolve_base(card.base["name"], directory, card.base.get("revision"))
        except InputError as error:
            raise InputError(f"{error} {_WAY_OUT}") from None
    check_base(source, card, directory)
    return source


def find_full_base(ref: ModelRef) -> ModelRef | None:
    """Returns `ref` with its base in place of the weights that `--method full` trained.

    None for a different method, a new head, or a base that is missing or has changed.
    """
    card, path = ref.card, ref.source.path
    if card.method != "full" or card.merge or card.quantized or card.heads or path is None:
        return None
    try:
        source = find_base(card, path)
    except InputError:
        return None
    return replace(ref, source=source, run=None, notes=[])


def _find_local(card: AdapterCard, directory: Path) -> ModelSource:
    name, relative = card.base["name"], card.base.get("path")
    tried = [resolve_relative(relative, directory)] if relative else []
    tried = list(dict.fromkeys([*tried, Path(name)]))
    existing = [path for path in tried if path.exists()]
    if not existing:
        raise InputError(
            f"the base model of {directory} is not there (looked for at "
            f"{join_names(map(str, tried))}). Name its place: --model PATH."
        )
    expected = card.base.get("fingerprint")
    if len(existing) > 1:
        existing = [p for p in existing if base_fingerprint(p) == expected] or existing
    return _resolve_base(str(existing[0]), directory)


def check_base(source: ModelSource, card: AdapterCard, directory: Path) -> None:
    """Raise InputError if the weights of `source` are not those of the base in training."""
    expected = card.base.get("fingerprint")
    if source.path is None or expected is None:
        return
    actual = base_fingerprint(source.path)
    if actual == expected and (digest := card.base.get("digest")) and source.path.is_dir():
        expected, actual = digest, hash_weights(source.path)
    if actual != expected:
        raise InputError(
            f"{directory} was trained on {card.base['name']} with weights {expected[:12]}…, and "
            f"{source.label} has other weights ({actual[:12]}…). On them the adapter would be "
            "wrong silently. Name the base that it was trained on: --model PATH, or train again."
        )


def check_cached_base(ref: ModelRef) -> None:
    """Raise InputError if the weights of a base on the Hub changed after training; may download."""
    if ref.source.kind == "hub" and ref.card.base.get("fingerprint") is not None:
        local = local_directory(ref.source)
        source = replace(ref.source, kind="directory", location=str(local))
        check_base(source, ref.card, ref.adapter_directory)


NAMED = "model.json"
"""File with the name and fingerprint of the auxiliary model."""


@dataclass(frozen=True)
class ReferenceModel:
    """A reference, teacher or guide; `fingerprint` identifies its weights and quantization."""

    name: str
    ref: ModelRef
    fingerprint: str

    def write(self, directory: Path, beside: Path) -> None:
        """Write name and fingerprint to `directory`; a local path also relative to `beside`."""
        path = Path(self.name).expanduser()
        local = {"path": relative_path(path, beside)} if path.exists() else {}
        name = str(path.absolute()) if local else self.name
        write_json(directory / NAMED, {"name": name, **local, "fingerprint": self.fingerprint})


def resolve_reference(
    flag: str, name: str, kind: str, tokenizer: Any, device: str
) -> ReferenceModel:
    """Resolve the auxiliary model `name`, and check that it can score the run's rows.

    `flag` names it in messages; `kind` and `tokenizer` are those of the model being trained. Raises
    InputError if the model does not exist, generates no text, or differs in kind or vocabulary.
    """
    said = f"{flag} {name}"
    ref = resolve_model(name, device=device, said=said)
    if not ref.configured_task.generates_text:
        raise InputError(
            f"{said} was trained for {ref.task}: it writes no text. Name one that does."
        )
    if ref.model_kind != kind:
        raise InputError(
            f"{said} is {with_article(ref.model_kind)}, and the model that is trained is "
            f"{with_article(kind)}. Name {with_article(kind)}."
        )
    if ref.load_tokenizer().get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{said}: its tokenizer differs from that of the model that is trained, so it cannot "
            f"be used on the same tokens. Choose a model with the same tokenizer."
        )
    return ReferenceModel(name, ref, compute_fingerprint(ref))


def resolve_text_model(flag: str, name: str, device: str, dtype: str) -> ReferenceModel:
    """Resolve the guide or teacher `name`, which reads texts and so may have any tokenizer.

    Its fingerprint also covers pooling, normalization and prompts. Raises InputError if it does not
    exist, or is neither an embedding model nor, as a teacher, a reranker.
    """
    said = f"{flag} {name}"
    ref = resolve_model(name, device=device, dtype=dtype, said=said, needs_task=False)
    task = ref.task or find_task(find_directory(name)) or _task_of_texts(ref)
    allowed = ("embedding",) if flag == "--guide" else ("embedding", "reranking")
    if task not in allowed:
        raise InputError(f"{said} was trained for {task}. Name a model for {' or '.join(allowed)}.")
    if not ref.task:
        ref = resolve_model(name, task, device=device, dtype=dtype, said=said)
    form = json.dumps([compute_fingerprint(ref), ref.card.options], sort_keys=True, default=str)
    return ReferenceModel(name, ref, hashlib.sha256(form.encode()).hexdigest())


def _task_of_texts(ref: ModelRef) -> str:
    """Returns the task of a plain model: a classifier with one label is a reranker."""
    config = load_config(ref.source)
    is_classifier = checkpoint_class(config) == "AutoModelForSequenceClassification"
    return "reranking" if is_classifier and config.num_labels == 1 else "embedding"


def resolve_recorded_reference(directory: Path, beside: Path, device: str) -> ReferenceModel:
    """Resolve the model that `write` recorded in `directory`; InputError if its weights changed."""
    recorded = json.loads((directory / NAMED).read_text(encoding="utf-8"))
    name = recorded["name"]
    if recorded.get("path") and (path := resolve_relative(recorded["path"], beside)).exists():
        name = str(path)
    said = f"{name} (the reference of {beside})"
    ref = resolve_model(name, device=device, said=said)
    if compute_fingerprint(ref) != recorded["fingerprint"]:
        raise InputError(
            f"{said} has other weights than in training, and rewards against it would be others. "
            "Put the former ones there, or train again."
        )
    return ReferenceModel(name, ref, recorded["fingerprint"])


def compute_fingerprint(ref: ModelRef) -> str:
    """Returns a SHA-256 of all local weights and of their quantization.

    For a model on the Hub, name and revision take the place of the weights.
    """
    path, digest = ref.source.path, hashlib.sha256()
    if path is None:
        digest.update(f"{ref.base}@{ref.source.revision}".encode())
    else:
        digest.update((hash_weights(path) if path.is_dir() else file_fingerprint(path)).encode())
    for pattern in ("*.safetensors", "*.bin", "adapter_config.json"):
        for file in sorted(ref.directory.glob(pattern)) if ref.directory else []:
            digest.update(f"{file.name} {file_fingerprint(file)}".encode())
    digest.update(json.dumps(ref.quantization, sort_keys=True, default=str).encode())
    return digest.hexdigest()
