"""Write a bottleneck adapter, with the head, as a directory for AdapterHub's `adapters` library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlevel.artifacts.cards import AdapterCard
from ftlevel.artifacts.files import write_json
from ftlevel.config import ExportConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, InputError, RunError
from ftlevel.events import Listener
from ftlevel.extras.adapterhub.adapter import (
    ADAPTER_FILES,
    CONFIG,
    HEAD_CONFIG,
    HEAD_FILES,
    is_adapterhub,
    load_hub_adapter,
)
from ftlevel.extras.adapterhub.config_file import VERSION, WEIGHTS, create_hub_config, get_hub_names
from ftlevel.merging.formats.base import MergeAdapter
from ftlevel.methods.bottleneck import get_adapter_positions, target_pattern
from ftlevel.methods.merging import load_peft_config
from ftlevel.models.loading import build_task_model
from ftlevel.trained.model_ref import ModelRef

_PREFIX = "base_model.model."


def plan_export(config: ExportConfig, ref: ModelRef) -> AdapterHubExport:
    """Prepare the export; raise InputError or ConfigError if adapter or flags do not fit."""
    directory = ref.directory
    if "max_rank" in config.model_fields_set:
        raise ConfigError("--max-rank is for plain LoRA, not for adapterhub. Drop it.")
    if directory is None:
        raise InputError(
            f"{config.model} is a whole model, and --format adapterhub is for an adapter. "
            "transformers and adapters load it as it is."
        )
    if is_adapterhub(directory):
        raise InputError(f"{config.model} is in AdapterHub's form already.")
    peft_config = load_peft_config(directory)
    if peft_config.get("peft_type") != "BOTTLENECK":
        raise InputError(
            f"{config.model} was trained by --method {ref.card.method}, and --format adapterhub "
            "is for --method adapter."
        )
    model = build_task_model(ref.model_config, ref.auto_class)
    try:
        hub_config = create_hub_config(peft_config, ref.model_config)
        hub_names = _all_hub_names(directory, peft_config["placement"], model)
    except InputError as error:
        raise InputError(f"{config.model} cannot be written for AdapterHub: {error}") from None
    return AdapterHubExport(config, ref.card, directory, model, hub_config, hub_names)


def _all_hub_names(directory: Path, placement: str, model: Any) -> dict[str, str]:
    positions = get_adapter_positions(model.config)
    pattern = re.compile(target_pattern(positions, placement)) if positions else None
    expected = {n for n, _ in model.named_modules() if pattern and pattern.fullmatch(n)}
    ends = ".bottleneck_up.weight"
    result = {key.removesuffix(ends) for key in _read(directory)[0] if key.endswith(ends)}
    if odd := sorted(expected ^ result):
        raise InputError(
            f"its adapters are not at the positions of placement {placement}, as {odd[0]} shows. "
            "Train without --target-modules."
        )
    return get_hub_names(iter(sorted(result)), model)


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.torch import load_file

    weights = load_file(str(directory / "adapter_model.safetensors"))
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in weights.items()}
    heads = {key for key in tensors if not any(key.endswith(f".{end}") for end in WEIGHTS)}
    return (
        {key: tensor for key, tensor in tensors.items() if key not in heads},
        {key: tensors[key] for key in sorted(heads)},
    )


@dataclass(frozen=True)
class AdapterHubExport:
    """Planned export of a bottleneck adapter, before any weights are read.

    `model` is on the meta device; `hub_names` maps adapted modules to AdapterHub's module paths.
    """

    config: ExportConfig
    card: AdapterCard
    directory: Path
    model: Any
    hub_config: Mapping[str, Any]
    hub_names: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the adapter in AdapterHub: the directory's, with invalid characters as _."""
        is_run = self.directory.name == "adapter"
        directory = self.directory.parent if is_run else self.directory
        return re.sub(r"\W+", "_", directory.resolve().name)

    @property
    def notes(self) -> list[str]:
        """Notes for the user, as sentences without a full stop."""
        notes = []
        if dropout := load_peft_config(self.directory).get("adapter_dropout"):
            notes.append(
                f"adapter_dropout {dropout:g} is on the bottleneck here and "
                "on the output in AdapterHub: it is written as 0, which only training would see"
            )
        if self.card.quantization.get("kind", "none") != "none":
            notes.append(
                f"trained on a base in {self.card.quantization['kind']}: on the base as it is the "
                "outputs differ by its rounding"
            )
        return notes

    def choices(self, device: Choice) -> Iterator[Choice]:  # noqa: ARG002 - a format's signature
        """Yields the settings to print before the export."""
        yield Choice("adapter", self.config.model, f"{len(self.hub_names):,} positions")
        yield Choice("base", str(self.card.base["name"]), type(self.model).__name__)
        yield Choice("name", self.name, "as load_adapter returns it")
        yield Choice("head", ", ".join(self.card.heads) or "none", "")
        yield Choice("out", self.config.out)

    def write(
        self,
        output: Path,
        device: str,  # noqa: ARG002 - a format's signature
        listener: Listener,
        merge: MergeAdapter,  # noqa: ARG002 - nothing is merged
    ) -> dict[str, Any]:
        """Write the directory `output`, read it back and compare; return the summary."""
        import torch

        listener.stage("writing the adapter")
        weights, head = _read(self.directory)
        start = self.model.base_model_prefix + "."
        exported = {}
        for key, tensor in weights.items():
            ours = next(end for end in WEIGHTS if key.endswith(f".{end}"))
            site = key.removesuffix(f".{ours}")
            before = start if site.startswith(start) else ""
            name = f"{before}{self.hub_names[site]}.adapters.{self.name}.{WEIGHTS[ours]}"
            exported[name] = tensor
        torch.save(exported, output / ADAPTER_FILES[1])
        write_json(output / CONFIG, {**self._about(), "name": self.name, "config": self.hub_config})
        if head:
            torch.save(head, output / HEAD_FILES[1])
            head_config = self._about() | {
                "name": None,
                "config": None,
                "num_labels": self.model.config.num_labels,
                "label2id": {label: index for index, label in enumerate(self.card.labels)} or None,
            }
            write_json(output / HEAD_CONFIG, head_config)
        if self.config.verify:
            listener.stage("reloading the adapter")
            self._check(output, {**weights, **head})
        return self.dry_run() | {"verified": self.config.verify}

    def _about(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "model_type": config.model_type,
            "hidden_size": config.hidden_size,
            "model_name": str(self.card.base["name"]),
            "model_class": type(self.model).__name__,
            "version": VERSION,
        }

    def _check(self, output: Path, expected: Mapping[str, Any]) -> None:
        """Load `output` as an AdapterHub adapter; raise RunError if it differs from `expected`."""
        import torch

        config, weights = load_hub_adapter(output).convert(self.model)
        placement = load_peft_config(self.directory)["placement"]
        alike = {placement, {"parallel": "par_bn"}.get(placement, placement)}
        if config.placement not in alike or set(weights) != {_PREFIX + name for name in expected}:
            raise RunError(f"{output} was written wrongly; this is a bug. Please report it.")
        for name, tensor in expected.items():
            if not torch.equal(weights[_PREFIX + name], tensor):
                raise RunError(f"{output}: {name} was written wrongly; this is a bug.")

    def dry_run(self) -> dict[str, Any]:
        """Returns the summary of the planned export."""
        return {
            "model": self.config.model,
            "format": "adapterhub",
            "out": str(self.config.out),
            "name": self.name,
            "base": self.card.base["name"],
            "model_class": type(self.model).__name__,
            "positions": len(self.hub_names),
            "heads": list(self.card.heads),
        }

    def describe(self, summary: Mapping[str, Any]) -> Iterator[str]:
        """Yields lines of text that describe the finished export."""
        if summary.get("dry_run"):
            yield "nothing was written (--dry-run)"
            return
        yield f"{summary['out']}: {summary['positions']:,} adapters of AdapterHub's form"
        if summary["verified"]:
            yield "read back: the same weights"
        out = summary["out"]
        yield f'model.load_adapter("{out}", set_active=True)  # after adapters.init(model)'
