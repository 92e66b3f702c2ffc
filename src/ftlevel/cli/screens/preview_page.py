"""A preview as one HTML page: no script, no font and no image from elsewhere; fits a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ftlevel._version import __version__

if TYPE_CHECKING:
    from ftlevel.commands.preview import Preview, ShownRow, Token

_STYLE = """
:root { color-scheme: light dark; --learned: #b7f0c0; --text: #1c1e21; --page: #fff;
        --dim: #6a7076; --line: #d8dcdf; --special: #a21caf; --label: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --learned: #14532d; --text: #e6e8ea; --page: #16181b; --dim: #9aa1a8;
          --line: #34383c; --special: #e879f9; --label: #fbbf24; } }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; background: var(--page);
       color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.25rem } h2 { font-size: 1rem; margin: 1.5rem 0 .25rem }
.row { font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; padding: .75rem;
       border: 1px solid var(--line); border-radius: .5rem; margin: .25rem 0 }
.t { border-left: 1px solid var(--line) } .l { background: var(--learned) }
.s { color: var(--special); font-weight: 600 } .n, small { color: var(--dim) }
.l i { color: var(--label); font-style: normal; font-weight: 600 }
table { border-collapse: collapse; width: 100% }
td { padding: .1rem .5rem .1rem 0; vertical-align: top }
meter { width: 100% } .stop { color: #c62828; font-weight: 600 }
"""


def write_page(preview: Preview, path: Path) -> None:
    """Write `preview` to `path`; an existing file is replaced as a whole."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(render_page(preview), encoding="utf-8")
    partial.replace(path)


def render_page(preview: Preview) -> str:
    """Return the page."""
    name = escape(str(preview.facts["name"]))
    share = preview.supervised / preview.tokens if preview.tokens else 0
    body = [
        f"<h1>Preview of {name}</h1>",
        _table([(c.name, str(c)) for c in preview.choices if c.name != "data check"]),
        "<h2>Data checks</h2>",
        _findings(preview),
        "<h2>Lengths in tokens</h2>",
        _lengths(preview),
        f"<p>{preview.extent}: {preview.tokens:,} tokens, "
        f"{preview.supervised:,} targets ({share:.0%}); "
        f"{preview.steps:,} steps.</p>",
        '<p><span class="l">What is learned</span> is green; '
        '<span class="s">special tokens</span> are coloured; a line begins each token.</p>',
        *(_row(row) for row in preview.rows),
        f"<p><small>ftlevel {__version__}</small></p>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Preview of {name}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><td><small>{escape(a)}</small></td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"


def _findings(preview: Preview) -> str:
    stops = preview.facts.get("stops")
    if not preview.findings and not stops:
        return "<p>Nothing was found.</p>"
    items = [
        f'<li><span class="{f.action}">{f.action}</span> {escape(str(f))} '
        f"<small>data.gate.{f.name}</small></li>"
        for f in preview.findings
    ]
    if stops:
        items.insert(0, f'<li><span class="stop">stop</span> {escape(stops)}</li>')
    return f"<ul>{''.join(items)}</ul>"


def _lengths(preview: Preview) -> str:
    most = max((bar.count for bar in preview.lengths), default=1)
    rows = (
        f"<tr><td>{bar.begin:,}–{bar.end:,}</td><td style='width:60%'>"
        f'<meter max="{most}" value="{bar.count}">{bar.count}</meter></td>'
        f"<td>{bar.count:,}</td></tr>"
        for bar in preview.lengths
    )
    return f"<table>{''.join(rows)}</table>"


def _row(row: ShownRow) -> str:
    label = f", label: <b>{escape(row.label)}</b>" if row.label else ""
    blocks = "".join(
        f'<div class="row">{"".join(map(_token, tokens))}</div>'
        for tokens in (row.tokens, row.target)
        if tokens
    )
    return (
        f"<h2>Row {row.number} <small>{escape(row.place)}, {len(row.tokens):,} tokens{label}"
        f"</small></h2>{blocks}"
    )


def _token(token: Token) -> str:
    kinds = "t" + " l" * token.supervised + " s" * token.special
    text = escape(token.text).replace("\n", '<span class="n">⏎</span>\n')
    label = f"<i>={escape(token.label.strip())}</i>" if token.label else ""
    return f'<span class="{kinds}" title="{token.id}">{text}{label}</span>'
