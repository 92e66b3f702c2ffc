"""Export a model as one .gguf file for llama.cpp, with a Modelfile for Ollama.

The file is read back with transformers. The logits must equal those of the model after torch rounds
the weights to the file's type. The effect of rounding itself is measured separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ftlevel.artifacts.cards import format_difference, library_versions
from ftlevel.config.section import Choice
from ftlevel.data.encoding.chat import get_end_of_turn_id
from ftlevel.data.encoding.row import Encoded
from ftlevel.errors import InputError, RunError
from ftlevel.evaluation.two_models import (
    Agreement,
    EvalSet,
    RowLogits,
    compare_logits,
    in_float32,
    load_eval_text,
    split_into_windows,
)
from ftlevel.events import Listener
from ftlevel.extras.serving.config import ExportConfig
from ftlevel.extras.serving.formats import (
    CodesFunction,
    Export,
    MergeAdapter,
    MergeOutput,
    exporter_of,
    merge_first,
    stop_notes,
)
from ftlevel.extras.serving.gguf_families import (
    FAMILIES,
    build_metadata,
    context_limit,
    get_gguf_limitations,
)
from ftlevel.extras.serving.gguf_file import (
    GRIDS,
    OUTTYPE_OF_DTYPE,
    SELECTED_TYPES,
    GGUFTensor,
    file_keys,
    get_outtype,
    iterate_rounded_weights,
    plan_tensors,
    save_gguf,
)
from ftlevel.extras.serving.gguf_vocabulary import READ_BY_TRANSFORMERS, Vocabulary, load_vocab
from ftlevel.extras.serving.ollama import PromptTemplate, get_prompt_template, modelfile
from ftlevel.extras.serving.recorded import record_whole, start_commands
from ftlevel.models.kinds import checkpoint_class, max_positions
from ftlevel.models.loading import load_config, load_model, load_tokenizer
from ftlevel.models.quantization import get_quantization_config, quantization_name
from ftlevel.models.sources import ModelSource, resolve_source
from ftlevel.safe_io import save_text
from ftlevel.tasks import TASKS
from ftlevel.trained.model_ref import ModelRef
from ftlevel.weights.checkpoint import open_base

BOUND = 1e-4
"""Allowed difference of logits, as a share of the largest one: float32 sums depend on order."""
_CLASS = "AutoModelForCausalLM"
_WINDOW = 128
TEST_INPUTS = (
    "The quick brown fox jumps over the lazy dog. It's here, they'll see; DON'T!",
    "In 2024, 1,234 of 56789 rows   7 8.90% and 0x1F",
    "def f(x):\n    if x > 10:\n\treturn [i**2 for i in range(x)]\n\n\n# done",
    "naïve café — Ελληνικά, русский, 日本語テキスト, 한국어, العربية 🙂👩‍🚀",
    "  two spaces before, and behind  ",
    "\n\nlines\r\n\r\nand\ttabs\t\t.",
)
_IGNORED_KEYS = set(
    """
    architectures dtype transformers_version _name_or_path use_cache model_type bos_token_id
    eos_token_id pad_token_id unk_token_id initializer_range id2label label2id problem_type
    task_specific_params pretraining_tp is_decoder attention_dropout attn_pdrop embd_pdrop
    resid_pdrop n_ctx reorder_and_upcast_attn max_window_layers _sliding_window_pattern
    output_attentions output_hidden_states return_dict chunk_size_feed_forward
    gradient_checkpointing _model_name_or_path
    """.split()
)


@dataclass(frozen=True)
class Original:
    """The model to export, and how to compare with it: device and number of text `tokens`."""

    source: ModelSource
    config: Any
    tokenizer: Any
    device: str
    tokens: int

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the model's stored weights; float32 if the config has none."""
        return getattr(self.config, "dtype", None) or torch.float32


def check_file(
    path: Path,
    outtype: str,
    tensors: Sequence[GGUFTensor],
    vocab: Vocabulary,
    original: Original,
    beside_run: Callable[[Any], Agreement] | None,
) -> dict[str, Any]:
    """Compare the file, written from `tensors`, with the original model; RunError if it differs.

    Returns the entry of the summary: differences from the model with weights rounded to the file's
    type, from the model itself and from the run (None if not measured), and names of settings that
    transformers does not read from the file.
    """
    source = resolve_source(str(path))
    texts = check_tokens(load_tokenizer(source), original.tokenizer, vocab)
    found = load_config(source)
    if found.model_type == "gpt2":  # only ftlevel reads the number of positions
        found.n_positions = type(found)().n_positions
    config, copied_settings = readable_config(found, original.config)
    eval_set = _create_eval_set(original)
    reference, expected = _score_original(eval_set, outtype, tensors, original)
    # The file stores vectors in a wider dtype than matrices, unless the model itself is narrow.
    is_equal = OUTTYPE_OF_DTYPE.get(original.dtype) == outtype
    dtype = original.dtype if is_equal else torch.float32
    model, missing = load_model(source, config, _CLASS, dtype=dtype, device=original.device)
    if missing:
        raise RunError(
            f"the file lacks {missing[0]} and {len(missing) - 1} more. Nothing is saved."
        )
    with in_float32(model):
        outputs = eval_set.score(model, "float32")
    file = compare_logits(expected, outputs)
    if not file.max_difference <= BOUND * file.scale:
        raise RunError(
            f"the file is not the model: read back by transformers, its logits differ by up to "
            f"{file.max_difference:.3g} from those of the model in {outtype} (KL {file.kl:.3g}, "
            f"top-1 {file.top1:.1%}). Nothing was saved. Please report this with the command."
        )
    return {
        "beside_rounded": asdict(file),
        "beside_model": asdict(compare_logits(reference, outputs)),
        "beside_run": asdict(beside_run(model)) if beside_run else None,
        "settings_of_the_model": copied_settings,
        "texts": texts,
        "splitting_read": vocab.pre in READ_BY_TRANSFORMERS,
    }


def _create_eval_set(original: Original) -> EvalSet:
    """Returns the text windows on which the file is compared with `original`."""
    text = load_eval_text(None, original.tokens)
    length = min(_WINDOW, max_positions(original.config) or _WINDOW)
    rows = [
        Encoded(ids, list(ids), index)
        for index, ids in enumerate(
            split_into_windows(original.tokenizer, text.content, original.tokens, length)
        )
    ]
    objective = TASKS["text-generation"].create_objective("decoder", {})
    return EvalSet(rows, objective, original.tokenizer.pad_token_id or 0, original.device)


def _score_original(
    eval_set: EvalSet, outtype: str, tensors: Sequence[GGUFTensor], original: Original
) -> tuple[RowLogits, RowLogits]:
    """Returns the original's logits with its own weights, and with those rounded to `outtype`."""
    # Scaled block values are not representable in 16-bit precision, so they need float32.
    dtype = torch.float32 if outtype in GRIDS else original.dtype
    model, _ = load_model(
        original.source, original.config, _CLASS, dtype=dtype, device=original.device
    )
    with in_float32(model):
        reference = eval_set.score(model, "float32")
        with torch.no_grad():
            is_rounded = False
            for name, rounded in iterate_rounded_weights(tensors, model):
                weight = model.get_parameter(name)
                is_rounded = is_rounded or not torch.equal(weight.float(), rounded)
                weight.copy_(rounded)
        expected = eval_set.score(model, "float32") if is_rounded else reference
    return reference, expected


def readable_config(config: Any, original: Any) -> tuple[Any, list[str]]:
    """Returns `config` with values of `original` where they differ, and the names of these keys."""
    actual, expected = config.to_dict(), original.to_dict()
    mismatched = {
        key: value
        for key, value in expected.items()
        if key in actual and key not in _IGNORED_KEYS and not _same(actual[key], value)
    }
    if not mismatched:
        return config, []
    values = {key: value for key, value in actual.items() if key not in ("model_type",)}
    return type(config)(**{**values, **mismatched}), sorted(mismatched)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return all(_same(first.get(key), second.get(key)) for key in set(first) | set(second))
    if isinstance(first, float) and isinstance(second, (int, float)):
        return abs(first - second) <= 1e-6 * abs(second)
    return bool(first == second)


def check_tokens(tokenizer: Any, original: Any, vocab: Vocabulary) -> int:
    """Raise RunError if the tokenizers encode a test text differently; return the text count."""
    backend, reference = tokenizer.backend_tokenizer, original.backend_tokenizer
    if vocab.pre not in READ_BY_TRANSFORMERS:
        backend.pre_tokenizer = reference.pre_tokenizer
    if reference.normalizer is not None or backend.normalizer is not None:
        backend.normalizer = reference.normalizer
    special = [token.content for token in original.added_tokens_decoder.values()]
    texts = [*TEST_INPUTS, *(f"a{token}b{token}" for token in special)]
    for text in texts:
        expected, actual = original(text)["input_ids"], tokenizer(text)["input_ids"]
        if expected != actual:
            raise RunError(
                f"the file's tokenizer is not the model's: {text!r} gives {actual}, and should "
                f"give {expected}. Nothing was saved. Please report this with the command."
            )
    return len(texts)


def load_file_vocab(
    name: str, ref: ModelRef, model_config: Any, tokenizer: Any, end: int | None = None
) -> Vocabulary:
    """Returns the vocabulary for a .gguf file; InputError if GGUF does not support it."""
    # Merging may add tokens of the adapter's tokenizer; `write` reads the final size.
    size = max(model_config.vocab_size, len(tokenizer) if ref.directory else 0)
    try:
        return load_vocab(tokenizer, size, end)
    except InputError as error:
        raise InputError(f"{name} cannot be written as GGUF: {error}") from None


def plan_export(config: ExportConfig, ref: ModelRef) -> Export:
    """Plan the export; raise InputError if the model cannot be written as GGUF."""
    source = ref.source
    if source.kind == "gguf" and ref.directory is None:
        raise InputError(
            f"{config.model} is a .gguf file already. llama.cpp's llama-quantize changes its type."
        )
    if (plan := exporter_of(config, ref).plan_gguf()) is not None:
        return plan
    if not TASKS[ref.task].generates_text:
        raise InputError(
            f"{config.model} was trained for {ref.task}, and a .gguf file is for programs "
            "that write text. Keep it with transformers."
        )
    model_config = load_config(source)
    _check_model(config.model, model_config, has_adapter=ref.directory is not None)
    tokenizer = ref.load_tokenizer()
    vocab = load_file_vocab(config.model, ref, model_config, tokenizer)
    prompt_template = get_prompt_template(tokenizer, ref, vocab)
    return GgufExport(config, ref, model_config, tokenizer, vocab, prompt_template)


@dataclass(frozen=True)
class WrittenFile:
    """A .gguf file, and what it was written from: the model at `source`, its `tensors`."""

    path: Path
    source: ModelSource
    model_config: Any
    vocab: Vocabulary
    outtype: str
    tensors: Sequence[GGUFTensor]
    merged: MergeOutput


@dataclass(frozen=True)
class GgufFileExport:
    """Base class of planned .gguf exports, before any weights are read."""

    config: ExportConfig
    ref: ModelRef
    model_config: Any
    tokenizer: Any
    vocab: Vocabulary

    auto_class: ClassVar[str]

    @property
    def architecture(self) -> str:
        """Name of the architecture in llama.cpp."""
        return FAMILIES[self.model_config.model_type].architecture

    @property
    def _model_choice(self) -> Choice:
        merges = self.ref.directory is not None
        how = f"{self.ref.card.method}, merged first" if merges else "as it is"
        return Choice("model", self.config.model, how)

    @property
    def _outtype_choice(self) -> Choice:
        outtype = self.config.outtype
        return Choice("outtype", outtype, "the model's own" * (outtype == "auto"))

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the planned export; sizes are computed from the base's shapes."""
        if self.ref.source.kind == "gguf":  # it has no shapes before it is loaded
            return self._summary(self.config.outtype, [])
        tensors, outtype = self._plan_tensors(self.ref.source, self.model_config)
        return self._summary(outtype, tensors)

    def _plan_tensors(
        self, source: ModelSource, model_config: Any, choose: CodesFunction | None = None
    ) -> tuple[list[GGUFTensor], str]:
        checkpoint = open_base(source, model_config, self.auto_class)
        outtype: str = self.config.outtype
        outtype = get_outtype(checkpoint) if outtype == "auto" else outtype
        unused = TASKS[self.ref.task].get_unused_modules(checkpoint.model)
        return plan_tensors(checkpoint, model_config, outtype, choose, unused), outtype

    def _write_file(
        self, output: Path, listener: Listener, merge: MergeAdapter, end: int | None = None
    ) -> WrittenFile:
        """Save the .gguf file in `output`; `end` is the token appended to texts, if any."""
        model_config, vocab = self.model_config, self.vocab
        merged, source = merge_first(self.ref, output, listener, merge)
        if self.ref.directory is not None:
            model_config = load_config(source)
            vocab = load_vocab(self.tokenizer, model_config.vocab_size, end)
        tensors, outtype = self._plan_tensors(source, model_config, merged.choose)
        listener.stage(f"writing {len(tensors):,} tensors")
        listener.begin(len(tensors))
        path = output / self.config.out.name
        save_gguf(path, self._metadata(model_config, vocab, outtype), tensors, listener.step)
        return WrittenFile(path, source, model_config, vocab, outtype, tensors, merged)

    def _metadata(self, model_config: Any, vocab: Vocabulary, outtype: str) -> dict[str, Any]:
        # transformers maps the name "mistral" to an architecture that GGUF does not have.
        stem = self.config.out.stem
        names = {
            "architecture": self.architecture,
            "name": "Mistral" if stem == "mistral" else stem,
        }
        general = {f"general.{key}": name for key, name in names.items()}
        return general | file_keys(outtype) | build_metadata(model_config) | vocab.metadata()

    def _summary(self, outtype: str, tensors: Sequence[GGUFTensor]) -> dict[str, Any]:
        return self.config.entries | {
            "method": self.ref.card.method,
            "architecture": self.architecture,
            "outtype": outtype,
            "tensors": len(tensors),
            "tensor_bytes": sum(tensor.nbytes for tensor in tensors),
            "versions": library_versions(),
        }

    def describe(self, summary: Mapping[str, Any]) -> Iterator[str]:
        """Yields the lines to print after the export."""
        pooling = f", {summary['pooling']} pooling" if "pooling" in summary else ""
        size = f"{summary['tensor_bytes'] / 2**20:,.1f} MiB"
        contents = f"{summary['tensors']:,} tensors, {summary['outtype']}, {size}"
        yield f"{summary['architecture']}{pooling}: {contents}"
        if summary.get("dry_run"):
            yield "dry run: everything was checked, nothing was written."
            return
        yield from self._describe_check(summary)
        yield f"saved {', '.join(summary['outputs'])}  ({summary['seconds']:.1f} s)"
        if summary["start"]:
            yield "serve it:"
            yield from (f"  {command}" for command in summary["start"])

    @staticmethod
    def _describe_check(summary: Mapping[str, Any]) -> Iterator[str]:
        raise NotImplementedError

    def _summarize(self, file: WrittenFile, check: Any) -> dict[str, Any]:
        return self._summary(file.outtype, file.tensors) | {
            "size_bytes": file.path.stat().st_size,
            "merged": file.merged.facts,
            "verified": check is not None,
            "check": check,
        }


@dataclass(frozen=True)
class GgufExport(GgufFileExport):
    """Planned .gguf export of a model that writes text."""

    prompt_template: PromptTemplate

    auto_class: ClassVar[str] = _CLASS

    @property
    def notes(self) -> list[str]:
        """Notes for the user, as sentences without a period."""
        return [*self.vocab.notes, *stop_notes(self.config.model, self.ref, self.config.server)]

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yields the lines to print before the export."""
        config, architecture = self.config, self.architecture
        yield self._model_choice
        yield Choice(
            "architecture", architecture, f"{self.model_config.model_type} in transformers"
        )
        yield self._outtype_choice
        positions, window = context_limit(self.model_config)
        limit = f"its sliding window; llama.cpp has none for {architecture}" if window else ""
        yield Choice("context", f"{positions:,} tokens", limit)
        yield Choice("tokenizer", self.vocab.model, f"splits text like {self.vocab.pre}")
        yield Choice("template", self.prompt_template.kind, self.prompt_template.reason)
        yield Choice("out", config.out)
        if config.verify:
            yield device

    def write(
        self, output: Path, device: str, listener: Listener, merge: MergeAdapter
    ) -> dict[str, Any]:
        """Save the .gguf file and its Modelfile in `output`, check them, return the summary."""
        config, file = self.config, self._write_file(output, listener, merge)
        check = None
        if config.verify:
            listener.stage("reloading the file and comparing")
            check = check_file(
                file.path,
                file.outtype,
                file.tensors,
                file.vocab,
                Original(
                    file.source, file.model_config, self.tokenizer, device, config.verify_tokens
                ),
                file.merged.beside_run,
            )
        text = modelfile(config.out.name, self.prompt_template)
        save_text(output / config.outputs[1].name, text)
        if config.recorded:
            listener.stage("recording reference outputs")
            # Quantized files are recorded from the file itself; `check_file` measured its distance.
            is_lossy = file.outtype in SELECTED_TYPES
            recorded_model = resolve_source(str(file.path)) if is_lossy else file.source
            record_metadata = {
                "model": config.model,
                "server": config.server,
                "file_format": config.format,
                "dtype": file.outtype,
            }
            record_whole(
                output / config.outputs[2].name,
                config.out,
                record_metadata,
                self.ref,
                recorded_model,
                device,
            )
        return self._summarize(file, check)

    def _metadata(self, model_config: Any, vocab: Vocabulary, outtype: str) -> dict[str, Any]:
        end = get_end_of_turn_id(self.tokenizer)
        own = {} if end is None else {"tokenizer.ggml.eot_token_id": end}
        return super()._metadata(model_config, vocab, outtype) | own

    def _summary(self, outtype: str, tensors: Sequence[GGUFTensor]) -> dict[str, Any]:
        vocab = self.vocab
        return super()._summary(outtype, tensors) | {
            "tokenizer": {
                "model": vocab.model,
                "pre": vocab.pre,
                "tokens": len(vocab.tokens),
                "notes": vocab.notes,
            },
            "template": self.prompt_template.kind,
            "stops": self.prompt_template.stop_strings,
            "start": start_commands(self.config.server, self.config.out),
        }

    @staticmethod
    def _describe_check(summary: Mapping[str, Any]) -> Iterator[str]:
        if summary["merged"] is not None:
            check = (
                "checked as ftlevel merge does" if summary["merged"]["verified"] else "not checked"
            )
            yield f"the adapter was merged onto the {summary['merged']['onto']} weights, {check}"
        if (check := summary["check"]) is None:
            yield "not verified (--no-verify)"
        else:
            yield from _format_check(check, summary)
            if not summary["start"]:
                yield "no answers are recorded for ftlevel check-served (--for llama.cpp or ollama)"


def _check_model(name: str, model_config: Any, *, has_adapter: bool) -> None:
    if (stored := get_quantization_config(model_config)) is not None and not has_adapter:
        raise InputError(
            f"{name} is stored quantized ({quantization_name(stored)}), and GGUF has other types "
            "of quantization. Export the original model, with --outtype q8_0 if it should be small."
        )
    limitations = get_gguf_limitations(model_config)
    if not limitations and checkpoint_class(model_config) != _CLASS:
        architecture = ", ".join(model_config.architectures or ()) or model_config.model_type
        limitations = [f"it is a {architecture}, which does not write text."]
    if limitations:
        raise InputError([f"{name} cannot be written as GGUF: {error}" for error in limitations])


def _format_check(check: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    exact, model = check["beside_rounded"], check["beside_model"]
    yield (
        f"read back: over {exact['targets']:,} tokens, logits differ from the model's in "
        f"{summary['outtype']} by {exact['max_difference']:.2g} at most"
    )
    yield (
        f"compared with the model itself: KL {model['kl']:.2g}, top-1 {model['top1']:.1%}, "
        f"loss {model['loss']:.4f} (the model {model['loss_reference']:.4f})"
    )
    if (run := check["beside_run"]) is not None:
        yield f"compared with the run, on rows not used for calibration: {format_difference(run)}"
    if check["settings_of_the_model"]:
        names = ", ".join(check["settings_of_the_model"])
        yield f"transformers does not read {names} from a .gguf; the model's own was used"
    splitting = (
        ""
        if check["splitting_read"]
        else f" (pre-tokenizer {summary['tokenizer']['pre']}, which transformers does not read)"
    )
    yield f"the same tokens for {check['texts']} texts{splitting}"
