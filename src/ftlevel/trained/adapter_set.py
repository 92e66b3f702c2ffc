"""Several adapters on one base, switched by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ftlevel.config import GenerateConfig
from ftlevel.errors import ConfigError, InputError, did_you_mean, join_names
from ftlevel.models.hardware import choose_device
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import add_adapter
from ftlevel.trained.load import LoadedModel, load_ref
from ftlevel.trained.model_ref import (
    ADAPTER_CONFIG,
    ModelRef,
    check_base,
    is_model,
    resolve_model,
    resolve_stored,
)

BASE = "base"
"""Name of the model with its adapters disabled."""
NO_ADAPTER = "model"
"""Name of a model without adapters."""


@dataclass(frozen=True)
class AdapterSet:
    """A loaded base with adapters, which share one model; a model without adapters is one entry.

    `slots` maps names to PEFT's adapter names, which must not contain a dot.
    """

    voices: dict[str, LoadedModel]
    slots: dict[str, str]
    notes: list[str]

    @property
    def has_base(self) -> bool:
        """Whether the adapters can be disabled."""
        return self._any.has_adapter

    @property
    def _any(self) -> LoadedModel:
        return next(iter(self.voices.values()))

    @contextlib.contextmanager
    def active_adapter(self, name: str) -> Iterator[LoadedModel]:
        """Activate the adapter `name` inside the block; `base` disables all.

        The base uses the prompt format of the first adapter. Raises ConfigError for an unknown
        name.
        """
        if name == BASE:
            if not self.has_base:
                raise ConfigError("the model has no adapter that could be disabled.")
            with self._any.model.disable_adapter():
                yield self._any
            return
        if name not in self.voices:
            raise ConfigError(
                f"no adapter is called {name!r}.{did_you_mean(name, self.voices)} "
                f"There are: {join_names(self.voices)}."
            )
        trained = self.voices[name]
        if name in self.slots:
            trained.model.set_adapter(self.slots[name])
            trained.model.requires_grad_(False)  # set_adapter enables gradients
        yield trained


def load_adapter_set(config: GenerateConfig) -> AdapterSet:
    """Load the model, run or adapters that `config` names.

    Raises:
        ConfigError: Nothing is named, or two adapters have the same name.
        InputError: Something does not exist, or the adapters are not compatible.
    """
    device = choose_device(config.device).value
    base, named = _find_all(config, device)
    if not named:
        if base is None:
            raise ConfigError(
                "nothing is named that could answer. Name a run, an adapter or a model, or give "
                "--adapter NAME=DIR or --adapters-dir DIR."
            )
        trained = load_ref(base, device)
        return AdapterSet({NO_ADAPTER: trained}, {}, trained.notes)
    unknown = [name for name in config.chosen if name not in named]
    if unknown:
        raise ConfigError(
            f"--adapter {unknown[0]}: no adapter is called so.{did_you_mean(unknown[0], named)} "
            f"There are: {join_names(named)}. Choose another as NAME=DIR."
        )
    if config.chosen:
        named = {name: named[name] for name in config.chosen}
    if base is not None:
        named = {name: _onto(base, found) for name, found in named.items()}
    _check_together(named)
    (first, found), *others = named.items()
    slots = {name: f"adapter{number}" for number, name in enumerate(named)}
    trained = load_ref(found, device, slots[first])
    voices = {first: trained}
    for name, other in others:
        add_adapter(trained.model, _directory(other), slots[name])
        voices[name] = _voice(trained, other)
    notes = [note for _, other in others for note in other.notes]
    return AdapterSet(voices, slots, [*trained.notes, *notes])


def _find_all(config: GenerateConfig, device: str) -> tuple[ModelRef | None, dict[str, ModelRef]]:
    """Return the plain model that was named, and every adapter by name."""
    base, places = None, dict(config.adapters)
    if config.adapters_dir is not None:
        for name, place in adapters_in(config.adapters_dir).items():
            if name in places:
                raise ConfigError(f"two adapters are called {name!r}. Name one otherwise.")
            places[name] = place
    named: dict[str, ModelRef] = {}
    if config.name is not None:
        found = resolve_model(
            config.name, config.task, config.base_model, device=device, dtype=config.dtype
        )
        if found.directory is None:
            base = found
        else:
            own = found.run or found.directory
            name = own.resolve().name
            if name in places:
                raise ConfigError(f"two adapters are called {name!r}. Name one otherwise.")
            named[name] = found
    now = base.source.name if base is not None else config.base_model
    for name, place in places.items():
        if name == BASE:
            raise ConfigError(f"--adapter {name}=…: the base is called so. Choose another name.")
        said = f"--adapter {name}={place}"
        if is_model(str(place)):
            raise InputError(f"{said} is no adapter but a model. Name a run or an adapter.")
        found = resolve_model(
            str(place), config.task, now, device=device, dtype=config.dtype, said=said
        )
        if found.directory is None:
            raise InputError(f"{said} is no adapter but a model. Name a run or an adapter.")
        named[name] = found
    return base, named


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return adapters and runs in `directory` by folder name; raise InputError if none."""
    if not directory.is_dir():
        raise InputError(f"--adapters-dir {directory} is no directory.")
    found = find_adapters(directory)
    if not found:
        raise InputError(
            f"--adapters-dir {directory} holds no adapter: no folder in it has {ADAPTER_CONFIG}."
        )
    return found


def find_adapters(directory: Path) -> dict[str, Path]:
    """Return the adapters and runs in `directory` by folder name; empty if there are none."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if (path / ADAPTER_CONFIG).is_file() or (path / "adapter" / ADAPTER_CONFIG).is_file()
    }


def _onto(base: ModelRef, found: ModelRef) -> ModelRef:
    """Return `found` with the base that the user named."""
    check_base(base.source, found.card, _directory(found))
    return resolve_stored(replace(found, source=base.source))


def _directory(found: ModelRef) -> Path:
    if found.directory is None:
        raise TypeError("an adapter has a directory")
    return found.directory


def _check_together(named: dict[str, ModelRef]) -> None:
    """Refuse adapters that differ in base, quantization or head, and cannot share a model."""
    first_name, first = next(iter(named.items()))
    for name, other in named.items():
        for what, one, two in (
            ("base", _base_identity(first), _base_identity(other)),
            ("quantization", first.card.quantization, other.card.quantization),
            ("kind of head", _head(first), _head(other)),
        ):
            if one != two:
                raise InputError(
                    f"the adapters {first_name!r} and {name!r} have not the same {what} ({one} and "
                    f"{two}), so one model cannot hold both. Ask them one by one."
                )


def _base_identity(found: ModelRef) -> str:
    fingerprint = found.card.base.get("fingerprint")
    return str(fingerprint)[:12] if fingerprint else str(found.card.base["name"])


def _head(found: ModelRef) -> str:
    return TASKS[found.card.task].describe_head(found.card.labels)


def _voice(trained: LoadedModel, found: ModelRef) -> LoadedModel:
    """Return `trained` with the task and settings of the adapter `found`."""
    card = found.card
    return replace(
        trained,
        task=TASKS[card.task],
        prompt_format=found.prompt_format,
        max_length=card.max_length,
        labels=card.labels,
        options=card.options,
        method=card.method,
    )
