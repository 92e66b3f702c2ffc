"""Several adapters on one base, switched by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ftlevel.artifacts.files import base_fingerprint
from ftlevel.config import GenerateConfig
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names
from ftlevel.models.hardware import select_device
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import add_adapter
from ftlevel.trained.model_ref import LoadedModel, ModelRef
from ftlevel.trained.resolve import (
    ADAPTER_CONFIG,
    check_base,
    is_model,
    resolve_model,
    with_quantization,
)

BASE = "base"
"""Name of the model with its adapters disabled."""
NO_ADAPTER = "model"
"""Name of a model without adapters."""


@dataclass(frozen=True)
class AdapterSet:
    """A loaded base with adapters by name; without adapters, the base is the only model."""

    models: dict[str, LoadedModel]
    notes: list[str]

    @property
    def has_base(self) -> bool:
        """Whether the adapters can be disabled to use the base."""
        return self._first.has_adapter

    @property
    def _first(self) -> LoadedModel:
        return next(iter(self.models.values()))

    @contextlib.contextmanager
    def active_adapter(self, name: str) -> Iterator[LoadedModel]:
        """Activate the adapter `name` in the `with` block; `base` disables all adapters."""
        if name == BASE:
            if not self.has_base:
                raise ConfigError("the model has no adapter that could be disabled.")
            with self._first.without_adapter():
                yield self._first
            return
        if name not in self.models:
            raise ConfigError(
                f"no adapter is called {name!r}.{did_you_mean(name, self.models)} "
                f"There are: {join_names(self.models)}."
            )
        trained = self.models[name]
        if trained.has_adapter:
            trained.model.set_adapter(trained.adapter_name)
            trained.model.requires_grad_(False)  # set_adapter enables gradients
        yield trained


def load_adapter_set(config: GenerateConfig) -> AdapterSet:
    """Load the model, run or adapters that `config` names.

    Raises ConfigError if nothing is named or two adapters have one name, InputError if one does not
    exist or fit.
    """
    device = select_device(config.device).value
    base, refs = _resolve_all(config, device)
    if not refs and base is None:
        raise ConfigError(
            "no model given. Pass a run, an adapter or a model, or --adapter NAME=DIR or "
            "--adapters-dir DIR."
        )
    if not refs and base is not None:
        trained = base.load(device)
        return AdapterSet({NO_ADAPTER: trained}, trained.notes)
    unknown = [name for name in config.chosen if name not in refs]
    if unknown:
        raise ConfigError(
            f"--adapter {unknown[0]}: no adapter has this name.{did_you_mean(unknown[0], refs)} "
            f"There are: {join_names(refs)}. Choose another as NAME=DIR."
        )
    refs = {name: refs[name] for name in config.chosen or refs}
    if base is not None:
        for name, ref in refs.items():
            check_base(base.source, ref.card, ref.adapter_path)
            refs[name] = with_quantization(replace(ref, source=base.source))
    _check_compatible(refs)
    (first, ref), *others = refs.items()
    trained = ref.load(device, adapter_name="adapter0")  # PEFT names contain no dot
    models = {first: trained}
    for number, (name, other) in enumerate(others, 1):
        add_adapter(trained.model, other.adapter_path, f"adapter{number}")
        models[name] = replace(trained, ref=other, adapter_name=f"adapter{number}")
    notes = [note for _, other in others for note in other.notes]
    return AdapterSet(models, [*trained.notes, *notes])


def _resolve_all(
    config: GenerateConfig, device: str
) -> tuple[ModelRef | None, dict[str, ModelRef]]:
    """Returns the full model that `config` names, or None, and adapter name → adapter."""
    base: ModelRef | None = None
    base_name, refs = config.base_model, dict[str, ModelRef]()
    if config.name is not None:
        ref = resolve_model(
            config.name, config.task, config.base_model, device=device, dtype=config.dtype
        )
        if ref.directory is None:
            base, base_name = ref, ref.base
        else:
            folder = (ref.run or ref.directory).resolve().name
            refs[NO_ADAPTER if folder == BASE else folder] = ref
    adapter_dirs = dict(config.adapters)
    found = _list_adapters(config.adapters_dir) if config.adapters_dir is not None else {}
    for name in (*refs, *found):
        if name in adapter_dirs or (name in refs and name in found):
            raise ConfigError(f"two adapters are called {name!r}. Choose another name.")
    for name, directory in (adapter_dirs | found).items():
        if name == BASE:
            raise ConfigError(f"--adapter {name}=…: the base has this name. Choose another name.")
        flag = f"--adapter {name}={directory}"
        adapter: ModelRef | None = None
        if not is_model(str(directory)):
            adapter = resolve_model(
                str(directory),
                config.task,
                base_name,
                device=device,
                dtype=config.dtype,
                label=flag,
            )
        if adapter is None or adapter.directory is None:
            raise InputError(f"{flag} is a model, not an adapter. Name a run or an adapter.")
        refs[name] = adapter
    return base, refs


def _list_adapters(adapters_dir: Path) -> dict[str, Path]:
    if not adapters_dir.is_dir():
        raise InputError(f"--adapters-dir {adapters_dir} is not a directory.")
    if not (adapters := scan_adapters(adapters_dir)):
        raise InputError(
            f"--adapters-dir {adapters_dir} contains no adapter: no directory in it has "
            f"{ADAPTER_CONFIG}."
        )
    return adapters


def scan_adapters(adapters_dir: Path) -> dict[str, Path]:
    """Returns the adapters and runs directly in `adapters_dir`, by folder name; may be empty."""
    return {
        path.name: path
        for path in sorted(adapters_dir.iterdir())
        if (path / ADAPTER_CONFIG).is_file() or (path / "adapter" / ADAPTER_CONFIG).is_file()
    }


def _check_compatible(refs: dict[str, ModelRef]) -> None:
    first_name, first = next(iter(refs.items()))
    fingerprints = {name: _fingerprint(ref) for name, ref in refs.items()}
    bases = fingerprints if all(fingerprints.values()) else {n: r.base for n, r in refs.items()}
    for name, other in refs.items():
        for attribute, one, two in (
            ("base", bases[first_name], bases[name]),
            ("quantization", first.quantization, other.quantization),
            ("kind of head", _head(first), _head(other)),
        ):
            if one != two:
                raise InputError(
                    f"the adapters {first_name!r} and {name!r} differ in {attribute} ({one} and "
                    f"{two}), so one model cannot have both. Use them separately."
                )


def _fingerprint(ref: ModelRef) -> str:
    """Returns the base's fingerprint, cut to 12 characters; "" if unknown, as on the Hub."""
    path, saved = ref.source.path, ref.card.base.get("fingerprint") or ""
    return (base_fingerprint(path) if path else saved)[:12]


def _head(ref: ModelRef) -> str:
    return TASKS[ref.task].head_signature(ref.labels)
