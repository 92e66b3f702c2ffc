"""Write the pages of docs/ that come from the program itself.

python scripts/write_docs.py methods          write docs/methods.md
python scripts/write_docs.py cli              write docs/cli.md
python scripts/write_docs.py coming-from      write docs/coming-from.md
python scripts/write_docs.py --check          exit with 1 where a page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from cli_page import cli_page
from coming_from_page import coming_from_page
from ftlevel.commands.list_methods import QUANTS, task_refusal
from ftlevel.config import SPECS
from ftlevel.methods import METHODS
from ftlevel.methods.facts import Cell, MethodFacts
from ftlevel.methods.matrix import FACTS, RULES, find_refusal, known_rows
from ftlevel.models.families import FAMILIES
from ftlevel.models.families.facts import Family
from ftlevel.tasks import TASKS

DOCS = Path(__file__).resolve().parents[1] / "docs"
_LETTERS = {"none": "f", "4bit": "4", "8bit": "8"}
_HIDDEN = {"kind", "target_modules"}


def methods_page() -> str:
    """Return docs/methods.md."""
    rows = known_rows(SPECS)
    lines = [
        "# Methods",
        "",
        "Written by `python scripts/write_docs.py methods` from the table by which `ftlevel train` "
        "refuses what",
        "cannot work. `ftlevel list-methods` shows it for one model, task or quantization. Every "
        "cell that says",
        "yes has been trained, saved and loaded anew in a tiny model by `make matrix`.",
        "",
        "## What each trains",
        "",
        "The share is of Llama-2-7B's 6.7 billion parameters, with the defaults.",
        "",
        "| method | asked for by | trains | 7B Llama | merges | paper |",
        "|---|---|---|---:|---|---|",
        *(_facts_line(row) for row in rows),
        "",
        "## Defaults",
        "",
        "| method | settings | learning rate |",
        "|---|---|---:|",
        *(_defaults_line(kind) for kind in SPECS),
        "",
        "The learning rate is linear to zero. Without `--target-modules`, low-rank and orthogonal",
        "methods adapt every linear of the blocks.",
        "",
        "## Families and quantized bases",
        "",
        "`yes` is with and without `--quant`; else `f` is a float base, `4` is `--quant 4bit`, `8` "
        "is `--quant 8bit`.",
        "",
        *_family_table(rows),
        "",
        "## Families and tasks",
        "",
        *_task_table(),
        "",
        "## Why not",
        "",
        "| method | not | because | instead |",
        "|---|---|---|---|",
        *_rule_lines(),
    ]
    return "\n".join(lines) + "\n"


def _facts_line(row: MethodFacts) -> str:
    share = f"{row.llama_7b / FACTS['full'].llama_7b:.3%}" if row.llama_7b else "–"
    merges = row.merges or "no"
    return f"| {row.name} | `{row.flags}` | {row.trains} | {share} | {merges} | {row.paper} |"


def _defaults_line(kind: str) -> str:
    spec = SPECS[kind]()
    fields = spec.model_dump(exclude=_HIDDEN)
    shown = [f"{name} {value}" for name, value in fields.items() if value not in (None, {}, [])]
    return f"| {kind} | {', '.join(shown) or '–'} | {METHODS[kind].learning_rate(spec):g} |"


def _family_table(rows: list[MethodFacts]) -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        answers = tuple(_quants(row, family) for row in rows)
        groups.setdefault(answers, []).append(family.name)
    lines = [
        "| families | " + " | ".join(row.name for row in rows) + " |",
        "|---|" + "---|" * len(rows),
    ]
    return lines + [f"| {', '.join(f)} | {' | '.join(answers)} |" for answers, f in groups.items()]


def _quants(row: MethodFacts, family: Family) -> str:
    """Return on which bases `row` works for some task of `family`."""
    works = [
        quant
        for quant in QUANTS
        if find_refusal(
            Cell(row.name, family.name, family.kind, None, quant, bool(family.target_parameters))
        )
        is None
    ]
    return "yes" if len(works) == len(QUANTS) else "".join(_LETTERS[q] for q in works) or "no"


def _task_table() -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES.values():
        answers = tuple("no" if task_refusal(family, task) else "yes" for task in TASKS)
        groups.setdefault(answers, []).append(family.name)
    lines = ["| families | " + " | ".join(TASKS) + " |", "|---|" + "---|" * len(TASKS)]
    return lines + [f"| {', '.join(f)} | {' | '.join(answers)} |" for answers, f in groups.items()]


def _rule_lines() -> list[str]:
    known = {row.name for row in known_rows(SPECS)}
    return [
        f"| {', '.join(name for name in FACTS if name in rule.rows)} | {rule.where} | {rule.why} "
        f"| {rule.instead} |"
        for rule in RULES
        if rule.rows & known
    ]


PAGES: dict[str, Callable[[], str]] = {
    "methods": methods_page,
    "cli": cli_page,
    "coming-from": coming_from_page,
}


def main(arguments: list[str] | None = None) -> int:
    """Write the pages that were named, or check all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", choices=[*PAGES, []], help="all by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    wish = parser.parse_args(arguments)
    stale = 0
    for name in wish.pages or PAGES:
        path, text = DOCS / f"{name}.md", PAGES[name]()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if wish.check:
            print(f"{path} is not up to date: python scripts/write_docs.py {name}")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return int(wish.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
