"""`quantize`: write a quantized model tensor by tensor, and measure its fidelity."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.cards import (
    CARD,
    AdapterCard,
    library_versions,
    read_card,
    write_quantized_readme,
)
from ftlevel.artifacts.files import atomic_directory, base_fingerprint, check_absent, write_json
from ftlevel.artifacts.hub import plan_upload
from ftlevel.config import QuantizeConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError, RunError
from ftlevel.evaluation.two_models import (
    PREDICTS,
    WINDOW,
    Text,
    compare_text,
    compute_window_outputs,
    cut_windows,
    read_eval_text,
)
from ftlevel.events import Listener, NullListener
from ftlevel.models.hardware import DTYPES, choose_device
from ftlevel.models.kinds import checkpoint_class, max_positions
from ftlevel.models.loading import (
    build_task_model,
    load_config,
    load_model,
    load_tokenizer,
    silence_loggers,
)
from ftlevel.models.quantization import (
    build_quantization_config,
    build_torchao_config,
    quantization_facts,
    quantization_name,
    stored_quantization,
)
from ftlevel.models.sources import ModelSource, check_revision, resolve_source, snapshot
from ftlevel.models.upstream.architectures import packable_experts
from ftlevel.weights.checkpoint import merge_sharded_checkpoint
from ftlevel.weights.quantize_shards import (
    COPIED,
    QUANTIZED,
    QuantizedLayout,
    build_layout,
    get_skipped_modules,
    packed_bytes,
    predict_bytes,
    write_quantized,
)
from ftlevel.workspace import Workspace

SUMMARY = "quantization.json"


@dataclass(frozen=True)
class QuantizeResult:
    """Result; after a dry run `summary` has expected sizes and `path` is None."""

    summary: Mapping[str, Any]
    path: Path | None


@dataclass(frozen=True)
class _Plan:
    source: ModelSource
    card: AdapterCard | None
    model_config: Any
    auto_class: str
    layout: QuantizedLayout
    tokenizer: Any
    text: Text | None
    device: str
    choices: list[Choice]


def quantize(
    config: QuantizeConfig, *, listener: Listener | None = None, dry_run: bool = False
) -> QuantizeResult:
    """Quantize the model of `config`, and measure the difference from the original.

    One tensor is in memory at a time, so the model may exceed the memory; the comparison
    memory-maps the original.

    Raises:
        ConfigError: the model is already quantized, or `out` exists; before any weight is read.
        InputError: the model or the text cannot be read.
        RunError: the quantized model outputs values that are not finite; it is deleted.
    """
    listener = listener or NullListener()
    check_absent("--out", config.out)
    upload = plan_upload(config)
    with silence_loggers():
        plan = _resolve(config)
        listener.choices("quantize", plan.choices)
        if note := _experts_note(config, plan):
            listener.warn(note)
        if dry_run:
            parts = {name: list(sizes) for name, sizes in predict_bytes(plan.layout).items()}
            summary = _summary(config, plan, parts, len(plan.layout.linears)) | {"dry_run": True}
            return QuantizeResult(summary, None)
        with atomic_directory(config.out) as partial:
            with _source_files(plan) as directory:
                listener.stage("quantizing")
                listener.begin(0)
                layout, written = write_quantized(directory, partial, plan.layout, listener.step)
                parts = {name: list(sizes) for name, sizes in written.parts.items()}
                summary = _summary(config, plan, parts, written.quantized)
                summary["bytes_on_disk"] = written.bytes
                summary["kept_modules"] = get_skipped_modules(layout.config)
                summary["source"]["fingerprint"] = base_fingerprint(directory)
                if plan.source.kind == "hub":
                    summary["source"]["revision"] = directory.name  # the snapshot's commit
                if plan.text is not None:
                    listener.stage("reloading and measuring")
                    summary["fidelity"] = _measure(config, plan, directory, partial, plan.text)
            write_json(partial / SUMMARY, summary)
            _write_cards(partial, config, plan, summary)
    upload.send([config.out], summary)
    return QuantizeResult(summary, config.out)


def _resolve(config: QuantizeConfig) -> _Plan:
    source = resolve_source(config.model, config.revision, said=config.model)
    check_revision(source, config.revision)
    known = source.kind == "directory" and (Path(source.location) / CARD).is_file()
    card = read_card(Path(source.location)) if known else None
    model_config = load_config(source)
    if (stored := stored_quantization(model_config)) is not None:
        raise ConfigError(
            f"{config.model} is already quantized ({quantization_name(stored)}). Quantizing it "
            f"again would add a second error. Use the original model."
        )
    auto_class = checkpoint_class(model_config)
    dtype, why = _kept_dtype(config, model_config)
    section = config.section
    wish = (
        build_torchao_config(config.quant)
        if section is None
        else build_quantization_config(section, dtype, [])
    )
    layout = build_layout(model_config, auto_class, wish, dtype)
    if not layout.linears:
        library = "bitsandbytes" if section is not None else "torchao"
        raise ConfigError(
            f"{config.model} ({model_config.model_type}) has no linear layer that {library} can "
            f"quantize."
        )
    tokenizer = load_tokenizer(source) if config.measure else None
    text = read_eval_text(config.eval_text, config.eval_tokens) if config.measure else None
    device = choose_device(config.device)
    names = {p.name for p in layout.parameters.values() if p.part == "experts"}
    choices = [
        Choice("model", source.name, f"{model_config.model_type}, as {auto_class}"),
        Choice("form", config.form, f"{len(layout.linears):,} linears"),
        Choice("kept in", str(dtype).removeprefix("torch."), why),
        Choice("kept", "embeddings, norms, heads", _kept_reason(layout, len(names))),
    ]
    if text is not None:
        choices.append(Choice("measured on", text.name, f"{config.eval_tokens:,} tokens at most"))
        choices.append(device)
    return _Plan(
        source, card, model_config, auto_class, layout, tokenizer, text, device.value, choices
    )


def _kept_dtype(config: QuantizeConfig, model_config: Any) -> tuple[torch.dtype, str]:
    """Return the dtype of unquantized weights and of computation, and the reason."""
    if config.dtype != "auto":
        return DTYPES[config.dtype], ""
    own = getattr(model_config, "dtype", None)
    if own is None:
        return torch.float32, "auto: config.json names none"
    return getattr(torch, own) if isinstance(own, str) else own, "auto: the model's own"


def _kept_reason(layout: QuantizedLayout, experts: int) -> str:
    reasons = []
    if experts:
        reasons.append(f"and {experts:,} tensors of experts")
    own = sorted(
        {p.name.split(".")[-2] for p in layout.parameters.values() if p.part == "other linears"}
    )
    if own:
        reasons.append(f"and {', '.join(own)}: the architecture asks for it")
    return "; ".join(reasons)


def _experts_note(config: QuantizeConfig, plan: _Plan) -> str:
    """Return a note on the size of experts, which transformers cannot quantize."""
    sizes = predict_bytes(plan.layout)
    if "experts" not in sizes:
        return ""
    whole, stay = sum(after for _, after in sizes.values()), sizes["experts"][1]
    dtype = str(plan.layout.dtype).removeprefix("torch.")
    note = (
        f"{stay / 1e6:,.1f} MB of the {whole / 1e6:,.1f} MB are experts, which stay in {dtype}: "
        "transformers packs linears alone, and reads no packed experts."
    )
    if config.quant != "4bit":
        return note
    packed = sum(
        packed_bytes(plan.layout.parameters[name].shape, plan.layout.config)
        for name in packable_experts(build_task_model(plan.model_config, plan.auto_class))
    )
    if packed:
        note += (
            f" ftlevel train --quant 4bit --model {config.model} packs them while it loads them "
            f"({packed / 1e6:,.1f} MB)."
        )
    return note


@contextlib.contextmanager
def _source_files(plan: _Plan) -> Iterator[Path]:
    """Yield the directory with .safetensors files; a .gguf is converted temporarily."""
    if plan.source.kind != "gguf":
        yield merge_sharded_checkpoint(
            snapshot(plan.source, COPIED)
        )  # also of a sharded checkpoint
        return
    with Workspace("gguf") as temporary:
        model, _ = load_model(
            plan.source, plan.model_config, plan.auto_class, dtype=plan.layout.dtype, device="cpu"
        )
        model.save_pretrained(temporary, max_shard_size="2GB")
        load_tokenizer(plan.source).save_pretrained(temporary)
        del model
        yield Path(temporary)


def _write_cards(
    place: Path, config: QuantizeConfig, plan: _Plan, summary: Mapping[str, Any]
) -> None:
    """Write README.md, and ftlevel.json if the source has one."""
    task = plan.card.task if plan.card else None
    readme = write_quantized_readme(config.out.name, summary, task)
    (place / "README.md").write_text(readme, encoding="utf-8")
    if plan.card is None:
        return
    stored = json.loads((place / "config.json").read_text(encoding="utf-8"))
    dtype = plan.card.dtype if config.dtype == "auto" else config.dtype
    facts = {key: summary[key] for key in ("source", "fidelity", "ratio") if key in summary}
    replace(
        plan.card,
        quantization=quantization_facts(stored["quantization_config"]),
        dtype=dtype,
        versions=library_versions(),
        quantized=facts | {"form": config.form},
    ).write(place)


def _measure(
    config: QuantizeConfig, plan: _Plan, directory: Path, out: Path, text: Text
) -> dict[str, Any]:
    """Compare the predictions of the model in `out` with the original's."""
    auto_class = plan.auto_class if plan.auto_class in PREDICTS else "AutoModel"
    dtype = plan.layout.dtype
    if dtype == torch.float16 and plan.device == "cpu":
        dtype = torch.float32
    models = []
    for place in (directory, out):
        source = ModelSource(str(place), "directory", str(place), local_files_only=True)
        model, _ = load_model(
            source, load_config(source), auto_class, dtype=dtype, device=plan.device
        )
        models.append(model.eval())
    length = min(WINDOW, max_positions(plan.model_config) or WINDOW)
    windows = cut_windows(plan.tokenizer, text.content, config.eval_tokens, length)
    if not windows:
        raise InputError(f"--eval-text {text.name} has less than two tokens. Name a longer text.")
    began = time.perf_counter()
    first, second = (compute_window_outputs(m, windows, auto_class, plan.tokenizer) for m in models)
    scores = compare_text(first, second, auto_class)
    if not math.isfinite(scores.get("kl", scores.get("cosine", math.nan))):
        raise RunError(
            "the quantized model produces values that are not finite and was not saved. Try "
            "--dtype float32, or --quant 8bit."
        )
    return {
        "text": text.name,
        "computed_in": str(dtype).removeprefix("torch."),
        **scores,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _summary(
    config: QuantizeConfig, plan: _Plan, parts: dict[str, list[int]], quantized: int
) -> dict[str, Any]:
    before = sum(sizes[0] for sizes in parts.values())
    after = sum(sizes[1] for sizes in parts.values())
    return {
        "source": {
            "name": plan.source.name,
            "kind": plan.source.kind,
            "revision": plan.source.revision,
            "type": plan.model_config.model_type,
        },
        "quantization": {
            "form": config.form,
            "quant": config.quant,
            **(
                {"quant_type": config.quant_type, "double_quant": config.double_quant}
                if config.quant == "4bit"
                else {}
            ),
        },
        "dtype": str(plan.layout.dtype).removeprefix("torch."),
        "quantized_linears": quantized,
        "parts": {
            name: {"bytes_before": sizes[0], "bytes": sizes[1]} for name, sizes in parts.items()
        },
        "bytes_before": before,
        "bytes": after,
        "ratio": before / after,
        "quantized_ratio": parts[QUANTIZED][0] / parts[QUANTIZED][1],
        "versions": library_versions(),
    }
