"""A run's config.yaml and adapter card, and warnings about its results."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlevel._version import __version__
from ftlevel.artifacts.cards import AdapterCard, library_versions
from ftlevel.artifacts.files import base_fingerprint
from ftlevel.artifacts.paths import make_paths_absolute, relative_path
from ftlevel.methods import needs_import
from ftlevel.models.quantization import get_quantization_config, get_quantization_info
from ftlevel.models.sources import ModelSource
from ftlevel.trained.generation import save_stop_ids
from ftlevel.training.plan.run import Run

_MAX_ROWS = 10_000  # training rows used for label frequencies
_WINDOW = 3  # minimal number of logged losses in a mean
_MARGIN = 0.02  # relative margin below the loss of guessing by label frequency
_MAX_RATE_FACTOR = 2  # multiple of the default learning rate that is considered too high


def dump_config(run: Run) -> str:
    """Returns the text of config.yaml: the full configuration with all resolved values.

    Output directory and Hub repository are omitted and local paths are absolute, so `ftlevel train
    RUN/config.yaml` starts a new run from any directory.
    """
    import yaml

    values = make_paths_absolute(resolved_config(run))
    for name in ("dir", "overwrite", "resume", "allow_change", "push_to_hub", "hub_private"):
        del values["output"][name]
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# Written by ftlevel {__version__}. Train it again: ftlevel train THIS_FILE\n{body}"


def resolved_config(run: Run) -> dict[str, Any]:
    """Returns the configuration as JSON values, with `auto` replaced by the resolved values."""
    values = run.config.model_dump(mode="json")
    values["model"] |= {"dtype": run.model.dtype, "device": run.model.device}
    values["data"]["max_length"] = run.data.max_length
    values["data"]["overlong"] = run.data.info["overlong"]  # auto may have dropped rows
    values["train"]["learning_rate"] = run.schedule.learning_rate
    head = run.schedule.head_learning_rate
    has_head_rate = head != run.schedule.learning_rate
    values["train"]["head_learning_rate"] = head if has_head_rate else None
    if run.config.quant.kind != "4bit":
        values["quant"] = {"kind": run.config.quant.kind}
    return values


def get_base_values(source: ModelSource) -> dict[str, Any]:
    """Returns the name, kind, revision and fingerprint of a base model."""
    path, revision = source.path, source.revision
    name = source.name if source.kind in ("hub", "builtin") or path is None else str(path.resolve())
    if path is None and (path := _cached_snapshot(source)) is not None:
        revision = path.name  # snapshot directories are named by commit
    return {
        "name": name,
        "kind": source.kind,
        "revision": revision,
        "fingerprint": base_fingerprint(path) if path is not None else None,
    }


def _cached_snapshot(source: ModelSource) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "model.safetensors.index.json"):
        path = try_to_load_from_cache(source.location, name, revision=source.revision or "main")
        if isinstance(path, str):
            return Path(path).parent
    return None


_CARD_DATA = ("name", "train_rows", "fingerprint", "validation_fingerprint")


def create_card(run: Run, base: Mapping[str, Any]) -> AdapterCard:
    """Returns the card (ftlevel.json) that is saved with the adapter."""
    quantization_config = get_quantization_config(run.model.config)
    return AdapterCard(
        method=run.config.method.kind,
        task=run.task.name,
        base=base,
        quantization=run.model.quant.facts
        if quantization_config is None
        else get_quantization_info(quantization_config),
        dtype=run.model.dtype,
        max_length=run.data.max_length,
        prompt=run.data.prompt_format.to_dict() if run.data.prompt_format else {},
        labels=run.data.info["labels"],
        options=run.task.inference_config(run.config.data, run.data.info),
        heads=list(run.model.heads),
        data={
            **{k: run.data.info.get(k) for k in _CARD_DATA},
            "columns": run.config.data.columns,
            "overlong": run.config.data.overlong,
        },
        needs_import=needs_import(run.config.method),
        adapter=run.adapter.describe() if run.adapter else {},
        versions=library_versions(),
    )


def save_tokenizer_and_card(
    save_dir: Path,
    run: Run,
    base: Mapping[str, Any],
    final_dir: Path | None = None,
) -> None:
    """Save tokenizer, card and the task's files next to the weights in `save_dir`.

    A local base path
    is stored relative to `final_dir`, to which `save_dir` is moved later.
    """
    run.hooks.save_files(run, save_dir)
    run.model.tokenizer.save_pretrained(str(save_dir))
    save_stop_ids(save_dir, run.model.tokenizer)
    is_local = base["kind"] in ("directory", "gguf")
    path = relative_path(Path(base["name"]), final_dir or save_dir) if is_local else ""
    card = create_card(run, {**base, "path": path} if path else base)
    card.write(save_dir)
    run.task.write_files(save_dir, run.model.config, card.options)


def summarize_losses(losses: Sequence[float]) -> dict[str, Any]:
    """Returns means and standard deviations of the first and last losses, for summary.json.

    Each is over a tenth of the losses, at least min(5, half). One loss has no deviation (None).
    """
    if not losses:
        return {"loss_first": None, "loss_last": None, "loss_window": 0}
    window = max(math.ceil(len(losses) / 10), min(5, len(losses) // 2), 1)
    windows = {"first": losses[:window], "last": losses[-window:]}
    means = {f"loss_{end}": statistics.fmean(part) for end, part in windows.items()}
    spreads = {
        f"loss_{end}_spread": statistics.stdev(part) if window > 1 else None
        for end, part in windows.items()
    }
    return {**means, **spreads, "loss_window": window}


def warn_if_worse(summary: Mapping[str, Any]) -> list[str]:
    """Returns a warning if the evaluation before training beats all later ones; else nothing."""
    best, initial = summary["best"], summary["metrics_before"]
    name = best["metric"].removeprefix("eval_") if best else ""
    if not best or name not in initial:
        return []
    gain = best["best"] - initial[name]
    if (gain if best["greater_is_better"] else -gain) >= 0:
        return []
    return [
        f"before the first step {best['metric']} was {initial[name]:.4f}, and no evaluation after "
        f"it was as good: the best had {best['best']:.4f}. Try a lower --learning-rate, or other "
        "rows."
    ]


def warn_if_not_learned(summary: Mapping[str, Any], run: Run) -> list[str]:
    """Returns a warning if the loss did not fall; none for runs too short to judge.

    The loss on classes, tags and spans must end 2 % below the loss of guessing label frequencies.
    """
    window = summary["loss_window"]
    if window < _WINDOW or run.objective.samples:  # its loss measures nothing
        return []
    first, last = summary["loss_first"], summary["loss_last"]
    rows = itertools.islice(run.data.train, _MAX_ROWS)
    guess_loss = run.objective.guess_loss(list(rows)) if not run.loss.is_weighted else None
    if last < (first if guess_loss is None else guess_loss * (1 - _MARGIN)):
        return []
    text = f"the loss ended at {last:.3f} (mean of the last {window} that were logged)"
    than = (
        f"and began at {first:.3f}"
        if guess_loss is None
        else f"and guessing by answer frequency gives {guess_loss:.3f}"
    )
    rate, default = run.schedule.learning_rate, run.schedule.default_learning_rate
    is_increased = last > first + (summary["loss_first_spread"] or 0)
    suggestion = "a lower" if is_increased or rate > _MAX_RATE_FACTOR * default else "a higher"
    default_text = f" ({default:g} is the default here)" if rate != default else ""
    return [
        f"{text}, {than}: nothing was learned. Try {suggestion} --learning-rate than {rate:g}"
        f"{default_text}, or train longer (--num-train-epochs, --max-steps)."
    ]
