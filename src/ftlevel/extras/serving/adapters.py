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
from ftlevel.config import ExportConfig
from ftlevel.config.export import SERVERS, Server
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError, RunError, join_names
from ftlevel.events import Listener
from ftlevel.extras.serving import recorded as answers
from ftlevel.extras.serving.entry import (
    Prompt,
    ServedAdapter,
    ServedModel,
    adapter_name,
    build_adapter_commands,
    check_command,
    check_for,
    check_form,
    check_signs,
    open_entry,
    whole_format,
    write_card,
)
from ftlevel.extras.serving.recorded import (
    BOUND,
    FILE,
    AdapterRecord,
    PromptOutputs,
    record,
    run_prompts,
    write_served,
)
from ftlevel.merging.normal_form import (
    BaseWeights,
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
from ftlevel.trained.model_ref import ModelRef

_ROWS = 8
_NOT_ALONE = (RuntimeError, AttributeError, TypeError, ValueError, LookupError)
"""Errors of layers that cannot run on rows alone."""
_AT_ZERO, _LINEAR = 1e-9, 1e-5
_NOISE, _SMALLEST = 2e-7, 1e-6
"""Singular values below this share of the weight's norm, or of the largest one, are rounding."""


def probe_normal_form(
    tuned: Any, directory: Any, config: Any, base: BaseWeights, limit: int
) -> NormalForm:
    """Returns the adapter on `tuned`, a float32 model in eval mode, as plain LoRA.

    Raises InputError if an adapted layer is not linear, or its rank is above `limit`.
    """
    file = load_adapter_file(directory, config, base)
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if is_whole(name, config)}
    factors = {
        name: _factor(change, name, limit, norm)
        for name, layer in _layers(tuned)
        for change, norm in [_change(layer, name, base)]
    }
    file.notes.append("the update of its layers, factored")
    return build_normal_form(factors, file, limit, "the probe")


def _layers(tuned: Any) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, Any]] = []
    for name, module in tuned.get_base_model().named_modules():
        inside = layers and name.startswith(layers[-1][0] + ".")
        if isinstance(module, BaseTunerLayer) and not inside:
            layers.append((name, module))
    return layers


def _change(layer: Any, name: str, base: BaseWeights) -> tuple[torch.Tensor, float]:
    """Returns the adapter's update of the weight `name`, (out, in), and the norm of the weight."""
    base_layer = layer.get_base_layer()
    if not isinstance(base_layer, torch.nn.Linear) and type(base_layer).__name__ != "Conv1D":
        raise InputError(f"{name} is no linear but a {type(base_layer).__name__}. Merge it")
    weight = base.checkpoint.read(f"{name}.weight").double()
    weight = weight if isinstance(base_layer, torch.nn.Linear) else weight.T
    has_bias = getattr(base_layer, "bias", None) is not None
    bias = base.checkpoint.read(f"{name}.bias").double() if has_bias else 0.0
    layer64 = copy.deepcopy(layer).double()
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(_ROWS, weight.shape[1], generator=generator, dtype=torch.float64)
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    try:
        with torch.no_grad():
            zero, change, outputs = (
                layer64(rows) - (rows @ weight.T + bias)
                for rows in (samples[:1] * 0, identity, samples)
            )
    except _NOT_ALONE as error:  # float32 tensors, or needs sequences
        raise InputError(
            f"{name} cannot be evaluated alone ({' '.join(str(error).split())[:80]}). Merge it"
        ) from None
    apart = (outputs - samples @ change).norm()
    if zero.abs().max() > _AT_ZERO or apart > _LINEAR * max(float(outputs.norm()), 1e-12):
        raise InputError(
            f"{name} changes its bias, or does more than multiply its input by a matrix, which no "
            "plain LoRA does"
        )
    return change.T, float(weight.norm())


def _factor(change: torch.Tensor, name: str, limit: int, norm: float) -> Factors:
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    rank = int((values > max(_NOISE * norm, float(values[0]) * _SMALLEST)).sum())
    if rank > limit:
        raise InputError(
            f"the update of {name} has rank {rank:,} of {min(change.shape):,}, above --max-rank "
            f"{limit}. Merge it"
        )
    rank = max(rank, 1)
    return Factors(right[:rank].clone(), left[:, :rank] * values[:rank])


_MERGE = "Merge it"
TEMPLATE = "chat_template.jinja"


class Writer(Protocol):
    """Writes and reads plain LoRA in one format; servers load `file`; if empty, the directory."""

    file: str

    def check(self, entry: ServedModel) -> None:
        """Raise InputError if the format cannot represent the adapter; loads no base weights."""

    def write(self, output: Path, form: NormalForm, entry: ServedModel) -> None:
        """Write the adapter into the directory `output`."""

    def read(self, output: Path, form: NormalForm, _entry: ServedModel) -> NormalForm:
        """Load the written file; from `form`, use only settings that the file does not have."""


@dataclass(frozen=True)
class AdapterCheck:
    """Measurements of one written adapter.

    Attributes:
        difference: largest difference of a logit from the trained model.
        scale: largest absolute logit.
        effect: largest change of a logit due to the adapter.
        quantized: KL divergence from the trained model on its quantized base, or None.
    """

    difference: float
    scale: float
    effect: float
    quantized: float | None


def plan_adapters(
    writer: Writer,
    config: ExportConfig,
    ref: ModelRef | Mapping[str, ModelRef],
    server: str | None = None,
) -> AdaptersExport:
    """Plan the export of one adapter, or of several by name; `server` replaces that of `config`.

    Raises:
        InputError: An adapter cannot become plain LoRA or be served as trained, or they do not
            share a base.
    """
    config = config.model_copy(update={"server": server}) if server else config
    target = SERVERS.get(config.server or "")
    refs = ref if isinstance(ref, Mapping) else {adapter_name(ref): ref}
    entries = [open_entry(name, one, target) for name, one in refs.items()]
    if target is not None:
        check_signs(target, [entry.name for entry in entries], config.out)
    notes: list[str] = []
    forms: dict[str, NormalForm | None] = {}
    for entry in entries:
        try:
            get_plain_form(entry.peft_config)
            notes += check_for(entry, target)
            writer.check(entry)
            form = compute_normal_form(
                entry.ref.adapter_path, entry.peft_config, entry.base, config.max_rank
            )
            form = form and check_form(form, entry, target)
        except InputError as error:
            raise InputError(_refusal(entry, target, config.format, str(error))) from None
        forms[entry.name] = form
    _check_together(entries, target)
    return AdaptersExport(config, target, entries, forms, list(dict.fromkeys(notes)), writer)


def _refusal(entry: ServedModel, server: Server | None, format_: str, reason: str) -> str:
    """Returns an error message with the adapter's name, `reason`, and how to merge, if possible."""
    peft_config = entry.peft_config
    purpose = f"for {server.title}" if server else f"as {format_}"
    reason = f"{entry.name} cannot be written {purpose}: {reason.rstrip('.')}"
    if reason.endswith(_MERGE):
        reason = reason.removesuffix(_MERGE)
        peft_type = str(peft_config.get("peft_type"))
        if get_merge_error(peft_config) is None:
            reason += f"Merge it: --format {whole_format(server)}"
        elif peft_type in BY_PEFT_TYPE:
            reason += "It cannot be merged either: keep it with PEFT or ftlevel"
        else:
            reason += "Merge it by merge_and_unload of PEFT, and serve the model"
    return reason + "."


def _check_together(entries: Sequence[ServedModel], server: Server | None) -> None:
    """Refuse adapters that one server cannot serve together."""
    if len(entries) == 1:
        return
    if server is not None and not server.several:
        raise ConfigError(
            f"--for {server.name} serves one adapter, and {len(entries)} are given: "
            f"{join_names(entry.name for entry in entries)}. Choose one."
        )
    first = entries[0]
    for entry in entries[1:]:
        cards = (first.ref.card.base, entry.ref.card.base)
        marks = [card.get("fingerprint") for card in cards]
        if entry.base_name != first.base_name or (all(marks) and marks[0] != marks[1]):
            raise InputError(
                f"{first.name} and {entry.name} have different bases ({first.base_name} and "
                f"{entry.base_name}), and a server loads one. Export them separately."
            )
    templates = {entry.own_chat_template for entry in entries}
    if server is not None and len(templates) > 1:
        raise InputError(
            f"{join_names(entry.name for entry in entries)} were trained with different chat "
            "templates, and a server has one for all. Export them one by one."
        )


@dataclass(frozen=True)
class AdaptersExport:
    """Planned export of adapters, before weights of the base are loaded.

    If a value of `forms` is None, it is computed from the loaded layers. `server` is None if only a
    format was requested.
    """

    config: ExportConfig
    server: Server | None
    entries: list[ServedModel]
    forms: dict[str, NormalForm | None]
    notes: list[str]
    writer: Writer

    def choices(self, device: Choice) -> Iterator[Choice]:
        """Yields the settings to print before the export."""
        for entry in self.entries:
            form = self.forms[entry.name]
            reason = "known when its layers are computed" if form is None else f"rank {form.rank}"
            yield Choice(entry.name, entry.ref.card.method, reason)
        yield Choice("base", self.entries[0].base_name)
        message = f"what {self.server.title} loads" if self.server else "--format"
        yield Choice("format", self.config.format, message)
        yield Choice("out", self.config.out)
        if self.config.verify:
            yield device

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the planned export."""
        return self._summary(self.forms, {}, verified=False)

    def write(self, output: Path, device: str, listener: Listener, merge: Any) -> dict[str, Any]:  # noqa: ARG002 - nothing is merged
        """Write every adapter into `output`, compare it with the run; return the summary."""
        forms: dict[str, NormalForm | None] = {}
        checks: dict[str, AdapterCheck] = {}
        records: list[AdapterRecord] = []
        for entry in self.entries:
            directory = output if len(self.entries) == 1 else output / entry.name
            directory.mkdir(exist_ok=True)
            form, check, recorded = self._write_one(entry, directory, device, listener)
            forms[entry.name] = form
            if check is not None:
                checks[entry.name] = check
                records.append(recorded)
        summary = self._summary(forms, checks, verified=self.config.verify)
        if records:
            facts = {key: summary[key] for key in ("model", "server", "base", "start")}
            facts |= {"file_format": self.config.format, "dtype": _stored_dtype(self.entries[0])}
            write_served(output / FILE, facts, records)
        write_card(output, summary)
        return summary

    def _write_one(
        self, entry: ServedModel, directory: Path, device: str, listener: Listener
    ) -> tuple[NormalForm, AdapterCheck | None, AdapterRecord]:
        form, prompts = self.forms[entry.name], entry.prompts()
        base: PromptOutputs | None = None
        trained: PromptOutputs | None = None
        if form is None or self.config.verify:
            listener.stage(f"computing reference outputs of {entry.name}")
            base, trained, form = self._ask_trained(entry, prompts, form, device)
        listener.stage(f"writing {entry.name}")
        self.writer.write(directory, form, entry)
        if (template := entry.own_chat_template) is not None:
            (directory / TEMPLATE).write_text(template, encoding="utf-8")
        check = None
        if self.config.verify and trained is not None:
            listener.stage(f"reloading and comparing {entry.name}")
            form_read = self.writer.read(directory, form, entry)
            check = self._compare(entry, form_read, prompts, trained, base, device)
            if check.effect <= BOUND * check.scale:
                listener.warn(f"{entry.name} has no effect: its logits equal the base's.")
        output = (
            str(directory.relative_to(directory.parent) / self.writer.file)
            if len(self.entries) > 1
            else (self.writer.file or ".")
        )
        spoken = {"trained": trained, "base": base}
        return form, check, record(entry.name, output, form.rank, prompts, spoken)

    def _ask_trained(
        self, entry: ServedModel, prompts: list[Prompt], form: NormalForm | None, device: str
    ) -> tuple[PromptOutputs | None, PromptOutputs, NormalForm]:
        """Returns outputs of base and trained model, and `form`, which is computed if None."""
        base = None
        if entry.answers:
            base_model = entry.in_float32(with_adapter=False).load(device).model
            base = run_prompts(base_model, entry, prompts)
            del base_model
        model = entry.in_float32().load(device)
        tuned = model.model
        trained = run_prompts(tuned, entry, prompts)
        if form is None:
            try:
                form = probe_normal_form(
                    tuned.cpu(),
                    entry.ref.adapter_path,
                    entry.peft_config,
                    entry.base,
                    self.config.max_rank,
                )
                form = check_form(form, entry, self.server)
            except InputError as error:
                refusal = _refusal(entry, self.server, self.config.format, str(error))
                raise InputError(refusal) from None
        if base is None:
            with model.without_adapter():
                base = run_prompts(tuned, entry, prompts)
        del tuned, model
        gc.collect()
        return base, trained, form

    def _compare(
        self,
        entry: ServedModel,
        form: NormalForm,
        prompts: list[Prompt],
        trained: PromptOutputs,
        base: PromptOutputs | None,
        device: str,
    ) -> AdapterCheck:
        """Apply `form`, as read back, with PEFT; raise RunError if logits differ from `trained`."""
        from peft import PeftModel

        base_model, _ = load_model(
            entry.ref.source,
            entry.ref.model_config,
            entry.ref.auto_class,
            dtype=torch.float32,
            device=device,
        )
        with Workspace("normal") as folder:
            save_normal_form(Path(folder), form, entry)
            peft_model = PeftModel.from_pretrained(base_model, folder).eval()
        outputs = run_prompts(peft_model, entry, prompts)
        del peft_model, base_model
        gc.collect()
        difference, scale = answers.largest_difference(trained, outputs), answers.scale(trained)
        if not difference <= BOUND * scale:
            raise RunError(
                f"what was written is not {entry.name}: read back and put onto its base by PEFT, "
                f"its logits differ by up to {difference:.3g} (the largest is {scale:.3g}). "
                "Nothing was saved. Use --format merged. Please report this with the command."
            )
        effect = answers.largest_difference(trained, base) if base is not None else 0.0
        quantization = entry.ref.quantization.get("kind", "none")
        quantized = None
        if quantization != "none" and not entry.ref.is_prequantized:
            as_trained = entry.ref.load(device).model
            quantized = answers.divergence(run_prompts(as_trained, entry, prompts), outputs)
        return AdapterCheck(difference, scale, effect, quantized)

    def _summary(
        self,
        forms: Mapping[str, NormalForm | None],
        checks: Mapping[str, AdapterCheck],
        *,
        verified: bool,
    ) -> dict[str, Any]:
        config, several = self.config, len(self.entries) > 1
        adapters, parts = [], []
        for entry in self.entries:
            form, check = forms[entry.name], checks.get(entry.name)
            directory = config.out / entry.name if several else config.out
            template = directory / TEMPLATE if entry.own_chat_template is not None else None
            parts.append(
                ServedAdapter(
                    entry.name, directory / self.writer.file, form.rank if form else 0, template
                )
            )
            adapters.append(
                {
                    "name": entry.name,
                    "method": entry.ref.card.method,
                    "rank": form and form.rank,
                    "modules": form and len(form.factors),
                    "whole_modules": form and form.whole_modules,
                    "way": form and form.way,
                    "changes": form.said if form else [],
                    "chat_template": template and str(template),
                    "check": check
                    and {
                        "max_difference": check.difference,
                        "largest_logit": check.scale,
                        "effect": check.effect,
                        "kl_from_quantized": check.quantized,
                    },
                }
            )
        known = self.server is not None and all(forms.values())
        start = (
            build_adapter_commands(self.server, self.entries[0].base_name, parts)
            if (known and self.server)
            else []
        )
        return {
            "model": config.model,
            "format": config.format,
            "server": self.server and self.server.name,
            "base": self.entries[0].base_name,
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
            for change in adapter["changes"]:
                yield f"  {change}"
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
            f"  on the base that is not quantized it is KL {check['kl_from_quantized']:.2g} from "
            "the run on its quantized base"
        )


def _stored_dtype(entry: ServedModel) -> str:
    return str(getattr(entry.ref.model_config, "dtype", None) or "float32").removeprefix("torch.")
