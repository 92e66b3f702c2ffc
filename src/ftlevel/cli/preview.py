"""`ftlevel preview` and `plan`: show encoded rows and data problems; estimate memory and time.

The output of `preview` is colored in a terminal, bracketed in a pipe, or one self-contained HTML
page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ftlevel._version import __version__
from ftlevel.artifacts.files import check_output_file, write_text
from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.cli.startup import heavy_imports
from ftlevel.safe_io import escape_controls

if TYPE_CHECKING:
    from ftlevel.commands.plan import RunPlan
    from ftlevel.commands.preview import Bar, Preview, ShownRow, Token


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


def render_page(preview: Preview) -> str:
    """Returns the HTML page."""
    name = escape(str(preview.data_info["name"]))
    ratio = preview.supervised / preview.tokens if preview.tokens else 0
    body = [
        f"<h1>Preview of {name}</h1>",
        _table([(c.name, str(c)) for c in preview.choices if c.name != "data check"]),
        "<h2>Data checks</h2>",
        _findings(preview),
        "<h2>Lengths in tokens</h2>",
        _lengths(preview),
        f"<p>an epoch: {preview.tokens:,} tokens, {preview.supervised:,} targets "
        f"({ratio:.0%}); {preview.steps:,} steps.</p>",
        '<p><span class="l">Supervised tokens</span> are green; '
        '<span class="s">special tokens</span> are colored; a line begins each token.</p>',
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
    stops = preview.data_info.get("stops")
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
    max_count = max((bar.count for bar in preview.lengths), default=1)
    rows = (
        f"<tr><td>{bar.begin:,}–{bar.end:,}</td><td style='width:60%'>"
        f'<meter max="{max_count}" value="{bar.count}">{bar.count}</meter></td>'
        f"<td>{bar.count:,}</td></tr>"
        for bar in preview.lengths
    )
    return f"<table>{''.join(rows)}</table>"


def _row(row: ShownRow) -> str:
    blocks = "".join(
        f'<div class="row">{"".join(map(_token, tokens))}</div>'
        for tokens in (row.tokens, row.target)
        if tokens
    )
    return (
        f"<h2>Row {row.number} <small>{escape(row.location)}, {len(row.tokens):,} tokens"
        f"{escape(_label(row))}</small></h2>{blocks}"
    )


def _label(row: ShownRow) -> str:
    if row.has_several_texts:
        return f"; {row.label}"
    return f", label: {row.label}" if row.label else ""


def _token(token: Token) -> str:
    classes = "t" + " l" * token.supervised + " s" * token.special
    text = escape(token.text).replace("\n", '<span class="n">⏎</span>\n')
    label = f"<i>={escape(token.label.strip())}</i>" if token.label else ""
    return f'<span class="{classes}" title="{token.id}">{text}{label}</span>'


_MAX_TOKENS = 240  # tokens printed per row, unless --row is given
_BAR = 40
_BREAK = "⏎\n"
_LEARNED = ("black on green3", "black on pale_green3")  # alternate, to show token boundaries
_CONTEXT = ("", "on grey19")
_SPECIAL = "bold magenta"


def show(preview: Preview, console: Console, *, full: bool) -> None:
    """Print the preview; long rows are shortened unless `full`."""
    color = console.is_terminal or console.record
    for choice in preview.choices:
        if choice.name != "data check":
            console.print(Text(f"{choice.name}: {choice}"), highlight=False)
    for row in preview.rows:
        console.print()
        for part in _format_row(row, full=full, color=color):
            console.print(part, highlight=False)
    console.print()
    for line in summary_lines(preview):
        console.print(Text(line), highlight=False)
    for choice in preview.rollouts:
        console.print(Text(f"{choice.name}: {choice}"), highlight=False)


def summary_lines(preview: Preview) -> Iterator[str]:
    """Yields lengths, number of supervised tokens, steps and data problems as lines of text."""
    yield "length in tokens"
    max_count = max((bar.count for bar in preview.lengths), default=1)
    yield from (_bar_line(bar, max_count) for bar in preview.lengths)
    ratio = preview.supervised / preview.tokens if preview.tokens else 0
    tokens, targets = f"{preview.tokens:,} tokens", f"{preview.supervised:,} targets"
    yield f"an epoch: {tokens}, {targets} ({ratio:.0%})"
    yield f"the run: {preview.steps:,} steps"
    if stops := preview.data_info.get("stops"):
        yield f"data check: would stop the run: {stops}"
    elif not preview.findings:
        yield "data check: no problems found"
    actions = {"stop": "would stop the run", "drop": "dropped", "warn": "kept", "fold": "made one"}
    for finding in preview.findings:
        yield f"data check: {finding}: {actions[finding.action]}; {finding.setting}"


def _bar_line(bar: Bar, max_count: int) -> str:
    filled = "█" * max(round(_BAR * bar.count / max_count), int(bar.count > 0))
    return f"  {bar.begin:>6,}–{bar.end:<6,} {filled} {bar.count:,}"


def _format_row(row: ShownRow, *, full: bool, color: bool) -> Iterator[Text]:
    targets = row.target or row.tokens
    learned = sum(token.supervised for token in targets)
    size = f"{len(row.tokens):,} tokens"
    if row.target:
        size += f" → {len(row.target):,}"
    elif 0 < learned < len(targets) or not row.label:
        size += f", {learned:,} supervised"
    yield Text(f"row {row.number} ({row.location}): {size}{_label(row)}", style="bold cyan")
    for tokens in filter(None, (row.tokens, row.target)):
        yield _colored(tokens, full=full) if color else _bracketed(tokens, full=full)


def _shorten(tokens: Sequence[Token], *, full: bool) -> Iterable[Token | int]:
    surplus = len(tokens) - _MAX_TOKENS
    if full or surplus <= 0:
        return tokens
    half = _MAX_TOKENS // 2
    return [*tokens[:half], surplus, *tokens[-half:]]


def _colored(tokens: Sequence[Token], *, full: bool) -> Text:
    text = Text()
    for index, token in enumerate(_shorten(tokens, full=full)):
        if isinstance(token, int):
            text.append(f" … {token:,} tokens … ", style="italic dim")
            continue
        style = (_LEARNED if token.supervised else _CONTEXT)[index % 2]
        if token.special:  # magenta is unreadable on green
            style = f"{style} bold" if token.supervised else f"{style} {_SPECIAL}".strip()
        text.append(_visible(token), style=style)
        if token.label:
            text.append(f"={token.label.strip()}", style="bold yellow")
    text.rstrip()
    return text


def _bracketed(tokens: Sequence[Token], *, full: bool) -> Text:
    num_labels = sum(bool(token.label) for token in tokens)
    texts = 0 < num_labels < len(tokens) and all(token.supervised for token in tokens)
    without_brackets = texts or not any(token.supervised for token in tokens)
    chunks = []
    for token in _shorten(tokens, full=full):
        if isinstance(token, int):
            chunks.append(f" … {token:,} tokens … ")
            continue
        # Brackets would mark nothing; texts of a row stand on lines of their own.
        if without_brackets:
            text = _visible(token)
            if token.label:
                text = "\n" * bool(chunks) + f"{token.label}: {text.lstrip()}"
            chunks.append(text)
            continue
        text = _visible(token).replace("[", "\\[").replace("]", "\\]")
        label = f"={token.label.strip()}" if token.label else ""
        chunks.append(f"[{text}{label}]" if token.supervised else text)
    return Text("".join(chunks).removesuffix("\n"))


def _visible(token: Token) -> str:
    return escape_controls(token.text).replace("\n", _BREAK).replace("\t", "⇥")


def preview(
    inputs: CommandInput, *, row: Sequence[int] | None, html: Path | None, as_json: bool
) -> None:
    """Show encoded rows and problems in the data.

    Accepts the flags of train and reads the data as train does. Weights are loaded only with
    --task rl, to sample and score completions as train does before its first step.
    Supervised tokens are green in a terminal and in [brackets] in a pipe. Statistics and data
    checks follow.
    """
    config, _ = read_config(inputs)
    if html is not None:
        check_output_file("--html", html, overwrite=True)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        with heavy_imports():
            from ftlevel.commands.preview import preview as build

        result = build(config, row or ())
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            write_text(html, render_page(result))
        if as_json:
            typer.echo(json.dumps(result.to_dict()))
            return

        show(result, screen.console, full=bool(row))
        if html is not None:
            typer.echo(f"page: {html}")


_PLAN_BAR = 30  # characters
_PROCESS = "whole process"
_MIN_BYTES = 2**16  # bytes; smaller parts are not printed


def _show_plan(plan: RunPlan, console: Console) -> None:
    for line in plan_lines(plan):
        console.print(line, highlight=False, markup=False)


def _show_fits(plan: RunPlan, console: Console) -> None:
    if plan.fits:
        title = f"what fits (rows of {plan.run.data.max_length:,} tokens, all supervised):"
        console.print(title, markup=False, highlight=False)
        table = Table(box=None, padding=(0, 2, 0, 2))
        table.add_column("flags", overflow="fold")
        for name in ("peak", "fits"):
            table.add_column(name, justify="right")
        for fit in plan.fits:
            table.add_row(fit.flags, format_size(fit.peak), "yes" if fit.fits else "no")
        console.print(table, highlight=False)


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """Yields the plan, without the table of alternatives, as lines of text."""
    yield plan.need.verdict()
    if plan.cheapest is not None:
        yield f"smallest change that makes it fit: {plan.cheapest.flags}"
    elif not plan.need.does_fit:
        yield "no batch size, checkpointing or quantization makes it fit. Use a smaller --model."
    width = max(map(len, [*plan.need.parts, _PROCESS]))
    for part, size in plan.need.parts.items():
        if size < _MIN_BYTES:
            continue
        bar = "█" * round(_PLAN_BAR * size / plan.need.peak)
        yield f"  {part.ljust(width)} {format_size(size):>12}  {bar}"
    if plan.need.process is not None:
        yield (
            f"  {_PROCESS.ljust(width)} {format_size(plan.need.process):>12}  with Python, its "
            "libraries and the check before the first step"
        )
    if plan.is_synthetic:
        yield "  rows are synthetic, all of --max-length tokens; pass --dataset to use your own"
    if not plan.is_synthetic:
        steps, tokens = plan.run.schedule.steps_per_epoch, plan.run.data.info["tokens"]
        yield f"an epoch: {steps:,} steps, {tokens:,} tokens{_time(plan)}"
    one, total = plan.checkpoint_bytes
    yield f"disk: {format_size(one)} a checkpoint, {format_size(total)} for all that are kept"


_NO_TIME = " (time: --probe here, or --gpu NAME)"


def _time(plan: RunPlan) -> str:
    if plan.time is None:
        several = plan.need.device.ranks > 1
        return " (time: not estimated for several GPUs)" if several else _NO_TIME
    seconds = plan.time.seconds_per_epoch
    text = f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
    cost = f"; the run costs {plan.cost:,.2f}" if plan.cost is not None else ""
    ratio = plan.time.sampling_share
    split = f", {ratio:.0%} of it sampling" if ratio is not None else ""
    speed = f"{plan.time.tokens_per_s:,.0f} {'prompt ' * bool(split)}tokens/s"
    return f", about {text}{split} at {speed} ({plan.time.how}){cost}"


def format_size(size: float) -> str:
    """Returns a number of bytes in MiB or GiB."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def plan(
    inputs: CommandInput,
    *,
    gpu: str | None,
    probe: bool,
    price_per_hour: float | None,
    brief: bool,
    as_json: bool,
) -> None:
    """Estimate memory and time of a run before it starts.

    Accepts the flags of train and runs a training step on meta tensors. With --model but no
    --dataset, uses synthetic rows of --max-length and reads only the model's config. Exits with 0
    even if the run does not fit.
    """
    config, _ = read_config(inputs)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        with heavy_imports():
            from ftlevel.commands.plan import PlanOptions
            from ftlevel.commands.plan import plan as estimate

        options = PlanOptions(gpu, probe, price_per_hour, alternatives=not brief)
        if as_json:
            typer.echo(json.dumps(estimate(config, options).to_dict()))
            return

        result = estimate(
            config, options, partial(_show_plan, console=screen.console), screen.exit_if_closed
        )
        _show_fits(result, screen.console)
