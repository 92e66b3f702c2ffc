"""`quantize`: write a quantized model tensor by tensor, and measure its fidelity."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from ftlevel.artifacts.cards import create_quantized_readme, library_versions
from ftlevel.artifacts.files import (
    Workspace,
    atomic_directory,
    base_fingerprint,
    check_new_output,
    read_json,
    write_json,
)
from ftlevel.artifacts.hub import plan_upload
from ftlevel.config import QuantizeConfig
from ftlevel.config.section import Choice, check_config
from ftlevel.errors import ConfigError, InputError, RunError
from ftlevel.evaluation.two_models import (
    PREDICTS,
    WINDOW,
    Text,
    compare_text,
    compute_window_outputs,
    load_eval_text,
    split_into_windows,
)
from ftlevel.events import Listener, NullListener, Summarized
from ftlevel.models.hardware import DTYPES, select_device
from ftlevel.models.kinds import checkpoint_class, max_positions
from ftlevel.models.loading import build_task_model, load_config, load_model, silence_loggers
from ftlevel.models.quantization import (
    build_quantization_config,
    get_quantization_config,
    get_quantization_info,
    quantization_name,
)
from ftlevel.models.sources import resolve_source, snapshot
from ftlevel.models.upstream.architectures import packable_experts
from ftlevel.safe_io import save_text
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import resolve_model
from ftlevel.weights.checkpoint import merge_sharded_checkpoint
from ftlevel.weights.quantize_shards import (
    COPIED,
    QUANTIZED,
    QuantizedLayout,
    build_layout,
    count_tensors,
    get_skipped_modules,
    packed_bytes,
    predict_bytes,
    save_quantized,
)

SUMMARY = "quantization.json"


@dataclass(frozen=True, repr=False)
class QuantizeResult(Summarized):
    """Result of `quantize`; after a dry run, `summary` has expected sizes and `path` is None."""

    summary: Mapping[str, Any]
    path: Path | None


@dataclass(frozen=True)
class _Plan:
    ref: ModelRef
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
    check_config(config, QuantizeConfig)
    listener = listener or NullListener()
    check_new_output("--out", config.out)
    upload = plan_upload(config)
    with silence_loggers():
        plan = _resolve(config)
        listener.choices("quantize", plan.choices)
        if note := _experts_note(config, plan):
            listener.warn(note)
        if dry_run:
            num_bytes, count = predict_bytes(plan.layout), len(plan.layout.linears)
            summary = _summary(config, plan, num_bytes, count)
            return QuantizeResult(summary | {"dry_run": True}, None)
        with atomic_directory(config.out) as partial:
            with _source_files(plan) as directory:
                listener.stage("quantizing")
                listener.begin(count_tensors(directory))
                layout, written = save_quantized(directory, partial, plan.layout, listener.step)
                summary = _summary(config, plan, written.parts, written.quantized)
                summary["bytes_on_disk"] = written.bytes
                summary["kept_modules"] = get_skipped_modules(layout.config)
                summary["source"]["fingerprint"] = base_fingerprint(directory)
                if plan.ref.source.kind == "hub":
                    summary["source"]["revision"] = directory.name  # the snapshot's commit
                if plan.text is not None:
                    listener.stage("reloading and measuring")
                    summary["fidelity"] = _measure(config, plan, directory, partial, plan.text)
            write_json(partial / SUMMARY, summary)
            _save_cards(partial, config, plan.ref, summary)
    upload.send([config.out], summary)
    return QuantizeResult(summary, config.out)


def _resolve(config: QuantizeConfig) -> _Plan:
    device = select_device(config.device)
    ref = resolve_model(
        config.model, device=device.value, revision=config.revision, require_task=False
    )
    if ref.directory is not None:
        raise InputError(
            f"{config.model} is an adapter, and only whole models are quantized. Use ftlevel merge "
            f"{quote(config.model)} --quant {config.quant} --out DIR."
        )
    model_config = load_config(ref.source)
    if (existing := get_quantization_config(model_config)) is not None:
        raise ConfigError(
            f"{config.model} is already quantized ({quantization_name(existing)}). Quantizing it "
            f"again would add a second error. Use the original model."
        )
    auto_class = checkpoint_class(model_config)
    dtype, reason = _unquantized_dtype(config, model_config)
    quantization = build_quantization_config(config.section, dtype, [])
    layout = build_layout(model_config, auto_class, quantization, dtype)
    if not layout.linears:
        raise ConfigError(
            f"{config.model} ({model_config.model_type}) has no linear layer that bitsandbytes can "
            f"quantize."
        )
    tokenizer = ref.load_tokenizer() if config.measure else None
    text = load_eval_text(config.eval_text, config.eval_tokens) if config.measure else None
    choices = [
        Choice("model", ref.base, f"{model_config.model_type}, as {auto_class}"),
        Choice("form", config.form, f"{len(layout.linears):,} linear layers"),
        Choice("kept in", str(dtype).removeprefix("torch."), reason),
        Choice("kept", "embeddings, norms, heads", _describe_unquantized(layout)),
    ]
    if text is not None:
        choices.append(Choice("measured on", text.name, f"{config.eval_tokens:,} tokens at most"))
        choices.append(device)
    return _Plan(ref, model_config, auto_class, layout, tokenizer, text, device.value, choices)


def _unquantized_dtype(config: QuantizeConfig, model_config: Any) -> tuple[torch.dtype, str]:
    """Returns the dtype of computation and of the weights not quantized, and the reason."""
    if config.dtype != "auto":
        return DTYPES[config.dtype], ""
    existing = getattr(model_config, "dtype", None)
    if existing is None:
        return torch.float32, "auto: config.json names none"
    dtype = getattr(torch, existing) if isinstance(existing, str) else existing
    return dtype, "auto: the model's own"


def _describe_unquantized(layout: QuantizedLayout) -> str:
    parameters, names = layout.parameters.values(), []
    if experts := {p.name for p in parameters if p.part == "experts"}:
        names.append(f"and {len(experts):,} tensors of experts")
    if linears := {p.name.split(".")[-2] for p in parameters if p.part == "other linears"}:
        names.append(f"and {', '.join(sorted(linears))}: required by the architecture")
    return "; ".join(names)


def _experts_note(config: QuantizeConfig, plan: _Plan) -> str:
    """Returns a note on the size of MoE experts, which stay unquantized; empty without experts."""
    sizes = predict_bytes(plan.layout)
    if "experts" not in sizes:
        return ""
    total, stay = sum(after for _, after in sizes.values()), sizes["experts"][1]
    dtype = str(plan.layout.dtype).removeprefix("torch.")
    message = (
        f"{stay / 1e6:,.1f} MB of the {total / 1e6:,.1f} MB are experts, which stay in {dtype}: "
        "transformers packs only linear layers, and reads no packed experts."
    )
    if config.quant != "4bit":
        return message
    num_bytes = sum(
        packed_bytes(plan.layout.parameters[name].shape, plan.layout.config)
        for name in packable_experts(build_task_model(plan.model_config, plan.auto_class))
    )
    if num_bytes:
        message += (
            f" ftlevel train --quant 4bit --model {config.model} packs them while it loads them "
            f"({num_bytes / 1e6:,.1f} MB)."
        )
    return message


@contextlib.contextmanager
def _source_files(plan: _Plan) -> Iterator[Path]:
    """Yields a directory with the model as .safetensors, converted there if it is a .gguf file."""
    source = plan.ref.source
    if source.kind != "gguf":
        yield merge_sharded_checkpoint(snapshot(source, COPIED))
        return
    with Workspace("gguf") as temporary:
        model, _ = load_model(
            source, plan.model_config, plan.auto_class, dtype=plan.layout.dtype, device="cpu"
        )
        model.save_pretrained(temporary, max_shard_size="2GB")
        plan.ref.load_tokenizer().save_pretrained(temporary)
        del model
        yield Path(temporary)


def _save_cards(
    directory: Path, config: QuantizeConfig, ref: ModelRef, summary: Mapping[str, Any]
) -> None:
    readme = create_quantized_readme(config.out.name, summary, ref.task if ref.is_ours else None)
    save_text(directory / "README.md", readme)
    if not ref.is_ours:
        return
    existing = read_json(directory / "config.json")
    values = {key: summary[key] for key in ("source", "fidelity", "ratio") if key in summary}
    ref.with_card(
        quantization=get_quantization_info(existing["quantization_config"]),
        dtype=ref.card.dtype if config.dtype == "auto" else config.dtype,
        versions=library_versions(),
        quantized=values | {"form": config.form},
    ).card.write(directory)


def _measure(
    config: QuantizeConfig, plan: _Plan, directory: Path, out: Path, text: Text
) -> dict[str, Any]:
    auto_class = plan.auto_class if plan.auto_class in PREDICTS else "AutoModel"
    dtype = plan.layout.dtype
    if dtype == torch.float16 and plan.device == "cpu":
        dtype = torch.float32
    models = []
    for path in (directory, out):
        source = resolve_source(str(path))
        model, _ = load_model(
            source, load_config(source), auto_class, dtype=dtype, device=plan.device
        )
        models.append(model.eval())
    length = min(WINDOW, max_positions(plan.model_config) or WINDOW)
    windows = split_into_windows(plan.tokenizer, text.content, config.eval_tokens, length)
    if not windows:
        raise InputError(f"--eval-text {text.name} has less than two tokens. Name a longer text.")
    start_time = time.perf_counter()
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
        "seconds": round(time.perf_counter() - start_time, 1),
    }


def _summary(
    config: QuantizeConfig, plan: _Plan, num_bytes: Mapping[str, Sequence[int]], quantized: int
) -> dict[str, Any]:
    before = sum(pair[0] for pair in num_bytes.values())
    after = sum(pair[1] for pair in num_bytes.values())
    return {
        "source": {
            "name": plan.ref.base,
            "kind": plan.ref.source.kind,
            "revision": plan.ref.source.revision,
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
            name: {"bytes_before": pair[0], "bytes": pair[1]} for name, pair in num_bytes.items()
        },
        "bytes_before": before,
        "bytes": after,
        "ratio": before / after,
        "quantized_ratio": num_bytes[QUANTIZED][0] / num_bytes[QUANTIZED][1],
        "versions": library_versions(),
    }
