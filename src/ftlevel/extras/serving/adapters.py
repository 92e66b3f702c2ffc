"""Export adapters as plain LoRA ("normal form"), read the files back, and compare logits.

`probe_normal_form` converts any linear method: the adapted layer must compute x (W + Δ)ᵀ + b. In
float64 its inputs are zeros, the identity and random rows; the base layer's output is subtracted.
The identity gives Δ. If the other outputs agree with Δ, it is factored by SVD.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ftlevel.artifacts.cards import library_versions
from ftlevel.artifacts.files import Workspace
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError, RunError, join_names
from ftlevel.events import Listener
from ftlevel.extras.serving import recorded as answers
from ftlevel.extras.serving.config import SERVERS, ExportConfig, Server
from ftlevel.extras.serving.entry import (
    Prompt,
    ServedAdapter,
    ServedModel,
    adapter_name,
    build_adapter_commands,
    check_command,
    check_lora,
    check_separators,
    check_server_support,
    create_served_model,
    merged_format,
    save_readme,
)
from ftlevel.extras.serving.formats import stop_notes
from ftlevel.extras.serving.recorded import (
    BOUND,
    FILE,
    AdapterRecord,
    PromptOutputs,
    record,
    run_prompts,
    save_record,
)
from ftlevel.merging.normal_form import (
    NormalForm,
    build_normal_form,
    compute_normal_form,
    get_plain_form,
    is_whole,
    load_adapter_file,
    save_normal_form,
)
from ftlevel.methods.lora_conversion import Factors
from ftlevel.methods.merging import BY_PEFT_TYPE, get_merge_error
from ftlevel.models.loading import load_model
from ftlevel.safe_io import save_text
from ftlevel.trained.model_ref import ModelRef
from ftlevel.weights.checkpoint import Checkpoint

_NUM_SAMPLES = 8
_LAYER_EXCEPTIONS = (RuntimeError, AttributeError, TypeError, ValueError, LookupError)
"""Exceptions of layers that cannot be called on a matrix of inputs alone."""
_AT_ZERO, _LINEAR = 1e-9, 1e-5
_NOISE, _SMALLEST = 2e-7, 1e-6
"""Singular values below this share of the weight's norm, or of the largest one, are rounding."""


def probe_normal_form(
    peft_model: Any, path: Any, config: Any, base: Checkpoint, limit: int
) -> NormalForm:
    """Returns the adapter of `peft_model` (float32, eval mode), converted to plain LoRA.

    Raises InputError if an adapted layer is not linear, or needs a rank above `limit`.
    """
    file = load_adapter_file(path, config, base)
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if is_whole(name, config)}
    factors = {
        name: _factor(delta, name, limit, norm)
        for name, layer in _layers(peft_model)
        for delta, norm in [_compute_delta(layer, name, base)]
    }
    file.notes.append("the update of its layers, factored")
    return build_normal_form(factors, file, limit, "the probe")


def _layers(peft_model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, Any]] = []
    for name, module in peft_model.get_base_model().named_modules():
        is_nested = layers and name.startswith(layers[-1][0] + ".")
        if isinstance(module, BaseTunerLayer) and not is_nested:
            layers.append((name, module))
    return layers


def _compute_delta(layer: Any, name: str, base: Checkpoint) -> tuple[torch.Tensor, float]:
    """Returns the change `(out, in)` of weight `name` by PEFT's `layer`, and the weight's norm."""
    base_layer = layer.get_base_layer()
    if not isinstance(base_layer, torch.nn.Linear) and type(base_layer).__name__ != "Conv1D":
        raise InputError(f"{name} is a {type(base_layer).__name__}, not a linear layer. Merge it")
    weight = base.read(f"{name}.weight").double()
    weight = weight if isinstance(base_layer, torch.nn.Linear) else weight.T
    has_bias = getattr(base_layer, "bias", None) is not None
    bias = base.read(f"{name}.bias").double() if has_bias else 0.0
    layer64 = copy.deepcopy(layer).double()
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(_NUM_SAMPLES, weight.shape[1], generator=generator, dtype=torch.float64)
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    try:
        with torch.no_grad():
            zero, delta, outputs = (
                layer64(rows) - (rows @ weight.T + bias)
                for rows in (samples[:1] * 0, identity, samples)
            )
    except _LAYER_EXCEPTIONS as error:  # float32 tensors, or needs sequences
        raise InputError(
            f"{name} cannot be evaluated alone ({' '.join(str(error).split())[:80]}). Merge it"
        ) from None
    deviation = (outputs - samples @ delta).norm()
    if zero.abs().max() > _AT_ZERO or deviation > _LINEAR * max(float(outputs.norm()), 1e-12):
        raise InputError(
            f"{name} changes its bias, or does more than multiply its input by a matrix, which no "
            "plain LoRA does"
        )
    return delta.T, float(weight.norm())


def _factor(delta: torch.Tensor, name: str, limit: int, norm: float) -> Factors:
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = int((values > max(_NOISE * norm, float(values[0]) * _SMALLEST)).sum())
    if rank > limit:
        raise InputError(
            f"the update of {name} has rank {rank:,} of {min(delta.shape):,}, above --max-rank "
            f"{limit}. Merge it"
        )
    rank = max(rank, 1)
    return Factors(right[:rank].clone(), left[:, :rank] * values[:rank])


_MERGE = "Merge it"
TEMPLATE = "chat_template.jinja"


class Writer(Protocol):
    """Protocol of file formats of plain LoRA; servers load `file`, or if empty, the directory."""

    file: str = ""

    def check(self, _adapter: ServedModel) -> None:
        """Raise InputError if the format cannot represent the adapter; loads no base weights."""
        return

    def write(self, output: Path, lora: NormalForm, adapter: ServedModel) -> None:
        """Write `lora`, the plain LoRA of `adapter`, into the directory `output`."""

    def read(self, output: Path, lora: NormalForm, _entry: ServedModel) -> NormalForm:
        """Load what `write` wrote; settings that the files do not have are those of `lora`."""


def plan_adapters(
    writer: Writer,
    config: ExportConfig,
    ref: ModelRef | Mapping[str, ModelRef],
    server: str | None = None,
) -> AdaptersExport:
    """Plan the export of one adapter, or of several by name; `server` overrides `config`'s.

    Raises InputError if an adapter cannot become plain LoRA or be served as trained, or if the
    adapters do not share a base.
    """
    config = config.model_copy(update={"server": server}) if server else config
    target = SERVERS.get(config.server or "")
    refs = ref if isinstance(ref, Mapping) else {adapter_name(ref): ref}
    adapters = [create_served_model(name, one, target) for name, one in refs.items()]
    if target is not None:
        check_separators(target, [adapter.name for adapter in adapters], config.out)
    notes: list[str] = []
    loras: dict[str, NormalForm | None] = {}
    for adapter in adapters:
        try:
            get_plain_form(adapter.peft_config)
            notes += check_server_support(adapter, target)
            notes += stop_notes(adapter.name, adapter.ref, config.server)
            writer.check(adapter)
            lora = compute_normal_form(
                adapter.ref.adapter_path, adapter.peft_config, adapter.base, config.max_rank
            )
            lora = lora and check_lora(lora, adapter, target)
        except InputError as error:
            raise InputError(_format_error(adapter, target, config.format, str(error))) from None
        loras[adapter.name] = lora
    _validate_set(adapters, target)
    return AdaptersExport(config, target, adapters, loras, list(dict.fromkeys(notes)), writer)


def _format_error(adapter: ServedModel, server: Server | None, format_: str, message: str) -> str:
    purpose = f"for {server.title}" if server else f"as {format_}"
    message = f"{adapter.name} cannot be written {purpose}: {message.rstrip('.')}"
    if message.endswith(_MERGE):
        message = message.removesuffix(_MERGE)
        if get_merge_error(adapter.peft_config) is None:
            message += f"Merge it: --format {merged_format(server)}"
        elif str(adapter.peft_config.get("peft_type")) in BY_PEFT_TYPE:
            message += "It cannot be merged either: keep it with PEFT or ftlevel"
        else:
            message += "Merge it by merge_and_unload of PEFT, and serve the model"
    return message + "."


def _validate_set(adapters: Sequence[ServedModel], server: Server | None) -> None:
    """Raise ConfigError or InputError if one server cannot serve all `adapters`."""
    if len(adapters) > 1 and server is not None and not server.several:
        raise ConfigError(
            f"--for {server.name} serves one adapter, and {len(adapters)} are given: "
            f"{join_names(adapter.name for adapter in adapters)}. Choose one."
        )
    first = adapters[0]
    for adapter in adapters[1:]:
        cards = (first.ref.card.base, adapter.ref.card.base)
        fingerprints = [card.get("fingerprint") for card in cards]
        if adapter.base_name != first.base_name or (
            all(fingerprints) and fingerprints[0] != fingerprints[1]
        ):
            raise InputError(
                f"{first.name} and {adapter.name} have different bases ({first.base_name} and "
                f"{adapter.base_name}), and a server loads one. Export them separately."
            )
    templates = {adapter.custom_chat_template for adapter in adapters}
    if server is not None and len(templates) > 1:
        raise InputError(
            f"{join_names(adapter.name for adapter in adapters)} were trained with different chat "
            "templates, and a server has one for all. Export them one by one."
        )


@dataclass(frozen=True)
class AdaptersExport:
    """Planned export of adapters, before weights of the base are loaded.

    `loras` has plain LoRA by adapter name, or None if it must be computed from the loaded layers.
    `server` is None if only a format was requested.
    """

    config: ExportConfig
    server: Server | None
    adapters: list[ServedModel]
    loras: dict[str, NormalForm | None]
    notes: list[str]
    writer: Writer

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yields the settings to print before the export."""
        for adapter in self.adapters:
            lora = self.loras[adapter.name]
            message = "known when its layers are computed" if lora is None else f"rank {lora.rank}"
            yield Choice(adapter.name, adapter.ref.card.method, message)
        yield Choice("base", self.adapters[0].base_name)
        message = f"what {self.server.title} loads" if self.server else "--format"
        yield Choice("format", self.config.format, message)
        yield Choice("out", self.config.out)
        if self.config.verify:
            yield device

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the planned export."""
        return self._summary(self.loras, {}, verified=False)

    def write(self, output: Path, device: str, listener: Listener, merge: Any) -> dict[str, Any]:  # noqa: ARG002 - nothing is merged
        """Write every adapter into `output` and check it against the run's; returns the summary."""
        loras: dict[str, NormalForm | None] = {}
        checks: dict[str, dict[str, Any]] = {}
        records: list[AdapterRecord] = []
        for adapter in self.adapters:
            path = output if len(self.adapters) == 1 else output / adapter.name
            path.mkdir(exist_ok=True)
            lora, check, recorded = self._write_one(adapter, path, device, listener)
            loras[adapter.name] = lora
            if check is not None:
                checks[adapter.name] = check
                records.append(recorded)
        summary = self._summary(loras, checks, verified=self.config.verify)
        if records:
            header = {key: summary[key] for key in ("model", "server", "base", "start")}
            dtype = getattr(self.adapters[0].ref.model_config, "dtype", None) or "float32"
            header["file_format"] = self.config.format
            header["dtype"] = str(dtype).removeprefix("torch.")
            save_record(output / FILE, header, records)
        save_readme(output, summary)
        return summary

    def _write_one(
        self, adapter: ServedModel, path: Path, device: str, listener: Listener
    ) -> tuple[NormalForm, dict[str, Any] | None, AdapterRecord]:
        lora, prompts = self.loras[adapter.name], adapter.prompts()
        base: PromptOutputs | None = None
        trained: PromptOutputs | None = None
        if lora is None or self.config.verify:
            listener.stage(f"computing reference outputs of {adapter.name}")
            base, trained, lora = self._compute_outputs(adapter, prompts, lora, device)
        listener.stage(f"writing {adapter.name}")
        self.writer.write(path, lora, adapter)
        if (template := adapter.custom_chat_template) is not None:
            save_text(path / TEMPLATE, template)
        check = None
        if self.config.verify and trained is not None:
            listener.stage(f"reloading and comparing {adapter.name}")
            reloaded = self.writer.read(path, lora, adapter)
            check = self._compare(adapter, reloaded, prompts, trained, base, device)
            if check["effect"] <= BOUND * check["largest_logit"]:
                listener.warn(f"{adapter.name} has no effect: its logits equal the base's.")
        output = str(Path(adapter.name if len(self.adapters) > 1 else "", self.writer.file))
        outputs_by_model = {"trained": trained, "base": base}
        return lora, check, record(adapter.name, output, lora.rank, prompts, outputs_by_model)

    def _compute_outputs(
        self, adapter: ServedModel, prompts: list[Prompt], lora: NormalForm | None, device: str
    ) -> tuple[PromptOutputs | None, PromptOutputs, NormalForm]:
        """Returns outputs of base and trained model, and the plain LoRA (computed if None)."""
        base = None
        if adapter.answers:
            base_model = adapter.in_float32(with_adapter=False).load(device).model
            base = run_prompts(base_model, adapter, prompts)
            del base_model
        model = adapter.in_float32().load(device)
        peft_model = model.model
        trained = run_prompts(peft_model, adapter, prompts)
        if lora is None:
            try:
                lora = probe_normal_form(
                    peft_model.cpu(),
                    adapter.ref.adapter_path,
                    adapter.peft_config,
                    adapter.base,
                    self.config.max_rank,
                )
                lora = check_lora(lora, adapter, self.server)
            except InputError as error:
                refusal = _format_error(adapter, self.server, self.config.format, str(error))
                raise InputError(refusal) from None
        if base is None:
            with model.without_adapter():
                base = run_prompts(peft_model, adapter, prompts)
        del peft_model, model
        gc.collect()
        return base, trained, lora

    def _compare(
        self,
        adapter: ServedModel,
        lora: NormalForm,
        prompts: list[Prompt],
        trained: PromptOutputs,
        base: PromptOutputs | None,
        device: str,
    ) -> dict[str, Any]:
        """Load `lora` with PEFT; raise RunError if its logits differ from the outputs `trained`.

        Returns the comparison for `--json`; "effect" is the largest change of a logit by the
        adapter, "kl_from_quantized" the divergence from the model on its quantized base, or None.
        """
        from peft import PeftModel

        base_model, _ = load_model(
            adapter.ref.source,
            adapter.ref.model_config,
            adapter.ref.auto_class,
            dtype=torch.float32,
            device=device,
        )
        with Workspace("normal") as folder:
            save_normal_form(Path(folder), lora, adapter.peft_config, adapter.base_name)
            peft_model = PeftModel.from_pretrained(base_model, folder).eval()
        outputs = run_prompts(peft_model, adapter, prompts)
        del peft_model, base_model
        gc.collect()
        difference, scale = answers.max_difference(trained, outputs), answers.scale(trained)
        if not difference <= BOUND * scale:
            raise RunError(
                f"what was written is not {adapter.name}: read back and put onto its base by PEFT, "
                f"its logits differ by up to {difference:.3g} (the largest is {scale:.3g}). "
                "Nothing was saved. Use --format merged. Please report this with the command."
            )
        effect = answers.max_difference(trained, base) if base is not None else 0.0
        quantization = adapter.ref.quantization.get("kind", "none")
        quantized = None
        if quantization != "none" and not adapter.ref.is_prequantized:
            as_trained = adapter.ref.load(device).model
            quantized = answers.divergence(run_prompts(as_trained, adapter, prompts), outputs)
        return {
            "max_difference": difference,
            "largest_logit": scale,
            "effect": effect,
            "kl_from_quantized": quantized,
        }

    def _summary(
        self,
        loras: Mapping[str, NormalForm | None],
        checks: Mapping[str, dict[str, Any]],
        *,
        verified: bool,
    ) -> dict[str, Any]:
        config, several = self.config, len(self.adapters) > 1
        adapters, exported = [], []
        for adapter in self.adapters:
            lora = loras[adapter.name]
            path = config.out / adapter.name if several else config.out
            template = path / TEMPLATE if adapter.custom_chat_template is not None else None
            exported.append(
                ServedAdapter(
                    adapter.name, path / self.writer.file, lora.rank if lora else 0, template
                )
            )
            adapters.append(
                {
                    "name": adapter.name,
                    "method": adapter.ref.card.method,
                    "rank": lora and lora.rank,
                    "modules": lora and len(lora.factors),
                    "whole_modules": lora and lora.whole_modules,
                    "way": lora and lora.computed_from,
                    "changes": lora.notes if lora else [],
                    "chat_template": template and str(template),
                    "check": checks.get(adapter.name),
                }
            )
        start: list[str] = []
        if self.server and all(loras.values()):
            start = build_adapter_commands(self.server, self.adapters[0].base_name, exported)
        return {
            "model": config.model,
            "format": config.format,
            "server": self.server and self.server.name,
            "base": self.adapters[0].base_name,
            "adapters": adapters,
            "notes": self.notes,
            "start": start,
            "out": str(config.out),
            "verified": verified,
            "versions": library_versions(),
        }

    def describe(self, summary: Mapping[str, Any]) -> Iterator[str]:
        """Yields lines of text that describe the finished export."""
        for adapter in summary["adapters"]:
            rank = adapter["rank"]
            size = f"rank {rank}, {adapter['modules']:,} modules" if rank else "rank not known yet"
            yield f"{adapter['name']}: plain LoRA, {size}"
            for delta in adapter["changes"]:
                yield f"  {delta}"
            if adapter["chat_template"]:
                yield f"  its chat template is not the base's: {adapter['chat_template']}"
            if (check := adapter["check"]) is not None:
                yield from _check_lines(check)
        if summary.get("dry_run"):
            yield "dry run: settings were checked, nothing was written."
        else:
            if not summary["verified"]:
                yield "not verified (--no-verify); no reference outputs for ftlevel check-served"
            yield f"saved {summary['out']}  ({summary['seconds']:.1f} s)"
        if summary["start"]:
            yield "serve it:"
            yield from (f"  {command}" for command in summary["start"])
            if summary["verified"]:
                yield f"then: {check_command(summary)}"


def _check_lines(check: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"  read back by PEFT: logits differ from the run's by {check['max_difference']:.2g} at "
        f"most (largest {check['largest_logit']:.3g}; the adapter moves them by "
        f"{check['effect']:.2g})"
    )
    if check["kl_from_quantized"] is not None:
        yield (
            f"  on the unquantized base: KL {check['kl_from_quantized']:.2g} from "
            "the run on its quantized base"
        )
