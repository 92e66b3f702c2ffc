"""Contents of a run's config.yaml, summary.json and adapter card."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftlevel._version import __version__
from ftlevel.artifacts.cards import AdapterCard, library_versions
from ftlevel.artifacts.files import base_fingerprint
from ftlevel.artifacts.paths import make_paths_absolute
from ftlevel.evaluation.scoring import Evaluator
from ftlevel.fast.likelihoods import base_model
from ftlevel.methods import needs_import
from ftlevel.models.hardware import peak_memory_bytes
from ftlevel.models.quantization import get_quantization_config, get_quantization_info
from ftlevel.models.sources import ModelSource
from ftlevel.trained.generation import added_stops
from ftlevel.training.best import PredictionRecorder, SelectedModel
from ftlevel.training.plan.run import Run, count_parameters
from ftlevel.training.proof import Proof

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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of training for summary.json, which `Run` does not contain.

    Attributes:
        steps: optimizer steps that were trained.
        timings: durations in seconds.
        evaluator: evaluator of the validation rows; None if there are none.
        changes: settings that changed when the run resumed.
        skipped_steps: records of steps that were skipped or rolled back.
        plan: the memory estimate compared with the measured memory.
    """

    run: Path
    recipe: Mapping[str, Any] | None
    base: Mapping[str, Any]
    model: Any
    records: Sequence[Mapping[str, Any]]
    proof: Proof
    steps: int
    timings: Mapping[str, float]
    evaluator: Evaluator | None
    answers: PredictionRecorder
    speed: Mapping[str, Any]
    selected: SelectedModel | None
    changes: Sequence[Mapping[str, Any]]
    skipped_steps: Sequence[Mapping[str, Any]]
    plan: Mapping[str, Any]


def create_summary(run: Run, outcome: Outcome) -> dict[str, Any]:
    """Returns the contents of summary.json: times in seconds, memory in bytes, loss in nats."""
    model, records = outcome.model, outcome.records
    trainable, total = count_parameters(model)
    scores = [record for record in records if any(k.startswith("eval_") for k in record)]
    first = scores[0] if scores and scores[0]["step"] == 0 else {}
    last = scores[-1] if scores and scores[-1]["step"] > 0 else {}
    generated = outcome.evaluator.generated_rows if outcome.evaluator else 0
    best = outcome.selected
    selected = last if best is None else next(r for r in reversed(scores) if r["step"] == best.step)
    return {
        "run": str(outcome.run),
        "recipe": outcome.recipe,
        "task": run.task.name,
        "headline": run.objective.headline,
        "method": run.config.method.kind,
        "model": {**outcome.base, "type": run.model.family},
        "adapter": run.adapter.describe() if run.adapter else None,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "class_weights": _class_weights(run),
        "data": {**run.data.info, "generated_rows": generated},
        "stops": _added_stops(run, model),
        "steps": outcome.steps,
        "planned_steps": run.schedule.steps,
        **summarize_losses([record["loss"] for record in records if "loss" in record]),
        "metrics_before": _scores(first),
        "metrics": _scores(selected),
        "metrics_last": _scores(last),
        "best": None if best is None else best.describe(),
        "proof": asdict(outcome.proof),
        "timings": dict(outcome.timings),
        "speed": dict(outcome.speed),
        "memory": {"peak_bytes": peak_memory_bytes(run.model.device)},
        "plan": dict(outcome.plan),
        "choices": [
            {"name": c.name, "value": str(c.value), "reason": c.reason} for c in run.choices
        ],
        "versions": library_versions(),
        "changed_on_resume": list(outcome.changes),
        "left_out": list(outcome.skipped_steps),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _added_stops(run: Run, model: Any) -> dict[str, int]:
    if not run.task.generates_text:
        return {}
    return added_stops(base_model(model).generation_config.eos_token_id, run.model.tokenizer)


def _class_weights(run: Run) -> dict[str, float]:
    weights = run.loss.class_weights
    return dict(zip(run.data.info["labels"], weights, strict=True)) if weights else {}


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    return {k.removeprefix("eval_"): v for k, v in record.items() if k.startswith("eval_")}


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
