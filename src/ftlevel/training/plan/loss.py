"""The loss of training: smoothed labels, weights of classes, focal; and where it can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ftlevel.config import TrainConfig
from ftlevel.config.choices import Choice
from ftlevel.config.options.preference import PREFERENCE_TASKS
from ftlevel.data.encoding.encode import Encoded
from ftlevel.errors import ConfigError, did_you_mean, listing
from ftlevel.task import Objective, TrainingLoss

_SHOWN = 8  # classes whose weights fit on a line


def choose_loss(
    config: TrainConfig, objective: Objective, names: Sequence[str], rows: Sequence[Encoded]
) -> tuple[TrainingLoss, list[Choice]]:
    """Return the loss of training, and the lines about it.

    Args:
        config: the whole configuration.
        objective: what the model is trained on.
        names: of the classes or tags.
        rows: of training, by which classes are balanced.

    Raises:
        ConfigError: it cannot be had here.
    """
    train = config.train
    _check(config, objective)
    wish, shown = train.class_weights, list[Choice]()
    weights: tuple[float, ...] = ()
    if wish == "balanced":
        weights = objective.balance(rows, len(names))
        reason = (
            "balanced: targets / (classes × targets of the class)"
            if objective.one_of_many
            else "balanced: rows without a class / rows with it, for its yes"
        )
    elif wish:
        weights = _read_weights(wish, names)
        reason = "" if len(wish) == len(names) else "1 where none is given"
    if weights:
        shown.append(Choice("class weights", _describe(dict(zip(names, weights, strict=True))),
                            reason))  # fmt: skip
    taught = config.distillation
    if taught.teacher is not None:
        what = f"{taught.kd_ratio:g} {taught.divergence} of {taught.teacher}"
        if taught.kd_ratio < 1:
            what = f"{1 - taught.kd_ratio:g} cross entropy + {what}"
        shown.append(Choice("loss", what, f"temperature {taught.kd_temperature:g}"))
    smoothing = 0.0 if config.task in PREFERENCE_TASKS else train.label_smoothing_factor
    return TrainingLoss(smoothing, weights, train.focal_gamma), shown


def _check(config: TrainConfig, objective: Objective) -> None:
    """Refuse what the targets have not.

    Raises:
        ConfigError: labels that cannot be smoothed, or that are of no class.
    """
    train, problems = config.train, []
    is_judged = config.task in PREFERENCE_TASKS  # whose losses have a smoothing of their own
    if train.label_smoothing_factor and not (objective.one_of_many or is_judged):
        problems.append(
            f"--label-smoothing-factor {train.label_smoothing_factor:g} spreads a target "
            "over tokens, tags or classes, of which one is right, and here the labels are of "
            "another kind. Drop it."
        )
    for flag, given in (
        ("--class-weights", train.class_weights is not None),
        (f"--focal-gamma {train.focal_gamma:g}", train.focal_gamma > 0),
    ):
        if given and not objective.has_classes:
            problems.append(
                f"{flag} is for classes and tags, and --task {config.task} learns none here. "
                "Drop it."
            )
    if problems:
        raise ConfigError(problems)


def _read_weights(wish: Mapping[str, float], names: Sequence[str]) -> tuple[float, ...]:
    """Return the weights of `names`, 1 where none is given."""
    unknown = [name for name in wish if name not in names]
    if unknown:
        raise ConfigError(
            f"--class-weights: no class is called {listing(map(repr, unknown))}."
            f"{did_you_mean(unknown[0], names)} Classes here: {listing(names, 20)}."
        )
    return tuple(wish.get(name, 1.0) for name in names)


def _describe(weights: Mapping[str, float]) -> str:
    """Return the weights in a line: all of a few, or the least and the greatest of many."""
    ordered = sorted(weights.items(), key=lambda item: item[1])
    parts = [f"{name} {weight:.3g}" for name, weight in ordered]
    if len(parts) <= _SHOWN:
        return ", ".join(f"{name} {weight:.3g}" for name, weight in weights.items())
    half = _SHOWN // 2
    return f"{', '.join(parts[:half])} … {', '.join(parts[-half:])}: {len(parts)} classes"
