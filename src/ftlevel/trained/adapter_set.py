"""Several adapters on one base, switched by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ftlevel.config import GenerateConfig
from ftlevel.data.encoding.prompts import read_format
from ftlevel.errors import ConfigError, InputError, did_you_mean, listing
from ftlevel.models.hardware import choose_device
from ftlevel.tasks import TASKS
from ftlevel.trained.adapt import add_adapter
from ftlevel.trained.base import check_base
from ftlevel.trained.load import (
    Found,
    Trained,
    find_trained,
    load_found,
    resolve_stored,
)
from ftlevel.trained.plain_peft import ADAPTER_CONFIG

BASE = "base"
"""What the model is called with its adapters switched off."""
ALONE = "model"
"""What a model is called that has no adapters."""


@dataclass(frozen=True)
class AdapterSet:
    """A loaded base with adapters; a model without adapters has one voice, its own.

    Attributes:
        voices: name → what answers under it; all share one model.
        slots: name → what PEFT calls that adapter, which may hold no dot.
        notes: what the user should know.
    """

    voices: dict[str, Trained]
    slots: dict[str, str]
    notes: list[str]

    @property
    def has_base(self) -> bool:
        """Whether the adapters can be switched off."""
        return self._any.has_adapter

    @property
    def _any(self) -> Trained:
        return next(iter(self.voices.values()))

    @contextlib.contextmanager
    def speaking(self, name: str) -> Iterator[Trained]:
        """Switch the adapter called `name` on inside the block; `base` switches all off.

        The base is asked in the prompt format of the first adapter.

        Raises:
            ConfigError: there is no such adapter.
        """
        if name == BASE:
            if not self.has_base:
                raise ConfigError("the model has no adapter that could be switched off.")
            with self._any.model.disable_adapter():
                yield self._any
            return
        if name not in self.voices:
            raise ConfigError(
                f"no adapter is called {name!r}.{did_you_mean(name, self.voices)} "
                f"There are: {listing(self.voices)}."
            )
        trained = self.voices[name]
        if name in self.slots:
            trained.model.set_adapter(self.slots[name])
            trained.model.requires_grad_(False)  # set_adapter makes it trainable
        yield trained


def load_adapter_set(config: GenerateConfig) -> AdapterSet:
    """Load what `config` names: a model, a run, or several adapters of one base.

    Raises:
        ConfigError: nothing is named, or two adapters alike.
        InputError: something is not there, or the adapters do not go together.
    """
    device = choose_device(config.device).value
    base, named = _find_all(config, device)
    if not named:
        if base is None:
            raise ConfigError(
                "nothing is named that could answer. Name a run, an adapter or a model, or give "
                "--adapter NAME=DIR or --adapters-dir DIR."
            )
        trained = load_found(base, device)
        return AdapterSet({ALONE: trained}, {}, trained.notes)
    unknown = [name for name in config.chosen if name not in named]
    if unknown:
        raise ConfigError(
            f"--adapter {unknown[0]}: no adapter is called so.{did_you_mean(unknown[0], named)} "
            f"There are: {listing(named)}. Name another as NAME=DIR."
        )
    if config.chosen:
        named = {name: named[name] for name in config.chosen}
    if base is not None:
        named = {name: _onto(base, found) for name, found in named.items()}
    _check_together(named)
    (first, found), *others = named.items()
    slots = {name: f"adapter{number}" for number, name in enumerate(named)}
    trained = load_found(found, device, slots[first])
    voices = {first: trained}
    for name, other in others:
        add_adapter(trained.model, _directory(other), slots[name])
        voices[name] = _voice(trained, other)
    notes = [note for _, other in others for note in other.notes]
    return AdapterSet(voices, slots, [*trained.notes, *notes])


def _find_all(config: GenerateConfig, device: str) -> tuple[Found | None, dict[str, Found]]:
    """Return the plain model that was named, and every adapter by its name."""
    base, places = None, dict(config.adapters)
    if config.adapters_dir is not None:
        for name, place in adapters_in(config.adapters_dir).items():
            if name in places:
                raise ConfigError(f"two adapters are called {name!r}. Name one otherwise.")
            places[name] = place
    named: dict[str, Found] = {}
    if config.name is not None:
        found = find_trained(config.name, device, config.task, place=config.base_model)
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
        found = find_trained(str(place), device, config.task, said, now)
        if found.directory is None:
            raise InputError(f"--adapter {name}={place} is no adapter but a model.")
        named[name] = found
    return base, named


def adapters_in(directory: Path) -> dict[str, Path]:
    """Return the adapters and runs in `directory` by the names of their folders.

    Raises:
        InputError: it is no directory, or holds none.
    """
    if not directory.is_dir():
        raise InputError(f"--adapters-dir {directory} is no directory.")
    found = find_adapters(directory)
    if not found:
        raise InputError(
            f"--adapters-dir {directory} holds no adapter: no folder in it has {ADAPTER_CONFIG}."
        )
    return found


def find_adapters(directory: Path) -> dict[str, Path]:
    """Return the adapters and runs in `directory` by the names of their folders, if any."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if (path / ADAPTER_CONFIG).is_file() or (path / "adapter" / ADAPTER_CONFIG).is_file()
    }


def _onto(base: Found, found: Found) -> Found:
    """Return `found` to be put onto the model that the user named."""
    check_base(base.source, found.card, _directory(found))
    return resolve_stored(replace(found, source=base.source))


def _directory(found: Found) -> Path:
    if found.directory is None:
        raise TypeError("an adapter has a directory")
    return found.directory


def _check_together(named: dict[str, Found]) -> None:
    """Refuse adapters that cannot share a model.

    Raises:
        InputError: naming the first two that differ, and in what.
    """
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


def _base_identity(found: Found) -> str:
    fingerprint = found.card.base.get("fingerprint")
    return str(fingerprint)[:12] if fingerprint else str(found.card.base["name"])


def _head(found: Found) -> str:
    return TASKS[found.card.task].describe_head(found.card.labels)


def _voice(trained: Trained, found: Found) -> Trained:
    """Return `trained` as it is with the adapter of `found` switched on."""
    card = found.card
    return replace(
        trained,
        task=TASKS[card.task],
        prompt_format=read_format(card),
        max_length=card.max_length,
        labels=card.labels,
        options=card.options,
        method=card.method,
    )
