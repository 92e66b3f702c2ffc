"""Resolve a name to a run, checkpoint, adapter or model, with task, base, labels and prompt format.

`resolve_model` is the single entry point. It must not load weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from ftlevel.artifacts.cards import CARD, AdapterCard, read_card
from ftlevel.artifacts.files import base_digest, base_fingerprint, check_regular
from ftlevel.artifacts.ownership import CHECKPOINTS
from ftlevel.artifacts.places import resolve_relative
from ftlevel.artifacts.run_directory import CONFIG, find_run
from ftlevel.artifacts.sentence_transformers import find_task
from ftlevel.config.methods.lora import BASE_MODIFYING_INITS
from ftlevel.data.encoding.collate import ensure_pad_token
from ftlevel.data.encoding.encode import PromptFormat, read_format
from ftlevel.errors import InputError, join_names, reading
from ftlevel.models.hardware import choose_dtype
from ftlevel.models.kinds import checkpoint_class, max_positions, model_kind
from ftlevel.models.loading import build_task_model, load_config, load_tokenizer
from ftlevel.models.quantization import (
    as_quant_config,
    quantization_facts,
    quantization_name,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.models.targets import find_heads
from ftlevel.tasks import TASKS, BaseTask
from ftlevel.trained.adapter_formats import AdapterReader, find_reader
from ftlevel.weights.checkpoint import merge_sharded_checkpoint
from ftlevel.weights.tensor_files import read_header

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PLAIN = "none"
"""Method name of a model without an adapter."""
_DEFAULT_TASK = "text-generation"


@dataclass(frozen=True)
class ModelRef:
    """A reference to a run, checkpoint, adapter or model, before weights are loaded.

    Attributes:
        source: the base model of an adapter, or the model itself.
        directory: directory of the adapter; None for a model without one.
        card: training settings, derived from the files if ftlevel did not train it. Its
            quantization is that of the loaded weights.
        is_ours: whether ftlevel wrote it, with a card.
    """

    source: ModelSource
    directory: Path | None
    card: AdapterCard
    run: Path | None = None
    notes: list[str] = field(default_factory=list)
    is_stored_quantized: bool = False
    is_ours: bool = True

    @property
    def kind(self) -> str:
        """Kind: run, checkpoint, adapter, model, quantized, hub or gguf.

        An adapter that another library wrote is `peft` or the kind of its `AdapterReader`.
        """
        if self.run is not None:
            place = self.directory or Path(self.source.name)
            return "checkpoint" if place.absolute().parent.name == CHECKPOINTS else "run"
        if self.directory is not None and not self.is_ours:
            reader = find_reader(self.directory)
            return reader.kind if reader else "peft"
        if self.directory is not None:
            return "adapter"
        if self.source.kind in ("hub", "gguf"):
            return self.source.kind
        return "quantized" if self.is_stored_quantized else "model"

    @property
    def task(self) -> str:
        """Value of `--task`."""
        return self.card.task

    @property
    def base(self) -> str:
        """Name of the base model, or of a model without an adapter."""
        return self.source.name

    @property
    def revision(self) -> str | None:
        """Revision of a base on the Hub."""
        return self.source.revision

    @property
    def quantization(self) -> Mapping[str, Any]:
        """Quantization of the loaded weights: `kind` and its settings."""
        return self.card.quantization

    @property
    def labels(self) -> list[str]:
        """Class or tag names by index; empty if there are none."""
        return self.card.labels

    @property
    def prompt_format(self) -> PromptFormat | None:
        """Format of the prompts; None without prompts."""
        return read_format(self.card)


def resolve_model(
    name: str,
    task: str | None = None,
    base: str | None = None,
    *,
    device: str,
    dtype: str = "auto",
    said: str = "",
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

    Raises:
        InputError: It does not exist, its base has other weights, or it was trained for another
            task.
    """
    with reading(name):
        ref = _resolve(name, device, task, said or name, base)
    if base is not None and ref.directory is None:
        raise InputError(
            f"--model {base}: it names the base of an adapter, and {name} is a whole model. Drop "
            "it."
        )
    return with_dtype(resolve_stored(ref), dtype, device)


def resolve_stored(ref: ModelRef) -> ModelRef:
    """Return `ref` with the quantization of the stored weights in its card."""
    stored = None if ref.source.kind == "gguf" else stored_quantization(load_config(ref.source))
    if stored is None:
        return replace(ref, is_stored_quantized=False)
    card = replace(ref.card, quantization=quantization_facts(stored))
    return replace(ref, card=card, is_stored_quantized=True)


def with_dtype(ref: ModelRef, dtype: str, device: str) -> ModelRef:
    """Return `ref` with the compute precision `dtype`; auto changes nothing.

    Raises ConfigError if the device or model type does not support it, InputError if a stored
    quantization fixes the compute dtype.
    """
    if dtype in ("auto", ref.card.dtype):
        return ref
    config = load_config(ref.source)
    stored = stored_quantization(config)
    if stored is not None and as_quant_config(stored) is None:
        raise InputError(
            f"--dtype {dtype}: {ref.source.words} is stored quantized "
            f"({quantization_name(stored)}), and its kernels compute in the type that it was saved "
            f"with ({config.dtype}). Drop --dtype, or name the original model."
        )
    chosen = choose_dtype(dtype, device, ref.card.method, config.model_type).value
    return replace(ref, card=replace(ref.card, dtype=chosen))


def compute_dtype(card: AdapterCard, device: str) -> str:
    """Return the card's compute precision, with float32 in place of float16 on the CPU."""
    return "float32" if card.dtype == "float16" and device == "cpu" else card.dtype


def describe_dtype(ref: ModelRef, dtype: str) -> str:
    """Return the source of the compute precision, given the value of `--dtype`."""
    if dtype != "auto":
        return "--dtype"
    return "as in training" if ref.is_ours else "auto"


def _resolve(name: str, device: str, task: str | None, said: str, base: str | None) -> ModelRef:
    path = find_directory(name)
    if (path / CARD).is_file():
        directory, card = path, read_card(path)
        if task not in (None, card.task):
            raise InputError(f"{name} was trained for {card.task}, not for {task}. Drop --task.")
        run = find_run(directory)
        if card.method == "full":
            source = resolve_source(str(merge_sharded_checkpoint(directory)), said=str(directory))
            return ModelRef(replace(source, name=str(directory)), None, card, run)
        return ModelRef(find_base(card, directory, base), directory, card, run)
    if (reader := find_reader(path)) is not None:
        return _resolve_foreign(path, reader, device, task, base)
    check_whole_adapter(path)
    if (path / ADAPTER_CONFIG).is_file():
        return _resolve_peft(path, name, device, task, base)
    source = resolve_source(name, said=said)
    config = load_config(source)
    own = TASKS[task or find_task(path) or _task_of_model(config, said)]
    return ModelRef(source, None, build_default_card(source, config, own, device), is_ours=False)


def _resolve_peft(
    directory: Path, name: str, device: str, task: str | None, base: str | None
) -> ModelRef:
    """Return the reference to an adapter that plain PEFT wrote."""
    source, settings = read_plain_adapter(directory, base)
    config = load_config(source)
    own = TASKS[adapter_task(directory, settings, config, task)]
    if own.has_new_head:
        auto_class = own.auto_class(model_kind(config), config.model_type)
        outputs = count_outputs(directory, build_task_model(config, auto_class))
        if outputs not in (0, config.num_labels):
            config = load_config(source, num_labels=outputs)
    card = build_default_card(source, config, own, device, directory, settings)
    note = f"{name} was not made by ftlevel: its base, {source.name}, is taken on trust"
    return ModelRef(source, directory, card, None, [note], is_ours=False)


def _resolve_foreign(
    directory: Path, reader: AdapterReader, device: str, task: str | None, base: str | None
) -> ModelRef:
    """Return the reference to an adapter in another library's format."""
    adapter = reader.read(directory)
    own = TASKS[adapter.task(task)]
    source = resolve_plain_base(adapter.base, directory, None, base)
    settings = {"peft_type": reader.peft_type, "modules_to_save": adapter.heads}
    card = build_default_card(source, load_config(source), own, device, directory, settings)
    note = f"{directory} was made by {reader.library}: its base, {source.name}, is taken on trust"
    return ModelRef(source, directory, adapter.complete(card), None, [note], is_ours=False)


def find_directory(name: str) -> Path:
    """Return the directory with the files of `name`, which may not exist; for a run, `adapter`.

    Raises InputError if the run has not finished.
    """
    path = Path(name).expanduser()
    inner = path / "adapter"
    if not (path / ADAPTER_CONFIG).is_file() and (inner / ADAPTER_CONFIG).is_file():
        path = inner if card_directory(path) is None else path
    return card_directory(path) or path


def is_model(name: str) -> bool:
    """Whether `name` is a local or builtin model, not an adapter or a run with one."""
    place = find_directory(name)
    if (place / ADAPTER_CONFIG).is_file():
        return False
    is_gguf = place.suffix == ".gguf" and place.is_file()
    return is_gguf or name.startswith("builtin:") or (place / "config.json").is_file()


def card_directory(path: Path) -> Path | None:
    """Return the directory with ftlevel.json for `path`; None for a plain model.

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
    """Return the task of a model that ftlevel did not train, from its saved architecture."""
    fits = _tasks_of_class(checkpoint_class(config))
    if fits:
        return fits[0]
    if model_kind(config) in TASKS[_DEFAULT_TASK].auto_classes:
        return _DEFAULT_TASK
    architecture = join_names(config.architectures or ()) or config.model_type
    raise InputError(
        f"{said} does not say what it was trained for: its config.json names {architecture}, a "
        "model without a head. Name the task: --task NAME."
    )


def _tasks_of_class(auto_class: str) -> list[str]:
    return [name for name, task in TASKS.items() if auto_class in task.auto_classes.values()]


def adapter_task(
    directory: Path, settings: Mapping[str, Any], base_config: Any, task: str | None = None
) -> str:
    """Return the task of an adapter that plain PEFT wrote.

    PEFT has no task type for masked language models and saves the model's class instead.
    `base_config` decides if `settings`, the adapter_config.json, name neither. Raises InputError if
    ftlevel has no such task, or `task` differs.
    """
    peft_type = settings.get("task_type")
    named = (settings.get("auto_mapping") or {}).get("base_model_class")
    if peft_type is not None:
        what = f"task_type {peft_type}"
        fits = [name for name, own in TASKS.items() if peft_type in own.peft_types.values()]
    elif named is not None:
        what, config = f"auto_mapping {named}", copy(base_config)
        config.architectures = [named]
        fits = _tasks_of_class(checkpoint_class(config))
    else:
        return task or _task_of_model(base_config, str(directory))
    if not fits:
        raise InputError(
            f"{directory / ADAPTER_CONFIG} has {what}, for which ftlevel has no task. Expected a "
            f"task_type of {join_names(_peft_types())}, or a masked language model."
        )
    if task not in (None, *fits):
        raise InputError(
            f"{directory} was trained for {fits[0]} ({what} in its {ADAPTER_CONFIG}), not for "
            f"{task}. Drop --task."
        )
    return task or fits[0]


def _peft_types() -> list[str]:
    return list(dict.fromkeys(kind for task in TASKS.values() for kind in task.peft_types.values()))


def count_outputs(directory: Path, meta: Any) -> int:
    """Return the number of outputs of the head saved with an adapter; 0 if it has none."""
    tensors, _ = read_header(directory / ADAPTER_WEIGHTS)
    shapes = {f".{name}": tensor.spec.shape for name, tensor in tensors.items()}
    outputs = 0
    for head in find_heads(meta):
        for name, _ in meta.get_submodule(head).named_parameters(prefix=head):
            found = [shape for stored, shape in shapes.items() if stored.endswith(f".{name}")]
            if found and name.endswith("weight"):
                outputs = found[0][0]  # rows of the last layer
    return outputs


def read_plain_adapter(
    directory: Path, place: str | None = None, base_source: ModelSource | None = None
) -> tuple[ModelSource, dict[str, Any]]:
    """Return the base of the PEFT adapter in `directory`, and its adapter_config.json.

    `place` is the user's location of the base; `base_source` the base itself, if known. Raises
    InputError if the configuration is invalid or there is no base.
    """
    path = directory / ADAPTER_CONFIG
    check_regular(directory.iterdir(), str(directory))
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Is the copy incomplete?") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is no configuration of an adapter. Expected an object.")
    base = settings.get("base_model_name_or_path")
    if base_source is None and not (base and isinstance(base, str)):
        raise InputError(f"{path} names no base model. Write it as base_model_name_or_path.")
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{directory} holds no {ADAPTER_WEIGHTS}. Save the adapter again with PEFT's "
            "save_pretrained."
        )
    if base_source is not None:
        return base_source, settings
    return resolve_plain_base(str(base), directory, settings.get("revision"), place), settings


def resolve_plain_base(
    base: str, directory: Path, revision: str | None = None, place: str | None = None
) -> ModelSource:
    """Return the base that the adapter names, or the user's `place` if given."""
    if place is not None:
        return resolve_source(place, said=f"--model {place}")
    return resolve_source(base, revision, said=describe_base(str(directory), base))


def build_default_card(
    source: ModelSource,
    config: Any,
    task: BaseTask,
    device: str,
    directory: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> AdapterCard:
    """Return a card for a model, or for an adapter on it, that ftlevel did not train.

    Prompts are formatted as `train` would. `config` must have as many labels as the head;
    `settings` is the adapter_config.json, None for a model.
    """
    kind = model_kind(config)
    task.auto_class(kind, config.model_type)  # raises if the model does not support the task
    tokenizer = load_own_tokenizer(source, directory)
    ensure_pad_token(tokenizer)
    known = task.card_defaults(config, tokenizer, kind)
    return AdapterCard(
        method=str(settings["peft_type"]).lower().replace("_", "-") if settings else PLAIN,
        task=task.name,
        base={"name": source.name, "kind": source.kind, "revision": source.revision},
        quantization={"kind": "none"},
        dtype=choose_dtype("auto", device, "lora", config.model_type).value,
        max_length=max_positions(config) or 0,
        **known,
        heads=list((settings or {}).get("modules_to_save") or ()),
    )


def load_own_tokenizer(source: ModelSource, directory: Path | None) -> Any:
    """Load the tokenizer saved with the adapter, or the base's if there is none."""
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return load_tokenizer(source)
    return load_tokenizer(ModelSource(str(directory), "directory", str(directory)))


def check_trained_head(missing: Sequence[str], heads: Sequence[str], name: str, task: str) -> None:
    """Raise InputError if a head for `task` would be randomly initialized."""
    lost = [key for key in missing if any(key.startswith(f"{head}.") for head in heads)]
    if lost:
        raise InputError(
            f"{name} has no trained head for --task {task} ({lost[0]} is missing). Name a model or "
            f"a run that was trained for it: ftlevel train --task {task} --model {name} …"
        )


def check_whole_adapter(directory: Path) -> None:
    """Raise InputError for a checkpoint whose adapter does not apply to the unchanged base."""
    run = find_run(directory) if directory.absolute().parent.name == CHECKPOINTS else None
    if run is None or (directory / CARD).is_file() or not (directory / ADAPTER_CONFIG).is_file():
        return
    from ftlevel.methods.merging import read_peft_config  # imports PEFT's tuners

    init = read_peft_config(directory).get("init_lora_weights")
    if init in BASE_MODIFYING_INITS:
        raise InputError(
            f"{directory} is a checkpoint of a run that began with init_lora_weights={init!r}, "
            "inside the base's weights: its adapter is made one of the untouched base at the end. "
            f"Go on with it: ftlevel train --output-dir {quote(str(run))} --resume"
        )


_LOCAL = ("directory", "gguf")
_WAY_OUT = "If it is elsewhere now, name its place: --model PATH."


def find_base(card: AdapterCard, directory: Path, place: str | None = None) -> ModelSource:
    """Find the base of the adapter in `directory`, and check its weights.

    `place` overrides the location. A local base is looked up relative to the adapter first, so that
    both may be moved together. Raises InputError if it is missing or has other weights.
    """
    name, revision = card.base["name"], card.base.get("revision")
    if place is not None:
        source = resolve_source(place, said=f"--model {place}")
    elif card.base.get("kind") in _LOCAL:
        source = _find_local(card, directory)
    else:
        words = describe_base(str(directory), name)
        try:
            source = resolve_source(name, revision, said=words)
        except InputError as error:
            raise InputError(f"{error} {_WAY_OUT}") from None
    check_base(source, card, directory)
    return source


def _find_local(card: AdapterCard, directory: Path) -> ModelSource:
    name, relative = card.base["name"], card.base.get("path")
    tried = [resolve_relative(relative, directory)] if relative else []
    tried = list(dict.fromkeys([*tried, Path(name)]))
    there = [path for path in tried if path.exists()]
    if not there:
        raise InputError(
            f"the base model of {directory} is not there (looked for at "
            f"{join_names(map(str, tried))}). Name its place: --model PATH."
        )
    expected = card.base.get("fingerprint")
    same = [path for path in there if len(there) == 1 or base_fingerprint(path) == expected]
    path = str((same or there)[0])
    return resolve_source(path, said=describe_base(str(directory), path))


def check_base(source: ModelSource, card: AdapterCard, directory: Path) -> None:
    """Raise InputError if `source` has other weights than the base of training."""
    expected = card.base.get("fingerprint")
    if source.path is None or expected is None:
        return
    found = base_fingerprint(source.path)
    if found == expected and (whole := card.base.get("digest")) and source.path.is_dir():
        expected, found = whole, base_digest(source.path)
    if found != expected:
        raise InputError(
            f"{directory} was trained on {card.base['name']} with weights {expected[:12]}…, and "
            f"{source.words} has other weights ({found[:12]}…). On them the adapter would be wrong "
            "silently. Name the base that it was trained on: --model PATH, or train again."
        )


def check_cached_base(source: ModelSource, card: AdapterCard, directory: Path) -> None:
    """Raise InputError if a base on the Hub has other weights; downloads it if it is not cached."""
    if source.kind == "hub" and card.base.get("fingerprint") is not None:
        from ftlevel.weights.checkpoint import local_directory

        local = local_directory(source)
        check_base(replace(source, kind="directory", location=str(local)), card, directory)


def describe_base(adapter: str, base: str) -> str:
    """Return the name of an adapter's base in messages."""
    return f"{base} (the base of {adapter})"
