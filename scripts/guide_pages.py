"""Generate the tables of docs/guide from the table of methods: pages, and a table of rare ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ftlevel.config import SPECS
from ftlevel.methods import METHOD_INFO, METHODS, RULES
from page_parts import fill

_HIDDEN = {"kind", "target_modules"}
RARE = ("oft", "boft", "loha", "lokr", "miss", "shira", "hira", "gralora", "c3a")
"""Methods that are rows of docs/guide/rare.md instead of pages."""


def guide_pages() -> dict[str, Callable[[], str]]:
    """Return page name → function that returns its text."""
    return {
        "guide/index": _index,
        **{f"guide/{kind}": partial(_page, kind) for kind in SPECS if kind not in RARE},
        "guide/rare": _rare,
    }


def _index() -> str:
    pages = [f"[{kind}]({kind}.md)" for kind in SPECS if kind not in RARE]
    return fill("guide/index", {"methods": f"{', '.join(pages)}; [rare ones](rare.md)"})


def _share(parameters: int) -> str:
    return f"{parameters / METHOD_INFO['full'].llama_7b:.3%}" if parameters else "–"


def _page(kind: str) -> str:
    row = METHOD_INFO[kind]
    lines = [
        f"- Parameters on Llama-2-7B: {row.llama_7b:,}",
        f"- Published: {row.reference}",
        f"- Settings: {_settings(kind)}",
        f"- [Learning rate](../defaults.md), short to long runs: {_rates(kind)}",
        "",
        *_variants(kind),
        *_limits(kind),
    ]
    new = f"# {kind}\n\n<!--generated:facts-->\n<!--/generated-->\n"
    return fill(f"guide/{kind}", {"facts": "\n".join(lines)}, new)


def _rare() -> str:
    header = (
        "| method | settings | [default rate](../defaults.md), short to long runs | published |"
    )
    rows = [
        f"| {kind} | {_settings(kind)} | {_rates(kind)} | {METHOD_INFO[kind].reference} |"
        for kind in RARE
    ]
    facts = "\n".join([header, "|---|---|---|---|", *rows, "", *_limits(*RARE)])
    return fill("guide/rare", {"facts": facts})


def _settings(kind: str) -> str:
    fields = SPECS[kind]().model_dump(exclude=_HIDDEN)
    shown = [f"`{name}` {value}" for name, value in fields.items() if value not in (None, {}, [])]
    return ", ".join(shown) or "–"


def _rates(kind: str) -> str:
    rates = METHODS[kind].rates(SPECS[kind]())
    kinds = ", ".join(
        f"{name}s {rate:g}" for name, rate in rates.by_architecture.items() if rate != rates.small
    )
    return f"{rates.small:g}{f' ({kinds})' if kinds else ''} to {rates.large:g} ({rates.source})"


def _variants(kind: str) -> Iterator[str]:
    forms = [row for row in METHOD_INFO.values() if row.method == kind and row.name != kind]
    if not forms:
        return
    yield from (
        "## Variants",
        "",
        "[What each trains](../methods.md#what-each-trains), and papers:",
        "",
    )
    yield "; ".join(f"{row.name}: {row.reference}" for row in forms) + "."
    yield ""


def _limits(*kinds: str) -> Iterator[str]:
    names = {row.name for row in METHOD_INFO.values() if row.method in kinds}
    rules = [rule for rule in RULES if rule.rows & names]
    if not rules:
        return
    yield from ("## Not supported", "", "| | | reason | alternative |", "|---|---|---|---|")
    for rule in rules:
        methods = ", ".join(name for name in METHOD_INFO if name in rule.rows & names)
        yield f"| {methods} | {rule.condition} | {rule.why} | {rule.instead} |"
    yield ""
