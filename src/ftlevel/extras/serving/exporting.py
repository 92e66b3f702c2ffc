"""`export`: merge, convert and verify a model for a different program."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlevel.artifacts.files import (
    atomic_directory,
    atomic_files,
    check_new_output,
    check_output_file,
)
from ftlevel.artifacts.hub import plan_upload
from ftlevel.artifacts.run_directory import CONFIG
from ftlevel.commands.merge import merge, resolve_rounding, score_trained
from ftlevel.config import MergeConfig
from ftlevel.errors import ConfigError, join_names
from ftlevel.evaluation.two_models import Agreement, EvalSet, compare_logits
from ftlevel.events import Listener, NullListener, Summarized
from ftlevel.extras.serving.config import FORMATS, ExportConfig
from ftlevel.extras.serving.formats import MergeOutput, exporter_of, plan_export
from ftlevel.extras.serving.gguf_file import GRIDS, SELECTED_TYPES, QuantizedMatrix
from ftlevel.merging.low_bits import CodeSelector, InputMoments, Weights, WeightsAsLoaded
from ftlevel.merging.merge_input import (
    MergeInput,
    check_base_precision,
    get_adapter_dir,
    resolve_merge_input,
    select_rows,
)
from ftlevel.merging.merged_model import open_merger
from ftlevel.merging.verify import load_merged
from ftlevel.models.hardware import DTYPES, select_device
from ftlevel.models.loading import silence_loggers
from ftlevel.trained.adapter_set import scan_adapters
from ftlevel.trained.model_ref import ModelRef
from ftlevel.trained.resolve import resolve_model

_ROWS: int = MergeConfig.model_fields["rows"].default
"""Rows on which the exported file is compared, as for a merge."""


@dataclass(frozen=True, repr=False)
class ExportResult(Summarized):
    """Result of an export: `summary` is the output of `--json`; `path` is None after a dry run."""

    summary: dict[str, Any]
    path: Path | None
    lines: tuple[str, ...]


def export(
    config: ExportConfig, *, listener: Listener | None = None, dry_run: bool = False
) -> ExportResult:
    """Convert a model to files for another program, such as llama.cpp.

    Raises:
        ConfigError: a problem that is known before weights are read.
        InputError: the model cannot be converted, or its adapter cannot be merged.
        RunError: the files do not reproduce the model; they are deleted.
    """
    listener = listener or NullListener()
    start_time = time.perf_counter()
    _check_outputs(config)
    upload = plan_upload(config)
    with silence_loggers():
        listener.stage("resolving the model")
        device = select_device(config.device)
        refs = _resolve_adapters(config, device.value)
        if refs:
            ref = next(iter(refs.values()))
        else:
            ref = resolve_model(
                config.model, base=config.base_model, device=device.value, revision=config.revision
            )
            config = exporter_of(config, ref).resolved_config
            _check_outputs(config)
            if ref.directory is not None and FORMATS[config.format].merges:
                get_adapter_dir(config.model)  # raises if it cannot be merged
                check_base_precision(ref)
        is_directory = FORMATS[config.format].is_directory
        for output in _paths_without_adapter(config, refs):
            listener.warn(f"{output} contains no adapter and is skipped.")
        plan = plan_export(config, refs or ref)
        listener.choices("export", list(plan.choices(device)))
        for note in plan.notes:
            listener.warn(note + ".")
        if dry_run:
            summary = plan.dry_run() | {"dry_run": True}
            return ExportResult(summary, None, tuple(plan.describe(summary)))
        open_output = atomic_directory if is_directory else atomic_files
        with open_output(*config.outputs) as output:
            merge_adapter = (
                functools.partial(_merge, config, ref, listener)
                if ref.directory is not None
                else functools.partial(_compare_unmerged, config, ref, device.value)
            )
            summary = plan.write(output, device.value, listener, merge_adapter)
    summary["seconds"] = round(time.perf_counter() - start_time, 2)
    upload.send(config.outputs, summary)
    return ExportResult(summary, config.out, tuple(plan.describe(summary)))


def _check_outputs(config: ExportConfig) -> None:
    if FORMATS[config.format].is_directory:
        check_new_output("--out", config.out)
        return
    for path in config.outputs:
        suffix = path.suffix.removeprefix(".")
        flag = "--out" if path == config.out else f"--out, for its {suffix}:"
        check_output_file(flag, path, overwrite=config.overwrite)


def _resolve_adapters(config: ExportConfig, device: str) -> dict[str, ModelRef]:
    """Returns adapter name → `ModelRef` if `config.model` is a directory of adapters, else {}."""
    path = Path(config.model).expanduser()
    if not path.is_dir() or any(
        (path / name).exists() for name in ("config.json", "adapter_config.json", "adapter", CONFIG)
    ):
        return {}
    directories = scan_adapters(path)
    if directories and not FORMATS[config.format].several:
        several = join_names(name for name, one in FORMATS.items() if one.several)
        raise ConfigError(
            f"{config.model} is a directory of {len(directories)} adapters "
            f"({join_names(directories, 4)}), and "
            f"--format {config.format} exports one. Name one of them, or use {several}."
        )
    return {
        name: resolve_model(str(directory), base=config.base_model, device=device)
        for name, directory in directories.items()
    }


def _paths_without_adapter(config: ExportConfig, refs: Mapping[str, ModelRef]) -> list[Path]:
    if not refs:
        return []
    paths = [p for p in sorted(Path(config.model).expanduser().iterdir()) if p.is_dir()]
    files = (CONFIG, "config.json")
    return [p for p in paths if p.name not in refs and any((p / m).exists() for m in files)]


class _Progress(NullListener):
    """Listener of a merge within an export, which shows only its progress."""

    def __init__(self, listener: Listener) -> None:
        self.stage, self.begin = listener.stage, listener.begin  # type: ignore[method-assign]
        self.step = listener.step  # type: ignore[method-assign]


def _merge(config: ExportConfig, ref: ModelRef, listener: Listener, directory: Path) -> MergeOutput:
    """Merge the adapter, save the model to `directory`; return functions to quantize and check."""
    quantization = ref.quantization.get("kind", "none")
    is_quantized = config.outtype in GRIDS
    onto = (
        "auto" if quantization == "none" or (config.verify and not is_quantized) else "dequantized"
    )
    merge_config = MergeConfig(
        adapters=[config.model],
        output_dir=directory,
        verify=config.verify,
        onto=onto,
        device=config.device,
        base_model=config.base_model,
    )
    summary = merge(merge_config, listener=_Progress(listener)).summary
    if not is_quantized:
        return MergeOutput(summary)
    inputs = resolve_merge_input(merge_config)
    compared, calibration = _probes(config, inputs)
    compare_with_run = None
    if config.verify:
        trained, _ = score_trained(inputs, compared)

        def compare_with_run(model: Any) -> Agreement:
            return compare_logits(trained, compared.score(model, inputs.dtype))

    if calibration is None:
        return MergeOutput(summary, beside_run=compare_with_run)
    weights = open_merger(inputs, *resolve_rounding(merge_config, inputs, summary["onto"]))
    model = load_merged(directory, inputs)
    choose = select_gguf_codes(model, weights, calibration, inputs.dtype, config.outtype)
    return MergeOutput(summary, choose, compare_with_run)


def _compare_unmerged(config: ExportConfig, ref: ModelRef, device: str, _: Path) -> MergeOutput:
    """Returns functions to quantize a model without adapter, and to compare the result with it."""
    if not _needs_calibration(config):
        return MergeOutput({})
    model = ref.load(device)
    inputs = MergeInput(ref, model.dtype, device)
    compared, calibration = _probes(config, inputs)
    if calibration is None:
        return MergeOutput({})
    as_trained = compared.score(model.model, inputs.dtype) if config.verify else None
    choose = select_gguf_codes(
        model.model, WeightsAsLoaded(model.model), calibration, inputs.dtype, config.outtype
    )
    if as_trained is None:
        return MergeOutput({}, choose)
    return MergeOutput(
        {}, choose, lambda read: compare_logits(as_trained, compared.score(read, inputs.dtype))
    )


def _needs_calibration(config: ExportConfig) -> bool:
    return config.outtype in SELECTED_TYPES and config.calibration_rows > 0


def _probes(config: ExportConfig, inputs: MergeInput) -> tuple[EvalSet, EvalSet | None]:
    """Returns rows to compare logits on, and rows to calibrate quantization on, None if unused."""
    needs_calibration = _needs_calibration(config)
    num_rows = config.calibration_rows if needs_calibration else 0
    compared, calibration, _ = select_rows(inputs, _ROWS, num_rows)
    return inputs.eval_set(compared), inputs.eval_set(calibration) if calibration else None


def select_gguf_codes(
    model: Any, weights: Weights, rows: EvalSet, dtype: str, outtype: str
) -> Callable[[str], QuantizedMatrix]:
    """Returns a function: weight name → codes in the .gguf type `outtype`, selected on `rows`.

    `weights` are those as trained; `outtype` is a key of `GRIDS`. Rounding starts from the trained
    weights, because the grid of a quantized run is not that of the file.
    """
    transposed, sizes = {}, {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2:
            transposed[name] = type(module).__name__ == "Conv1D"
            sizes[name] = weight.shape[0 if transposed[name] else 1]
    moments = InputMoments(model, rows, dtype, sizes)
    selector = CodeSelector(
        weights, weights, GRIDS[outtype], transposed, DTYPES[dtype], moments, fits_scales=True
    )

    @functools.cache  # read again for the comparison with the saved file
    def get_codes(name: str) -> QuantizedMatrix:
        codes, scales = selector.select(name.removesuffix(".weight"))
        return QuantizedMatrix(codes.to(torch.uint8), scales.view(len(codes), -1))

    return get_codes
