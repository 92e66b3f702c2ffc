"""Generate the tables of docs/serving.md: servers, methods and measured differences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftlevel.extras.serving.config import SERVERS, Server
from page_parts import fill, read_csv

_FORMS = {"as PEFT saves it": "as PEFT saves it", "normal form": "plain LoRA"}

_HEAD = (
    "`--for`",
    "formats (first is the default)",
    "several adapters",
    "LoRA on embeddings and heads",
    "version",
    "tested",
)


def serving_page() -> str:
    """Return docs/serving.md."""
    forms = ("adapters", "plain LoRA computed from", "mergeable", "largest difference")
    servers = [
        *_table(_HEAD, [_server_row(server) for server in SERVERS.values()]),
        "",
        *(f"- {server.note}." for server in SERVERS.values() if server.note),
    ]
    measured = read_csv("served.csv")
    versions = ", ".join(dict.fromkeys(row["version"] for row in measured))
    parts = {
        "servers": servers,
        "versions": [f"{versions}; {', '.join(sorted({row['date'] for row in measured}))}."],
        "in-servers": _served_table(measured),
        "plain-LoRA": _table(forms, _form_rows()),
    }
    return fill("serving", {name: "\n".join(lines) for name, lines in parts.items()})


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]


def _server_row(server: Server) -> list[str]:
    return [
        f"`{server.name}`",
        ", ".join(f"`{name}`" for name in server.formats),
        "yes" if server.several else "no",
        "as trained" if server.vocabulary else "refused",
        f"{server.title} {server.version}",
        server.source,
    ]


_COMPUTATIONS = {"its file": "saved tensors", "the probe": "outputs of its layers"}
"""`way` of normal_forms.csv → text of the page."""


def _form_rows() -> list[list[str]]:
    """Return a row for each computation and mergeability, with adapters and largest difference."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in read_csv("normal_forms.csv"):
        if row["rank"]:
            groups.setdefault((row["way"], row["merges"]), []).append(row)
    return [
        [", ".join(row["method"] for row in rows), _COMPUTATIONS.get(way, way), merges,
         f"{max(float(row['difference']) for row in rows):.1e}"]
        for (way, merges), rows in groups.items()
    ]  # fmt: skip


def _served_table(rows: list[dict[str, str]]) -> list[str]:
    """Return the table of real servers; adapters with equal results share a line."""
    cells = {(row["adapter"], row["server"], row["form"]): row for row in rows}
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    heads = [(s, f) for s in dict.fromkeys(r["server"] for r in rows) for f in _FORMS
             if any(k[1:] == (s, f) for k in cells)]  # fmt: skip
    titles = [f"{SERVERS[server].title}, {_FORMS[form]}" for server, form in heads]
    groups: dict[tuple[str, ...], list[str]] = {}
    for adapter in adapters:
        answers = tuple(_cell(cells.get((adapter, *head))) for head in heads)
        groups.setdefault(answers, []).append(adapter)
    body = [[", ".join(names), *answers] for answers, names in groups.items()]
    return _table(("adapters", *titles), body)


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "not run"
    return f"**{row['cell']}**" if row["cell"] in ("WRONG", "base") else row["cell"]
