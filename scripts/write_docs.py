"""Generate the pages of docs/ that describe commands, flags, methods and servers.

python scripts/write_docs.py methods          write docs/methods.md
python scripts/write_docs.py cli              write docs/cli.md and docs/commands
python scripts/write_docs.py which-method     write docs/which-method.md, from results of compare
python scripts/write_docs.py guide            write docs/guide, one page per method
python scripts/write_docs.py coming-from      write docs/coming-from.md
python scripts/write_docs.py serving          write docs/serving.md, from measurements
python scripts/write_docs.py --check          exit with 1 if a page is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence

from cli_page import cli_page, command_pages
from coming_from_page import coming_from_page
from ftlevel.commands.list_methods import QUANTS, get_task_error
from ftlevel.config import SPECS
from ftlevel.methods import METHOD_INFO, METHODS, get_rule
from ftlevel.methods.support_table import Cell, MethodInfo
from ftlevel.models.families import FAMILIES, Family
from ftlevel.tasks import TASKS
from guide_pages import guide_pages
from page_parts import DOCS, fill
from serving_page import serving_page
from which_method_page import which_method_page

_LETTERS = {"none": "f", "4bit": "4", "8bit": "8"}


def methods_page() -> str:
    """Return docs/methods.md."""
    rows = list(METHOD_INFO.values())
    head = ["| method | trains | 7B Llama |", "|---|---|---:|"]
    separate = ", ".join(row.name for row in rows if not row.merges)
    pages = {kind: METHODS[kind].page for kind in SPECS if METHODS[kind].page}
    parts = {
        "methods": [*head, *map(_method_line, rows), "", f"Not mergeable: {separate}."],
        "notes": [line for kind, page in pages.items() for line in (f"## {kind}", "", page, "")],
        "bases": _grouped_table(
            "methods", {row.name: [_quants(row, f) for f in FAMILIES.values()] for row in rows}
        ),
        "tasks": _grouped_table(
            "tasks",
            {
                task: ["no" if get_task_error(f, task) else "yes" for f in FAMILIES.values()]
                for task in TASKS
            },
        ),
    }
    return fill("methods", {name: "\n".join(lines) for name, lines in parts.items()})


def _method_line(row: MethodInfo) -> str:
    share = f"{row.llama_7b / METHOD_INFO['full'].llama_7b:.3%}" if row.llama_7b else "–"
    name = row.name if row.flags == f"--method {row.name}" else f"{row.name}: `{row.flags}`"
    return f"| {name} | {row.trained} | {share} |"


def _grouped_table(label: str, answers: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a table of name → answer per family; equal rows and equal columns are merged."""
    families: dict[tuple[str, ...], list[str]] = {}
    for family, column in zip(FAMILIES, zip(*answers.values(), strict=True), strict=True):
        families.setdefault(column, []).append(family)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, cells in zip(answers, zip(*families, strict=True), strict=True):
        groups.setdefault(cells, []).append(name)
    lines = [
        f"| {label} | {' | '.join(map(', '.join, families.values()))} |",
        "|---|" + "---|" * len(families),
    ]
    return lines + [f"| {', '.join(g)} | {' | '.join(cells)} |" for cells, g in groups.items()]


def _quants(row: MethodInfo, family: Family) -> str:
    """Return the quantizations with which `row` works for some task of `family`."""
    works = [
        quant
        for quant in QUANTS
        if get_rule(
            Cell(row.name, family.name, family.kind, None, quant, bool(family.target_parameters))
        )
        is None
    ]
    return "yes" if len(works) == len(QUANTS) else "".join(_LETTERS[q] for q in works) or "no"


PAGES: dict[str, Callable[[], str]] = {
    "methods": methods_page,
    "cli": cli_page,
    "coming-from": coming_from_page,
    "serving": serving_page,
    "which-method": which_method_page,
    **command_pages(),
    **guide_pages(),
}


def _select_pages(names: list[str]) -> list[str]:
    """Return the selected pages: `cli` includes commands/, and `guide` all of guide/.

    Raises:
        SystemExit: there is no such page.
    """
    folders = {"cli": "commands/", "guide": "guide/"}
    pages = [
        page
        for name in names
        for page in PAGES
        if page == name or (name in folders and page.startswith(folders[name]))
    ]
    if unknown := [name for name in names if name not in PAGES and name not in folders]:
        raise SystemExit(f"no such page: {unknown[0]}. There are {', '.join(PAGES)}")
    return pages or list(PAGES)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the selected pages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="all by default; cli is all of it")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    stale = 0
    for name in _select_pages(args.pages):
        path, text = DOCS / f"{name}.md", PAGES[name]()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale += 1
        if args.check:
            print(f"{path} is not up to date: python scripts/write_docs.py {name}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return int(args.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
