"""`ftlevel plan`: estimate memory, time and disk of a run before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from ftlevel.cli.flags import CommandInput, read_config
from ftlevel.cli.startup import heavy_imports

if TYPE_CHECKING:
    from ftlevel.commands.plan import RunPlan
    from ftlevel.training.forecast.alternatives import Alternative


_BAR = 30  # characters
_PROCESS = "whole process"
_MIN_SHOWN = 2**16  # bytes; smaller parts are not shown


def show(plan: RunPlan, console: Console) -> None:
    """Print the plan without its table, the verdict first."""
    for line in plan_lines(plan):
        console.print(line, highlight=False, markup=False)


def show_fits(plan: RunPlan, console: Console) -> None:
    """Print the table of alternatives, if there is one."""
    if plan.fits:
        title = f"what fits (rows of {plan.longest:,} tokens, all supervised):"
        console.print(title, markup=False, highlight=False)
        console.print(_table(plan.fits), highlight=False)


def plan_lines(plan: RunPlan) -> Iterator[str]:
    """Yield the lines of the plan without the table."""
    yield plan.need.verdict()
    if plan.cheapest is not None:
        yield f"smallest change that makes it fit: {plan.cheapest.flags}"
    elif not plan.need.does_fit:
        yield "no batch size, checkpointing or quantization makes it fit. Use a smaller --model."
    width = max(map(len, [*plan.need.parts, _PROCESS]))
    for part, size in plan.need.parts.items():
        if size < _MIN_SHOWN:
            continue
        bar = "█" * round(_BAR * size / plan.need.peak)
        yield f"  {part.ljust(width)} {_mib(size):>12}  {bar}"
    if plan.need.process is not None:
        yield (
            f"  {_PROCESS.ljust(width)} {_mib(plan.need.process):>12}  with Python, its libraries "
            "and the check before the first step"
        )
    if plan.imagined:
        yield "  rows are imagined, all as long as they may be: name a --dataset for your own"
    if plan.cluster is not None:
        yield from plan.cluster.lines()
    if not plan.imagined:
        yield f"an epoch: {plan.steps:,} steps, {plan.tokens:,} tokens{_time(plan)}"
    one, total = plan.checkpoint_bytes
    yield f"disk: {_mib(one)} a checkpoint, {_mib(total)} for all that are kept"


def _time(plan: RunPlan) -> str:
    if plan.time is None:
        return " (--probe measures its time here)"
    seconds = plan.time.seconds_per_epoch
    shown = f"{seconds:,.0f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"
    cost = f"; the run costs {plan.cost:,.2f}" if plan.cost is not None else ""
    share = plan.time.sampling_share
    split = f", {share:.0%} of it sampling" if share is not None else ""
    speed = f"{plan.time.tokens_per_s:,.0f} {'prompt ' * bool(split)}tokens/s"
    return f", about {shown}{split} at {speed} ({plan.time.how}){cost}"


def _table(fits: list[Alternative]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("flags", overflow="fold")
    for name in ("peak", "fits", "most rows"):
        table.add_column(name, justify="right")
    for fit in fits:
        most = "any" if fit.most_rows is None else f"{fit.most_rows:,}"
        table.add_row(fit.flags, _mib(fit.peak), "yes" if fit.fits else "no", most)
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def plan(
    given: CommandInput,
    *,
    gpu: str | None,
    probe: bool,
    price_per_hour: float | None,
    brief: bool,
    as_json: bool,
) -> None:
    """Estimate memory and time of a run before it starts.

    Accepts the flags of train and runs its step on meta tensors. With --model but no --dataset,
    uses synthetic rows of --max-length and reads only the model's config. Exits with 0 even if it
    does not fit.
    """
    config, _ = read_config(given)
    from ftlevel.cli.screen import open_screen

    with open_screen(as_json=as_json, quiet=True) as screen:
        with heavy_imports():
            from ftlevel.commands.plan import PlanOptions
            from ftlevel.commands.plan import plan as estimate

        values = given.values
        options = PlanOptions(gpu, probe, price_per_hour, alternatives=not brief)
        if "nodes" in values:  # a flag of an extra
            options = replace(
                options,
                nodes=values["nodes"],
                gpus_per_node=values["gpus_per_node"],
                interconnect_gbps=values["interconnect_gbps"],
            )
        if as_json:
            typer.echo(json.dumps(estimate(config, options).to_dict()))
            return

        result = estimate(
            config, options, partial(show, console=screen.console), screen.stop_without_reader
        )
        show_fits(result, screen.console)
