"""The README of an exported adapter: what it is, what was changed, and how it is served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftlevel.merging.serving.start import check_command


def write_card(place: Path, summary: Mapping[str, Any]) -> None:
    """Write README.md of what `summary` says was written."""
    names = [adapter["name"] for adapter in summary["adapters"]]
    lines = [
        "---",
        f"base_model: {summary['base']}",
        "library_name: peft",
        "tags: [ftlevel, lora]",
        "---",
        "",
        f"# {', '.join(names)}",
        "",
        f"Plain LoRA on `{summary['base']}`, written by ftlevel "
        f"{summary['versions'].get('ftlevel', '')} from `{summary['model']}`: the scale is in B, "
        "alpha is the rank of every module, so a reader that forgets a scale or a pattern is "
        "right.",
        "",
    ]
    for adapter in summary["adapters"]:
        lines += [f"- **{adapter['name']}** ({adapter['method']}): rank {adapter['rank']}, "
                  f"{adapter['modules']:,} modules", *(f"  - {said}" for said in
                                                        adapter["changes"])]  # fmt: skip
        if (check := adapter["check"]) is not None:
            lines.append(
                f"  - read back: logits within {check['max_difference']:.2g} of the run's (largest "
                f"{check['largest_logit']:.3g}; the adapter moves them by {check['effect']:.2g})"
            )
    lines.append("")
    lines += [f"{note}.\n" for note in summary["notes"]]
    lines += serving_lines(summary)
    (place / "README.md").write_text("\n".join(lines), encoding="utf-8")


def serving_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return how it is served and checked, in Markdown; nothing where no server was named."""
    if not summary["start"]:
        return []
    lines = ["## Serve", "", "```sh", *summary["start"], "```", ""]
    if summary.get("recorded", summary["verified"]):
        lines += ["What it must answer is in served.json; what serves it is held to that by", "",
                  "```sh", check_command(summary), "```", ""]  # fmt: skip
    return lines
