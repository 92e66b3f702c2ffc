"""The README of a merged model: what it is made of, onto what, and how it was checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlevel.artifacts.cards import generate_command, pipeline_tag
from ftlevel.config import QuantConfig


def write_merge_readme(summary: Mapping[str, Any], task: str) -> str:
    """Return the model card of a merged model.

    Args:
        summary: what `merge` gave.
        task: as in `--task`.
    """
    base = summary["base"]
    lines = [
        "---",
        f"base_model: {base['name']}",
        "library_name: transformers",
        f"tags: [ftlevel, merged, {summary['method']}]",
        f"pipeline_tag: {pipeline_tag(task)}",
        "---",
        "",
        f"# {summary['out'].rstrip('/').rpartition('/')[2]}",
        "",
        f"`{base['name']}` with {' and '.join(f'`{name}`' for name in summary['adapters'])} "
        f"({summary['method']}) merged into its weights by ftlevel "
        f"{summary['versions'].get('ftlevel', '')}, in {summary['written']['dtype']}.",
        "",
    ]
    if summary["onto"] == "dequantized":
        lines += ["The adapter was trained on a quantized base; it is merged into the weights that "
                  "quantizing and dequantizing gives, which are those that it was trained on.",
                  ""]  # fmt: skip
    if summary.get("quantization"):
        lines += [*_low_bits_lines(QuantConfig(**summary["quantization"]).form,
                                   summary["served"]), ""]  # fmt: skip
    if summary["reason"]:
        lines += [f"These weights were taken because they are {summary['reason']}.", ""]
    if summary["written"]["untied"]:
        lines += ["The output layer has weights of its own, which it shared with the embedding "
                  "before: the adapter changed one of them.", ""]  # fmt: skip
    lines += _check_lines(summary.get("agreement"))
    lines += ["## Use", "", "```sh", generate_command(summary["out"], task), "```", ""]
    return "\n".join(lines)


def how_near(found: Mapping[str, Any]) -> str:
    """Return how near a model is to the one that it is compared with (`Agreement`), in words."""
    apart = f"{found['mean_difference']:.2g} on average"
    return apart if found["kl"] is None else (
        f"{apart}, KL {found['kl']:.2g}, top-1 {found['top1']:.1%}"
    )  # fmt: skip


def _low_bits_lines(form: str, served: Mapping[str, Any] | None) -> list[str]:
    lines = [f"Its linears are stored in {form}, which transformers loads with bitsandbytes."]
    if served is not None:
        lines.append(
            f"Loaded so, it is this near to the model as trained: {how_near(served)} over "
            f"{served['targets']:,} targets, loss {served['loss']:.4f} (as trained "
            f"{served['loss_reference']:.4f}). The table below is of the same weights before they "
            "were rounded."
        )
    return lines


def _check_lines(agreement: Mapping[str, Any] | None) -> list[str]:
    if agreement is None:
        return ["**Not verified**: it was written with `--no-verify` and has not been compared "
                "with the base and the adapter.", ""]  # fmt: skip
    return [
        f"Loaded afresh and compared with the base and the adapter on {agreement['targets']:,} "
        "targets:",
        "",
        "| how near | max logit difference | mean | loss | loss before merging |",
        "|---|--:|--:|--:|--:|",
        f"| {how_near(agreement)} | "
        f"{agreement['max_difference']:.3g} | {agreement['mean_difference']:.2g} | "
        f"{agreement['loss']:.4f} | {agreement['loss_reference']:.4f} |",
        "",
    ]
