"""Sentences of the report: the result of a run, its data, and what was verified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Summary = Mapping[str, Any]

_MEANINGS = {
    "accuracy": "share of rows with the right answer",
    "exact_match": "share of rows whose answer equals the correct one",
    "f1": "balance of precision and recall, from 0 to 1",
    "macro_f1": "balance of precision and recall, averaged over classes, from 0 to 1",
    "mcc": "correlation of predicted and true classes, from -1 to 1",
    "pearson": "correlation of predicted and true values, from -1 to 1",
    "spearman": "correlation of the ranks of predicted and true values, from -1 to 1",
    "loss": "mean negative log-likelihood of the correct answers; lower is better",
    "perplexity": "number of equally likely tokens the model hesitates between; lower is better",
    "pseudo_perplexity": "number of equally likely words for a hidden one; lower is better",
    "rougeL": "overlap of generated and correct text, from 0 to 1",
    "bleu": "overlap of generated and correct text, from 0 to 100",
    "chrf": "overlap of characters of generated and correct text, from 0 to 100",
    "ndcg@10": "quality of the first ten search results, from 0 to 1",
    "average_precision": "precision averaged over recall, from 0 to 1",
    "reward": "mean reward of a completion",
}
"""Metric → its meaning for readers who do not know it."""


def headline(summary: Summary) -> Iterator[str]:
    """Yield the result in a sentence, and sentences that explain it."""
    data, metrics = summary.get("data", {}), summary.get("metrics", {})
    name, rows = summary.get("headline", "loss"), data.get("validation_rows")
    name = name if name in metrics else "loss"
    if name not in metrics or not rows:
        first, last = summary.get("loss_first"), summary.get("loss_last", 0.0)
        moved = f"Training loss {_figure(last)}, at the start {_figure(first)}. " if first else ""
        yield f"{moved}No held-out rows: the quality on new rows is not known."
        return
    value, before = metrics[name], summary.get("metrics_before", {}).get(name)
    ends = summary.get("intervals", {}).get(name)
    ends = ends if ends and ends[0] < ends[1] else None  # equal ends: all rows have one value
    start = "before this run" if summary.get("adapter") else "base"
    yield (
        f"{name.replace('_', ' ')} {_figure(value)} on {rows:,} held-out rows"
        + (f", {start} {_figure(before)}" if before is not None else "")
        + (f"; 95 % interval {_figure(ends[0])} to {_figure(ends[1])}" if ends else "")
    )
    if name in _MEANINGS:
        yield f"{name.replace('_', ' ')}: {_MEANINGS[name]}."
    if ends:
        yield "With many more rows like these, the value would likely lie in the interval."
    if before is None:
        yield "The model was not evaluated before training; --eval-on-start does that."
    elif ends:
        within = ends[0] <= before <= ends[1]
        yield (
            f"The value before training lies {'inside' if within else 'outside'} the interval: "
            + ("the difference may be chance." if within else "a real change is likely.")
        )


def _figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def data_findings(summary: Summary) -> Iterator[str]:
    """Yield what the data checks found, and what happened to rows that did not fit."""
    data = summary.get("data", {})
    for found in data.get("gate") or ():
        places = ", ".join(found.get("places", ()))
        yield (
            f"{found['title']}: {found['count']:,} of {found['total']:,} {found['split']} rows "
            f"({places}); action: {found['action']}"
        )
    for key, action in (
        ("dropped", "dropped"),
        ("shortened", "shortened to the maximum length"),
        ("validation_dropped", "dropped from validation"),
    ):
        if count := data.get(key):
            yield f"{count:,} rows {action}"


def checks(summary: Summary) -> Iterator[str]:
    """Yield what was verified, one sentence for each check."""
    proof, verified = summary.get("proof", {}), summary.get("speed", {}).get("verified")
    if count := proof.get("gradient_tensors"):
        idle = proof.get("idle_tensors", 0)
        yield (
            f"Every trained tensor received gradients ({count:,} tensors)."
            if not idle
            else (f"{count:,} trained tensors received gradients, {idle:,} did not.")
        )
    if count := proof.get("frozen_tensors"):
        yield f"The {count:,} frozen tensors of the base model did not change, bit for bit."
    if (apart := proof.get("reload_difference")) is not None:
        yield (
            f"The saved files were loaded again and compared on {proof.get('probe_rows')} rows: "
            + ("outputs are equal." if not apart else f"logits differ by at most {apart:.2g}.")
        )
    if (effect := proof.get("adapter_effect")) is not None:
        yield f"Training changed the outputs: logits moved by up to {effect:.3g}."
    if verified and verified.get("loss") is not None:
        yield (
            f"The fast training step was compared with the plain one on {verified['rows']} rows in "
            f"{verified['dtype']}: the loss differs by {verified['loss']:.1e}, gradients by "
            f"{verified['gradient']:.1e} (relative)."
        )
    if left_out := len(summary.get("left_out") or ()):
        yield f"{left_out:,} steps were left out, because the loss was not finite or spiked."
