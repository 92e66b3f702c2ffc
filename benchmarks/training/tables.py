"""Compute medians and ratios of the measured tools, as Markdown.

Peers are all tools other than ftlevel, including the plain script. The best one has the most tokens
per second.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.runs import Reading

Rows = dict[str, dict[str, float]]
TOLERANCE = 0.02  # relative difference of tokens, supervised tokens and losses that is reported


def summarize(
    readings: Mapping[str, Sequence[Reading]], weights: tuple[int, int], peak_flops: float
) -> Rows:
    """Return the medians of each tool over its runs.

    Args:
        readings: tool name → its runs.
        weights: number of weights of the blocks' linear layers, and of the head.
        peak_flops: FLOP/s of a matrix product on the device.
    """
    blocks, head = weights
    rows = {}
    for name, runs in readings.items():
        columns = [
            {
                "tokens_per_s": r.tokens / r.seconds,
                "tokens_per_cpu_s": r.tokens / r.cpu_seconds,
                "supervised_per_s": r.supervised / r.seconds,
                "mfu": 4 * (blocks * r.tokens + head * r.supervised) / r.seconds / peak_flops,
                "peak_mib": r.peak_mib,
                "first_step_s": r.first_step_s,
                "all_tokens": r.all_tokens,
                "all_supervised": r.all_supervised,
                "threads": r.threads,
                "loss": r.loss,
            }
            for r in runs
        ]
        rows[name] = {key: statistics.median(c[key] for c in columns) for key in columns[0]}
    return rows


def best_peer(rows: Rows) -> str | None:
    """Return the name of the peer with the most tokens per second."""
    peers = [name for name in rows if not name.startswith("ftlevel")]
    return max(peers, key=lambda name: rows[name]["tokens_per_s"], default=None)


def workload_table(result: Mapping[str, Any]) -> str:
    """Return the Markdown of one workload: description, table and notes."""
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
    notes = [*_differences(rows), *(f"{name}: {reason}" for name, reason in refused.items())]
    if best:
        notes.insert(0, _summary(rows, best))
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def _summary(rows: Rows, best: str) -> str:
    """Return which peer is the best, and how ftlevel compares with it."""
    text = f"Best peer: {best}."
    if "ftlevel" in rows:
        own, other = rows["ftlevel"], rows[best]
        text += (
            f" ftlevel: {own['tokens_per_s'] / other['tokens_per_s']:.2f} × its real tokens/s, "
            f"{own['supervised_per_s'] / other['supervised_per_s']:.2f} × its supervised ones/s, "
            f"{own['peak_mib'] / other['peak_mib']:.2f} × its memory."
        )
    return text


def _differences(rows: Rows) -> list[str]:
    """Return notes on tools with other tokens, losses or threads than the plain script."""
    reference = rows.get("plain") or next(iter(rows.values()), None)
    if reference is None:
        return []
    texts = {
        "all_tokens": "{:,.0f} tokens in all where the plain script has {:,.0f}",
        "all_supervised": "{:,.0f} supervised ones where it has {:,.0f}",
        "loss": "a mean loss of {:.4f} where it has {:.4f}",
    }
    notes = []
    for name, row in rows.items():
        differences = [
            text.format(row[key], reference[key])
            for key, text in texts.items()
            if abs(row[key] / reference[key] - 1) > TOLERANCE
        ]
        if row["threads"] != reference["threads"]:
            differences.append(
                f"{row['threads']:.0f} threads where it has {reference['threads']:.0f}"
            )
        if differences:
            notes.append(f"{name} had {', '.join(differences)}.")
    return notes
