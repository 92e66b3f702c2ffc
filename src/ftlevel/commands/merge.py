"""`merge`: merge adapters into their base, verify the result, and move it into place."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import (
    AdapterCard,
    create_merge_readme,
    format_difference,
    library_versions,
)
from ftlevel.artifacts.files import atomic_directory, check_new_output
from ftlevel.artifacts.hub import plan_upload
from ftlevel.config import MergeConfig, QuantConfig
from ftlevel.config.section import Choice, check_config
from ftlevel.errors import ConfigError
from ftlevel.evaluation.two_models import Agreement, EvalSet, RowLogits, compare_logits
from ftlevel.events import Listener, NullListener, Summarized
from ftlevel.merging.low_bits import compare_quantized, quantize_merged, resolve_quantization
from ftlevel.merging.merge_input import MergeInput, resolve_merge_input, select_rows
from ftlevel.merging.merged_model import save_merged
from ftlevel.merging.mixture import mix
from ftlevel.merging.verify import Candidate, check, measure
from ftlevel.models.hardware import DTYPES
from ftlevel.models.loading import keep_heads, load_config, silence_loggers
from ftlevel.models.quantization import (
    QuantizationRounding,
    build_quantization_config,
    create_rounding,
)
from ftlevel.safe_io import save_text
from ftlevel.tasks import TASKS


@dataclass(frozen=True)
class _PreparedMerge:
    """Resolved inputs of a merge; `low` is the output's quantization, `probe` rows to compare."""

    config: MergeConfig
    inputs: MergeInput
    base_weights: list[str]
    low: QuantConfig | None
    probe: EvalSet | None
    calibration: EvalSet | None


@dataclass(frozen=True, repr=False)
class MergeResult(Summarized):
    """Result of a merge: `summary` is the output of `--json`, `path` the merged model."""

    summary: dict[str, Any]
    path: Path


def merge(config: MergeConfig, *, listener: Listener | None = None) -> MergeResult:
    """Merge one adapter or a mixture of several into the base, and write a full model.

    Nothing is left at the output path unless every check passes.

    Raises:
        ConfigError: a problem that is known before weights are read.
        RunError: the merge changed nothing, or does not reproduce the trained model.
    """
    check_config(config, MergeConfig)
    listener = listener or NullListener()
    start_time = time.perf_counter()
    check_new_output("--out", config.output_dir)
    upload = plan_upload(config)
    with silence_loggers(), contextlib.ExitStack() as stack:
        listener.stage("resolving the adapter and its base")
        inputs = resolve_merge_input(config)
        if config.dtype == "float32":  # compare with the run in float32
            inputs = replace(inputs, dtype="float32")
        onto = _select_base_weights(config, inputs)
        inputs, choices = mix(config, inputs, stack)
        low = resolve_quantization(config, inputs)
        num_rows = config.rows if config.verify else 0
        num_calibration = config.calibration_rows if low else 0
        probe = calibration = None
        if num_rows or num_calibration:
            compared, calibrated, lines = select_rows(inputs, num_rows, num_calibration)
            probe = inputs.eval_set(compared) if compared else None
            calibration = inputs.eval_set(calibrated) if calibrated else None
            choices += lines
        prepared = _PreparedMerge(config, inputs, onto, low, probe, calibration)
        listener.choices("merge", [*_list_choices(prepared), *choices])
        output = stack.enter_context(atomic_directory(config.output_dir))
        summary = _merge(prepared, output, listener)
    summary["seconds"] = round(time.perf_counter() - start_time, 2)
    upload.send([config.output_dir], summary)
    return MergeResult(summary, config.output_dir)


def _merge(prepared: _PreparedMerge, output: Path, listener: Listener) -> dict[str, Any]:
    config, inputs, probe = prepared.config, prepared.inputs, prepared.probe
    trained = effect = None
    if probe is not None:
        listener.stage("running the trained model")
        trained, effect = score_trained(inputs, probe)
    candidates = []
    for onto in prepared.base_weights:
        listener.stage(f"merging into the {onto} weights")
        candidate = write_onto(config, inputs, onto, output / f".{onto}", listener)
        if probe is not None and trained is not None:
            candidate = measure(candidate, inputs, probe, trained)
        candidates.append(candidate)
    chosen, message = _choose(candidates)
    result = None
    if probe is not None:
        listener.stage("comparing the merged model with the trained one")
        result = check(chosen, inputs, probe)
    if result and effect and result.agreement.mean_difference > effect.mean_difference / 2:
        listener.warn(
            f"training changes the logits by {effect.mean_difference:.2g} on average, and rounding "
            f"to {chosen.written.dtype} changes them by {result.agreement.mean_difference:.2g}: "
            "much of the training effect is lost. Use --dtype float32."
        )
    for candidate in candidates:
        if candidate is not chosen:
            shutil.rmtree(candidate.directory)
    served = None
    if prepared.low is not None:
        listener.stage(f"choosing {prepared.low.form} codes")
        chosen, checksums = quantize_merged(
            chosen, inputs, prepared.low, prepared.calibration, listener
        )
        if probe is not None and trained is not None:
            listener.stage("reloading and measuring")
            served = compare_quantized(chosen, checksums, inputs, probe, trained)
    if served and effect and served.distance > effect.distance / 2:
        unit = "KL" if served.kl is not None else "a mean difference of scores of"
        listener.warn(
            f"training changed the model by {unit} {effect.distance:.2g}, and quantization by "
            f"{served.distance:.2g}: much of the training effect is lost. Serve the adapter "
            f"on its base, or merge without --quant."
        )
    for path in sorted(chosen.directory.iterdir()):
        path.rename(output / path.name)
    chosen.directory.rmdir()
    summary = {
        "adapters": config.adapters,
        "method": inputs.card.method,
        "base": {**inputs.card.base, "name": inputs.source.name},
        "out": str(config.output_dir),
        "onto": chosen.onto,
        "reason": message,
        "written": asdict(chosen.written),
        "verified": result is not None,
        **(asdict(result) if result else {"agreement": None}),
        "effect": effect and asdict(effect),
        "quantization": prepared.low and prepared.low.model_dump(),
        "served": served and asdict(served),
        "candidates": {c.onto: c.trained and asdict(c.trained) for c in candidates},
        "versions": library_versions(),
    }
    _save_cards(output, config, inputs, summary, chosen.written.dtype)
    return summary


def score_trained(inputs: MergeInput, probe: EvalSet) -> tuple[RowLogits, Agreement]:
    """Returns the trained model's logits on `probe`, and their difference from the base model's."""
    model = inputs.ref.load(inputs.device, inputs.dtype)
    trained = probe.score(model.model, inputs.dtype)
    with model.without_adapter():
        return trained, compare_logits(trained, probe.score(model.model, inputs.dtype))


def _select_base_weights(config: MergeConfig, inputs: MergeInput) -> list[str]:
    """Returns which base weights to merge onto: `original`, `dequantized`, or both to compare."""
    if inputs.quant.kind == "none":
        if config.onto == "dequantized":
            raise ConfigError(
                f"--onto dequantized: {config.adapters[0]} was trained on weights in floating "
                "point, not quantized ones. Drop --onto."
            )
        return ["original"]
    if config.onto != "auto":
        return [config.onto]
    if config.quant != "none":  # closest to the trained model before rounding
        return ["dequantized"]
    if not config.verify:
        raise ConfigError(
            "--onto auto measures both options on a quantized run, and --no-verify skips "
            "measuring. Use --onto dequantized (the model as trained) or --onto original."
        )
    return ["dequantized", "original"]


def write_onto(
    config: MergeConfig, inputs: MergeInput, onto: str, path: Path, listener: Listener
) -> Candidate:
    """Merge the adapter into `onto` ("original" or "dequantized") base weights; save to `path`."""
    path.mkdir()
    dtype, rounding = resolve_rounding(config, inputs, onto)
    return Candidate(onto, path, *save_merged(path, inputs, dtype, rounding, listener))


def resolve_rounding(
    config: MergeConfig, inputs: MergeInput, onto: str
) -> tuple[str | None, Callable[[Any], QuantizationRounding] | None]:
    """Returns the arguments `dtype` and `rounding` of `save_merged` for the base weights `onto`."""
    dtype: str | None = None if config.dtype == "auto" else config.dtype
    if inputs.source.kind == "gguf":  # GGUF weights have no torch dtype
        dtype = dtype or inputs.dtype
    if onto == "original":
        return dtype, None
    compute = DTYPES[inputs.dtype]
    quantization = build_quantization_config(inputs.quant, compute, inputs.card.heads)
    ref = inputs.ref
    config_without_heads = keep_heads(quantization, ref.model_config, ref.auto_class, ref.source)
    return dtype or inputs.dtype, lambda model: create_rounding(
        model, config_without_heads, compute
    )


def _choose(candidates: list[Candidate]) -> tuple[Candidate, str]:
    """Returns the merged model closest to the trained model, and the reason for the choice."""
    if len(candidates) == 1:
        return candidates[0], ""
    by_distance = sorted(candidates, key=lambda c: c.trained.distance if c.trained else 0.0)
    first, second = by_distance[0], by_distance[1]
    one, other = first.trained, second.trained
    if one is None or other is None:
        raise ValueError("candidates are chosen by what was measured of them")
    message = (
        f"closer to the trained model: {format_difference(asdict(one))}, against "
        f"{format_difference(asdict(other))} {second.onto}; loss {one.loss:.4f} (trained model "
        f"{one.loss_reference:.4f}), against {other.loss:.4f}"
    )
    return first, message


def _list_choices(prepared: _PreparedMerge) -> Iterator[Choice]:
    config, inputs, onto = prepared.config, prepared.inputs, prepared.base_weights
    is_mixture = config.weights or len(config.adapters) > 1
    name = ", ".join(config.adapters) if is_mixture else str(inputs.ref.directory)
    yield Choice("adapter", name, f"{inputs.card.method}, {inputs.ref.task}")
    fingerprint = inputs.card.base.get("fingerprint")
    fingerprint_note = "same weights as in training" if fingerprint else "no fingerprint to compare"
    yield Choice("base", inputs.source.name, fingerprint_note)
    if inputs.quant.kind != "none":
        message = "auto: both are measured" if len(onto) > 1 else f"--onto {config.onto}"
        yield Choice("onto", " and ".join(onto), message)
    if prepared.low is not None:
        rows = prepared.calibration
        by = f"by layer outputs on {len(rows.rows)} rows" if rows else "by rounding"
        yield Choice("written in", prepared.low.form, f"codes chosen {by}")
    if inputs.ignores_token_types and "token_type_ids" in inputs.tokenizer.model_input_names:
        yield Choice(
            "token types",
            "left out",
            "PEFT's class for question answering ignores them; the merged tokenizer returns none",
        )
    yield Choice("out", config.output_dir)


def _save_cards(
    path: Path, config: MergeConfig, inputs: MergeInput, summary: dict[str, Any], dtype: str
) -> None:
    values = {key: summary[key] for key in ("adapters", "onto", "reason", "verified", "agreement")}
    if config.weights or len(config.adapters) > 1:
        values |= {"weights": config.weights, "strategy": config.strategy}
    if summary["served"]:
        values["served"] = summary["served"]
    card: AdapterCard = replace(
        inputs.card,
        method="full",
        quantization=summary["quantization"] or {"kind": "none"},
        dtype=dtype if config.dtype != "auto" else inputs.card.dtype,
        needs_import="",
        versions=library_versions(),
        merge=values,
        base={key: value for key, value in inputs.card.base.items() if key != "path"},
    )
    card.write(path)
    TASKS[card.task].write_files(path, load_config(inputs.source), card.options)
    text = create_merge_readme(summary, inputs.card.task)
    save_text(path / "README.md", text)
