"""Generate the tables of docs/which-method.md from results of `ftlevel compare`.

A file of docs/compared is the `compare.json` of a comparison with added `title`, `about` and
`command`.
"""

from __future__ import annotations

import json
from typing import Any

from page_parts import DOCS, fill

ORDER = ("senses", "entities", "definitions")


def which_method_page() -> str:
    """Return docs/which-method.md."""
    paths = [DOCS / "compared" / f"{name}.json" for name in ORDER]
    tables = [_table(json.loads(path.read_text("utf-8"))) for path in paths if path.is_file()]
    return fill("which-method", {"comparisons": "".join(tables)})


def _table(comparison: dict[str, Any]) -> str:
    name = comparison["headline"]
    lines = [
        "", f"### {comparison['title']}", "", comparison["about"], "",
        "<!-- not run: takes minutes; output in docs/compared -->",
        "```sh", comparison["asked_by"], "```", "",
        f"| method | {name} | 95 % over rows | ± seeds | to the best | more than noise | trained | adapter "
        "| peak MiB |",
        "|---|--:|---|--:|--:|---|--:|--:|--:|",
        *map(_line, comparison["rows"]),
    ]  # fmt: skip
    for skipped in comparison["left_out"]:
        lines.append(f"| {skipped['method']} | – | {skipped['reason']} | | | | | | |")
    return "\n".join([*lines, ""])


def _line(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    spread = "?" if len(row["seeds"]) < 2 else f"{row['spread']:.3f}"
    significance = {None: "", True: "no", False: "yes"}[row["is_noise"]]
    return (
        f"| [{row['method']}](guide/{row['method']}.md) | {row['metric']:.3f} | {low:.3f} – {high:.3f} "
        f"| {spread} | {row['difference']:+.3f} | {significance} | {row['trained']:,} "
        f"| {row['adapter_bytes'] / 2**20:.1f} MiB | {row['peak_bytes'] / 2**20:,.0f} |"
    )
