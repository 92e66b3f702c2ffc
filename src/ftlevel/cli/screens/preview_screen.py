"""A preview in a terminal, by colour, and in a pipe, by brackets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from ftlevel.commands.preview import Bar, Preview, ShownRow, Token

_MOST = 240  # tokens of a row that are shown unless it was asked for
_BAR = 40
_BREAK = "⏎\n"
_LEARNED = ("black on green3", "black on pale_green3")  # by turns, so that borders are seen
_GIVEN = ("", "on grey19")
_SPECIAL = "bold magenta"


def show(preview: Preview, console: Console, *, whole: bool) -> None:
    """Print `preview`.

    Args:
        preview: what to show.
        console: where.
        whole: show every token of the rows; else the middle of long ones is left out.
    """
    colour = console.is_terminal or console.record
    for choice in preview.choices:
        if choice.name != "data check":
            console.print(Text(f"{choice.name}: {choice}"), highlight=False)
    for row in preview.rows:
        console.print()
        for part in _row_parts(row, whole=whole, colour=colour):
            console.print(part, highlight=False)
    console.print()
    for line in summary_lines(preview):
        console.print(Text(line), highlight=False)


def summary_lines(preview: Preview) -> Iterator[str]:
    """Yield the lines below the rows: lengths, share, steps and findings."""
    yield "length in tokens"
    most = max((bar.count for bar in preview.lengths), default=1)
    yield from (_bar_line(bar, most) for bar in preview.lengths)
    share = preview.supervised / preview.tokens if preview.tokens else 0
    tokens, targets = f"{preview.tokens:,} tokens", f"{preview.supervised:,} targets"
    yield f"{preview.extent}: {tokens}, {targets} ({share:.0%})"
    yield f"the run: {preview.steps:,} steps"
    if stops := preview.facts.get("stops"):
        yield f"data check: would stop the run: {stops}"
    elif not preview.findings:
        yield "data check: nothing found"
    done = {"stop": "would stop the run", "drop": "dropped", "warn": "kept", "fold": "made one"}
    for found in preview.findings:
        yield f"data check: {found}: {done[found.action]}; --set data.gate.{found.name}=…"


def _bar_line(bar: Bar, most: int) -> str:
    filled = "█" * max(round(_BAR * bar.count / most), int(bar.count > 0))
    return f"  {bar.begin:>6,}–{bar.end:<6,} {filled} {bar.count:,}"


def _row_parts(row: ShownRow, *, whole: bool, colour: bool) -> Iterator[Text]:
    targets = row.target or row.tokens
    learned = sum(token.supervised for token in targets)
    size = f"{len(row.tokens):,} tokens"
    size += f" → {len(row.target):,}" if row.target else f", {learned:,} learned"
    label = f", label: {row.label}" if row.label else ""
    yield Text(f"row {row.number} ({row.place}): {size}{label}", style="bold cyan")
    for tokens in filter(None, (row.tokens, row.target)):
        yield _coloured(tokens, whole=whole) if colour else _bracketed(tokens, whole=whole)


def _cut(tokens: Sequence[Token], *, whole: bool) -> Iterable[Token | int]:
    """Return the tokens to show, and in the place of those left out their number."""
    surplus = len(tokens) - _MOST
    if whole or surplus <= 0:
        return tokens
    half = _MOST // 2
    return [*tokens[:half], surplus, *tokens[-half:]]


def _coloured(tokens: Sequence[Token], *, whole: bool) -> Text:
    text = Text()
    for index, token in enumerate(_cut(tokens, whole=whole)):
        if isinstance(token, int):
            text.append(f" … {token:,} tokens … ", style="italic dim")
            continue
        style = (_LEARNED if token.supervised else _GIVEN)[index % 2]
        if token.special:  # magenta cannot be read on green
            style = f"{style} bold" if token.supervised else f"{style} {_SPECIAL}".strip()
        text.append(_visible(token), style=style)
        if token.label:
            text.append(f"={token.label.strip()}", style="bold yellow")
    text.rstrip()
    return text


def _bracketed(tokens: Sequence[Token], *, whole: bool) -> Text:
    parts = []
    for token in _cut(tokens, whole=whole):
        if isinstance(token, int):
            parts.append(f" … {token:,} tokens … ")
            continue
        shown = _visible(token).replace("[", "\\[").replace("]", "\\]")
        label = f"={token.label.strip()}" if token.label else ""
        parts.append(f"[{shown}{label}]" if token.supervised else shown)
    return Text("".join(parts).removesuffix("\n"))


def _visible(token: Token) -> str:
    return token.text.replace("\n", _BREAK).replace("\t", "⇥")
