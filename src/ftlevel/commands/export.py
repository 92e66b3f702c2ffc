"""Export: find → merge → write tensor by tensor → read back and compare → put in place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import check_file_free, placed_files
from ftlevel.commands.merge import merge
from ftlevel.config import ExportConfig, MergeConfig
from ftlevel.config.choices import Choice
from ftlevel.errors import InputError
from ftlevel.events import Listener, Silence
from ftlevel.merging.export_check import Checked, Original, check_file
from ftlevel.merging.merge_input import find_adapter
from ftlevel.merging.ollama import Prompting, find_prompting, modelfile
from ftlevel.models.hardware import choose_device
from ftlevel.models.kinds import checkpoint_class
from ftlevel.models.loading import (
    build_task_model,
    load_config,
    load_tokenizer,
    quiet_libraries,
    rename_prefix,
)
from ftlevel.models.quantized import quantization_name, stored_quantization
from ftlevel.models.sources import ModelSource, check_revision, resolve_source
from ftlevel.tasks import TASKS
from ftlevel.trained.load import Found, find_trained
from ftlevel.weights.checkpoint import open_checkpoint
from ftlevel.weights.gguf.families import FAMILIES, context_limit, describe, find_problems
from ftlevel.weights.gguf.file import Tensor, file_keys, own_outtype, plan_tensors, write_gguf
from ftlevel.weights.gguf.vocabulary import Vocabulary, read_vocabulary

_CLASS = "AutoModelForCausalLM"


@dataclass(frozen=True)
class ExportResult:
    """What came out.

    Attributes:
        summary: what `--json` prints.
        path: the file; None after a dry run.
    """

    summary: dict[str, Any]
    path: Path | None


@dataclass(frozen=True)
class ExportInput:
    """What is exported, before any weights are read.

    Attributes:
        found: the run, adapter or model.
        config: of its base, or its own.
        tokens: where its tokenizer is.
        tokenizer: its tokenizer.
        vocabulary: what is written of it.
        prompting: how it is spoken to.
    """

    found: Found
    config: Any
    tokens: ModelSource
    tokenizer: Any
    vocabulary: Vocabulary
    prompting: Prompting

    @property
    def has_adapter(self) -> bool:
        """Whether it must be merged first."""
        return self.found.directory is not None


def export(
    config: ExportConfig, *, listener: Listener | None = None, dry_run: bool = False
) -> ExportResult:
    """Write a model as one file for llama.cpp, and a Modelfile for Ollama beside it.

    Raises:
        ConfigError: something is wrong that can be known before weights are read.
        InputError: the model is none that can be written, or its adapter cannot be merged.
        RunError: what was written is not the model; it is not kept.
    """
    listener = listener or Silence()
    began = time.perf_counter()
    for flag, path in (("--out", config.out), ("--out, for its Modelfile:", config.modelfile)):
        check_file_free(flag, path, overwrite=config.overwrite)
    with quiet_libraries():
        listener.stage("find the model")
        device = choose_device(config.device)
        inputs = _resolve(config, device.value)
        listener.choices("export", list(_describe(config, inputs, device)))
        for note in inputs.vocabulary.notes:
            listener.warn(note + ".")
        if dry_run:
            return ExportResult(_dry_run(config, inputs), None)
        with placed_files(config.out, config.modelfile) as place:
            summary = _export(config, inputs, device.value, place, listener)
    summary["seconds"] = round(time.perf_counter() - began, 2)
    return ExportResult(summary, config.out)


def _resolve(config: ExportConfig, device: str) -> ExportInput:
    """Find what is to be exported, and refuse what cannot be.

    Raises:
        InputError: with all reasons.
    """
    found = find_trained(config.model, device)
    if found.directory is not None:
        find_adapter(config.model)  # refuses what cannot be merged
        if config.revision is not None:
            raise InputError(
                f"--revision {config.revision}: {config.model} is an adapter, and its base is the "
                "one that it was trained on. Drop it."
            )
    elif config.revision is not None:
        check_revision(found.source, config.revision)
        found = Found(resolve_source(config.model, config.revision), None, found.card)
    source = found.source
    if source.kind == "gguf" and found.directory is None:
        raise InputError(
            f"{config.model} is a .gguf file already. llama.cpp's llama-quantize changes its type."
        )
    if not TASKS[found.card.task].writes_text:
        raise InputError(
            f"{config.model} was trained for {found.card.task}, and a .gguf file is for programs "
            "that write text. Keep it with transformers."
        )
    model_config = load_config(source)
    _check_model(config.model, model_config, has_adapter=found.directory is not None)
    own = found.directory is not None and (found.directory / "tokenizer_config.json").is_file()
    tokens = ModelSource(str(found.directory), "directory", str(found.directory)) if own else source
    tokenizer = load_tokenizer(tokens)
    try:
        # A merged model may have grown with its tokenizer: the true size is checked once more.
        size = max(model_config.vocab_size, len(tokenizer) if found.directory else 0)
        vocabulary = read_vocabulary(tokenizer, size)
    except InputError as error:
        raise InputError(f"{config.model} cannot be written as GGUF: {error}") from None
    prompting = find_prompting(tokenizer, found.card, vocabulary)
    return ExportInput(found, model_config, tokens, tokenizer, vocabulary, prompting)


def _check_model(name: str, model_config: Any, *, has_adapter: bool) -> None:
    if (stored := stored_quantization(model_config)) is not None and not has_adapter:
        raise InputError(
            f"{name} is stored quantized ({quantization_name(stored)}), and GGUF's kinds of "
            "quantization are others. Export the original model, with --outtype q8_0 if it should "
            "be small."
        )
    problems = find_problems(model_config)
    if not problems and checkpoint_class(model_config) != _CLASS:
        problems = [f"it is a {_saved_as(model_config)}, which does not write text."]
    if problems:
        raise InputError([f"{name} cannot be written as GGUF: {reason}" for reason in problems])


def _saved_as(model_config: Any) -> str:
    """Return the class that a checkpoint was saved as, in words."""
    return ", ".join(model_config.architectures or ()) or str(model_config.model_type)


def _export(
    config: ExportConfig, inputs: ExportInput, device: str, place: Path, listener: Listener
) -> dict[str, Any]:
    """Write both files into `place`, and compare; return the summary."""
    source, model_config, merged = inputs.found.source, inputs.config, None
    vocabulary = inputs.vocabulary
    if inputs.has_adapter:
        directory = place / "merged"
        listener.stage("merge the adapter")
        merged = merge(
            MergeConfig(
                adapters=[config.model],
                output_dir=directory,
                verify=config.verify,
                onto="auto" if config.verify else _unmeasured(inputs),
                device=config.device,
            ),
            listener=Silence(),
        ).summary
        source = ModelSource(str(directory), "directory", str(directory), local_files_only=True)
        model_config = load_config(source)
        vocabulary = read_vocabulary(inputs.tokenizer, model_config.vocab_size)
    checkpoint = _open(source, model_config)
    outtype = own_outtype(checkpoint) if config.outtype == "auto" else config.outtype
    tensors = plan_tensors(checkpoint, model_config, outtype)
    listener.stage(f"write {len(tensors):,} tensors")
    listener.begin(len(tensors))
    path = place / config.out.name
    write_gguf(path, _metadata(config, model_config, vocabulary, outtype), tensors, listener.step)
    checked = None
    if config.verify:
        listener.stage("read the file back and compare")
        original = Original(source, model_config, inputs.tokenizer, device, config.verify_tokens)
        checked = check_file(path, outtype, tensors, vocabulary, original)
    text = modelfile(config.out.name, inputs.prompting)
    (place / config.modelfile.name).write_text(text, encoding="utf-8")
    return _summary(config, inputs, outtype, tensors) | {
        "size_bytes": path.stat().st_size,
        "merged": merged and {key: merged[key] for key in ("onto", "verified", "agreement")},
        "verified": checked is not None,
        "check": checked and _facts(checked),
    }


def _unmeasured(inputs: ExportInput) -> str:
    """Return what a run is merged onto when nothing is measured: the weights it was trained on."""
    kind = inputs.found.card.quantization.get("kind", "none")
    return "auto" if kind == "none" else "dequantized"


def _open(source: ModelSource, model_config: Any) -> Any:
    model = build_task_model(model_config, _CLASS)
    return open_checkpoint(source, model, rename_prefix(model_config, _CLASS))


def _metadata(
    config: ExportConfig, model_config: Any, vocabulary: Vocabulary, outtype: str
) -> dict[str, Any]:
    # transformers takes a llama that is called mistral for an architecture that GGUF has not.
    name = "Mistral" if config.out.stem == "mistral" else config.out.stem
    general = {
        "general.architecture": FAMILIES[model_config.model_type].architecture,
        "general.name": name,
    }
    return general | file_keys(outtype) | describe(model_config) | vocabulary.metadata()


def _facts(checked: Checked) -> dict[str, Any]:
    return {
        "beside_rounded": asdict(checked.file),
        "beside_model": asdict(checked.model),
        "settings_of_the_model": checked.own_settings,
        "texts": checked.texts,
        "splitting_read": checked.splitting,
    }


def _describe(config: ExportConfig, inputs: ExportInput, device: Choice) -> Iterator[Choice]:
    found, architecture = inputs.found, FAMILIES[inputs.config.model_type].architecture
    reason = f"{found.card.method}, merged first" if inputs.has_adapter else "as it is"
    yield Choice("model", config.model, reason)
    yield Choice("architecture", architecture, f"{inputs.config.model_type} in transformers")
    yield Choice("outtype", config.outtype, "the model's own" if config.outtype == "auto" else "")
    positions, window = context_limit(inputs.config)
    why = f"its sliding window; llama.cpp has none for {architecture}" if window else ""
    yield Choice("context", f"{positions:,} tokens", why)
    yield Choice("tokenizer", inputs.vocabulary.model, f"splits text like {inputs.vocabulary.pre}")
    yield Choice("template", inputs.prompting.kind, inputs.prompting.reason)
    yield Choice("out", config.out)
    if config.verify:
        yield device


def _summary(
    config: ExportConfig, inputs: ExportInput, outtype: str, tensors: list[Tensor]
) -> dict[str, Any]:
    return {
        "model": config.model,
        "method": inputs.found.card.method,
        "format": config.format,
        "architecture": FAMILIES[inputs.config.model_type].architecture,
        "outtype": outtype,
        "tensors": len(tensors),
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
        "tokenizer": {"model": inputs.vocabulary.model, "pre": inputs.vocabulary.pre,
                      "tokens": len(inputs.vocabulary.tokens),
                      "notes": inputs.vocabulary.notes},
        "template": inputs.prompting.kind,
        "stops": inputs.prompting.stops,
        "out": str(config.out),
        "modelfile": str(config.modelfile),
        "versions": library_versions(),
    }  # fmt: skip


def _dry_run(config: ExportConfig, inputs: ExportInput) -> dict[str, Any]:
    """Return the summary of what would be written; sizes are of the base's shapes."""
    outtype: str = config.outtype
    tensors: list[Tensor] = []
    if inputs.found.source.kind != "gguf":  # of an adapter on one, no shapes are known yet
        checkpoint = _open(inputs.found.source, inputs.config)
        outtype = own_outtype(checkpoint) if outtype == "auto" else outtype
        tensors = plan_tensors(checkpoint, inputs.config, outtype)
    return _summary(config, inputs, outtype, tensors) | {"dry_run": True}
