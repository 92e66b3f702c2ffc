"""Compute medians and ratios of the measured tools, as Markdown.

Peers are all tools that are not ftlevel, the plain script included. The best one is the one with
the most tokens a second.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.runs import Reading

Rows = dict[str, dict[str, float]]
TOLERANCE = 0.02  # of tokens, supervised tokens and losses, before a tool is named as different


def summarize(
    readings: Mapping[str, Sequence[Reading]], weights: tuple[int, int], peak_flops: float
) -> Rows:
    """Return the medians of each tool over its runs.

    Args:
        readings: name of a tool → its runs.
        weights: of the linears in the blocks, and of the head.
        peak_flops: of a matrix product on the device, a second.
    """
    blocks, head = weights
    rows = {}
    for name, taken in readings.items():
        columns = [
            {
                "tokens_per_s": r.tokens / r.seconds,
                "tokens_per_cpu_s": r.tokens / r.cpu_seconds,
                "supervised_per_s": r.supervised / r.seconds,
                "mfu": 4 * (blocks * r.tokens + head * r.supervised) / r.seconds / peak_flops,
                "peak_mib": r.peak_mib,
                "private_mib": r.private_mib,
                "first_step_s": r.first_step_s,
                "all_tokens": r.all_tokens,
                "all_supervised": r.all_supervised,
                "threads": r.threads,
                "loss": r.loss,
            }
            for r in taken
        ]
        rows[name] = {key: statistics.median(c[key] for c in columns) for key in columns[0]}
    return rows


def best_peer(rows: Rows) -> str | None:
    """Return the name of the peer with the most tokens a second."""
    peers = [name for name in rows if not name.startswith("ftlevel")]
    return max(peers, key=lambda name: rows[name]["tokens_per_s"], default=None)


def workload_table(result: Mapping[str, Any]) -> str:
    """Return the Markdown of one workload: what it is, its table, and what to know of it."""
    work, rows, refused = result["work"], result["tools"], result["refused"]
    best = best_peer(rows)
    lines = [
        f"**{work['name']}** ({Path(work['model']).name}, {work['dtype']}, {work['batch']} × "
        f"{work['accumulate']} rows a step, {work['steps']} steps, {result['rounds']} rounds, "
        f"{work['tokens']:,} tokens, peak {result['peak_flops'] / 1e9:.0f} GFLOP/s)",
        "",
        "| | real tok/s | × plain | × best peer | supervised/s | × best peer | tok/cpu-s "
        "| × best peer | MFU | peak MiB | × best peer | first step s | mean loss |",
        "|---|" + "--:|" * 12,
    ]
    for name, row in rows.items():
        speed, supervised, cpu, memory = (
            f"{row[key] / rows[best][key]:.2f}" if best else "" for key in
            ("tokens_per_s", "supervised_per_s", "tokens_per_cpu_s", "peak_mib")
        )  # fmt: skip
        plain = (
            f"{row['tokens_per_s'] / rows['plain']['tokens_per_s']:.2f}" if "plain" in rows else ""
        )
        lines.append(
            f"| {name} | {row['tokens_per_s']:.0f} | {plain} | {speed} | "
            f"{row['supervised_per_s']:.0f} | {supervised} | {row['tokens_per_cpu_s']:.0f} | {cpu} "
            f"| {row['mfu']:.2f} | {row['peak_mib']:,.0f} | {memory} | {row['first_step_s']:.1f} | "
            f"{row['loss']:.4f} |"
        )
    notes = [*_differences(rows), *(f"{name}: {why}" for name, why in refused.items())]
    if best:
        notes.insert(0, _summary(rows, best))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def _summary(rows: Rows, best: str) -> str:
    """Say who is the best peer, and how ftlevel stands to it."""
    said = f"Best peer: {best}."
    commands = [n for n in rows if not n.startswith(("ftlevel", "plain"))]
    if commands:
        soonest = min(commands, key=lambda name: rows[name]["first_step_s"])
        said += f" First to step among commands: {soonest}, {rows[soonest]['first_step_s']:.1f} s."
    if "ftlevel" in rows:
        ours, theirs = rows["ftlevel"], rows[best]
        said += (
            f" ftlevel: {ours['tokens_per_s'] / theirs['tokens_per_s']:.2f} × its real tokens/s, "
            f"{ours['supervised_per_s'] / theirs['supervised_per_s']:.2f} × its supervised ones/s, "
            f"{ours['peak_mib'] / theirs['peak_mib']:.2f} × its memory"
        )
        if commands:
            ratio = ours["first_step_s"] / rows[soonest]["first_step_s"]
            said += f", {ratio:.2f} × the time to the first step of {soonest}"
        said += "."
    return said


def _differences(rows: Rows) -> list[str]:
    """Name tools that had other tokens, supervised tokens, losses or threads than the plain one."""
    reference = rows.get("plain") or next(iter(rows.values()), None)
    if reference is None:
        return []
    words = {
        "all_tokens": "{:,.0f} tokens in all where the plain script has {:,.0f}",
        "all_supervised": "{:,.0f} supervised ones where it has {:,.0f}",
        "loss": "a mean loss of {:.4f} where it has {:.4f}",
    }
    found = []
    for name, row in rows.items():
        other = [
            text.format(row[key], reference[key])
            for key, text in words.items()
            if abs(row[key] / reference[key] - 1) > TOLERANCE
        ]
        if row["threads"] != reference["threads"]:
            other.append(f"{row['threads']:.0f} threads where it has {reference['threads']:.0f}")
        if other:
            found.append(f"{name} had {', '.join(other)}.")
    return found
