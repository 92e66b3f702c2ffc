"""One .gguf file for llama.cpp, and a Modelfile for Ollama: written tensor by tensor, read back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.merge_card import how_near
from ftlevel.config import ExportConfig
from ftlevel.config.choices import Choice
from ftlevel.errors import InputError
from ftlevel.events import Listener
from ftlevel.merging.formats.base import MergeAdapter
from ftlevel.merging.formats.gguf_check import Checked, Original, check_file
from ftlevel.merging.formats.ollama import Prompting, find_prompting, modelfile
from ftlevel.merging.serving.whole import record_whole, start_of
from ftlevel.models.kinds import checkpoint_class
from ftlevel.models.loading import build_task_model, load_config, load_tokenizer, rename_prefix
from ftlevel.models.quantized import quantization_name, stored_quantization
from ftlevel.models.sources import ModelSource
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import ModelRef
from ftlevel.weights.checkpoint import open_checkpoint
from ftlevel.weights.gguf.blocks import CHOSEN
from ftlevel.weights.gguf.families import FAMILIES, context_limit, describe, find_problems
from ftlevel.weights.gguf.file import Tensor, file_keys, own_outtype, plan_tensors, write_gguf
from ftlevel.weights.gguf.vocabulary import Vocabulary, read_vocabulary

_CLASS = "AutoModelForCausalLM"


def plan_export(config: ExportConfig, found: ModelRef) -> GgufExport:
    """Return what will be written, and refuse what cannot be.

    Raises:
        InputError: with all reasons.
    """
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
    return GgufExport(config, found, model_config, tokenizer, vocabulary, prompting)


@dataclass(frozen=True)
class GgufExport:
    """What is written, before any weights are read.

    Attributes:
        config: what was asked for.
        found: the run, adapter or model.
        model_config: of its base, or its own.
        tokenizer: its tokenizer.
        vocabulary: what is written of it.
        prompting: how it is spoken to.
    """

    config: ExportConfig
    found: ModelRef
    model_config: Any
    tokenizer: Any
    vocabulary: Vocabulary
    prompting: Prompting

    @property
    def notes(self) -> list[str]:
        """What the user should know, as sentences without a full stop."""
        return list(self.vocabulary.notes)

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yield the lines for the screen."""
        config, found = self.config, self.found
        architecture = FAMILIES[self.model_config.model_type].architecture
        merges = found.directory is not None
        yield Choice(
            "model", config.model, f"{found.card.method}, merged first" if merges else "as it is"
        )
        yield Choice(
            "architecture", architecture, f"{self.model_config.model_type} in transformers"
        )
        own = "the model's own" if config.outtype == "auto" else ""
        yield Choice("outtype", config.outtype, own)
        positions, window = context_limit(self.model_config)
        why = f"its sliding window; llama.cpp has none for {architecture}" if window else ""
        yield Choice("context", f"{positions:,} tokens", why)
        yield Choice("tokenizer", self.vocabulary.model, f"splits text like {self.vocabulary.pre}")
        yield Choice("template", self.prompting.kind, self.prompting.reason)
        yield Choice("out", config.out)
        if config.verify:
            yield device

    def dry_run(self) -> dict[str, Any]:
        """Return the summary of what would be written; sizes are of the base's shapes."""
        outtype: str = self.config.outtype
        tensors: list[Tensor] = []
        if self.found.source.kind != "gguf":  # of an adapter on one, no shapes are known yet
            checkpoint = _open(self.found.source, self.model_config)
            outtype = own_outtype(checkpoint) if outtype == "auto" else outtype
            tensors = plan_tensors(checkpoint, self.model_config, outtype)
        return self._summary(outtype, tensors)

    def write(
        self, place: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Write both files into `place`, and compare; return the summary."""
        config, source, model_config = self.config, self.found.source, self.model_config
        vocabulary, directory = self.vocabulary, place / "merged"
        if self.found.directory is not None:
            listener.stage("merge the adapter")
        merged = merge(directory)
        if self.found.directory is not None:
            source = ModelSource(str(directory), "directory", str(directory), local_files_only=True)
            model_config = load_config(source)
            vocabulary = read_vocabulary(self.tokenizer, model_config.vocab_size)
        checkpoint = _open(source, model_config)
        outtype = own_outtype(checkpoint) if config.outtype == "auto" else config.outtype
        tensors = plan_tensors(checkpoint, model_config, outtype, merged.choose)
        listener.stage(f"write {len(tensors):,} tensors")
        listener.begin(len(tensors))
        path = place / config.out.name
        metadata = _metadata(config, model_config, vocabulary, outtype)
        write_gguf(path, metadata, tensors, listener.step)
        checked = None
        if config.verify:
            listener.stage("read the file back and compare")
            tokens = config.verify_tokens
            original = Original(source, model_config, self.tokenizer, device, tokens)
            checked = check_file(path, outtype, tensors, vocabulary, original, merged.beside_run)
        text = modelfile(config.out.name, self.prompting)
        (place / _modelfile(config).name).write_text(text, encoding="utf-8")
        if config.recorded:
            listener.stage("record its answers")
            # In few bits a server must answer as the file does; how far that is, is told above.
            own = _as_source(path) if outtype in CHOSEN else source
            record_whole(place / config.outputs[2].name, config, self.found, own, outtype, device)
        return self._summary(outtype, tensors) | {
            "size_bytes": path.stat().st_size,
            "merged": {key: merged.summary[key] for key in ("onto", "verified", "agreement")}
            if merged.summary
            else None,
            "verified": checked is not None,
            "check": checked and _facts(checked),
        }

    def _summary(self, outtype: str, tensors: list[Tensor]) -> dict[str, Any]:
        config, vocabulary = self.config, self.vocabulary
        return {
            "model": config.model,
            "method": self.found.card.method,
            "format": config.format,
            "architecture": FAMILIES[self.model_config.model_type].architecture,
            "outtype": outtype,
            "tensors": len(tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
            "tokenizer": {"model": vocabulary.model, "pre": vocabulary.pre,
                          "tokens": len(vocabulary.tokens), "notes": vocabulary.notes},
            "template": self.prompting.kind,
            "stops": self.prompting.stops,
            "start": start_of(config),
            "out": str(config.out),
            "modelfile": str(_modelfile(config)),
            "versions": library_versions(),
        }  # fmt: skip

    @staticmethod
    def describe(summary: Mapping[str, Any]) -> Iterator[str]:
        """Yield what came out, a line each."""
        size = f"{summary['tensor_bytes'] / 2**20:,.1f} MiB"
        count = f"{summary['tensors']:,} tensors"
        yield f"{summary['architecture']}: {count}, {summary['outtype']}, {size}"
        if summary.get("dry_run"):
            yield "dry run: everything was checked, nothing was written."
            return
        if summary["merged"] is not None:
            check = (
                "checked as ftlevel merge does" if summary["merged"]["verified"] else "not checked"
            )
            yield f"the adapter was merged onto the {summary['merged']['onto']} weights, {check}"
        if (check := summary["check"]) is None:
            yield "not verified (--no-verify)"
        else:
            yield from _check_lines(check, summary)
            if not summary["start"]:
                yield "no answers are recorded for ftlevel check-served (--for llama.cpp or ollama)"
        yield f"saved {summary['out']} and {summary['modelfile']}  ({summary['seconds']:.1f} s)"
        if summary["start"]:
            yield "serve it:"
            yield from (f"  {command}" for command in summary["start"])


def _as_source(path: Path) -> ModelSource:
    return ModelSource(str(path), "gguf", str(path.parent), path.name, local_files_only=True)


def _modelfile(config: ExportConfig) -> Path:
    return config.outputs[1]


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
        "beside_run": checked.run and asdict(checked.run),
        "settings_of_the_model": checked.own_settings,
        "texts": checked.texts,
        "splitting_read": checked.splitting,
    }


def _check_lines(check: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    exact, model = check["beside_rounded"], check["beside_model"]
    yield (
        f"read back: over {exact['targets']:,} tokens, logits differ from the model's in "
        f"{summary['outtype']} by {exact['max_difference']:.2g} at most"
    )
    yield (
        f"beside the model itself: KL {model['kl']:.2g}, top-1 {model['top1']:.1%}, "
        f"loss {model['loss']:.4f} (the model {model['loss_reference']:.4f})"
    )
    if (run := check["beside_run"]) is not None:
        yield f"beside it as trained, on rows that no code was chosen on: {how_near(run)}"
    if check["settings_of_the_model"]:
        own_settings = ", ".join(check["settings_of_the_model"])
        yield f"transformers does not read {own_settings} from a .gguf; the model's own was used"
    how = (
        "" if check["splitting_read"]
        else f" (how it splits text is named, {summary['tokenizer']['pre']}; transformers does not "
        "read that)"
    )  # fmt: skip
    yield f"the same tokens for {check['texts']} texts{how}"
