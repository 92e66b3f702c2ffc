"""How many threads torch computes with on a CPU: one a physical core that this process may use.

More than that makes threads of one core take turns at its multipliers, and threads beyond a
container's quota stop all of them at every barrier. Fewer happens as well: accelerate's launcher
sets one where nothing is said.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ftlevel.config.choices import Choice

_TOPOLOGY = Path("/sys/devices/system/cpu")
_MEMBERSHIP, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def choose_threads() -> Choice:
    """Set torch's threads for this process, unless somebody has, and return what holds."""
    if os.environ.get("OMP_NUM_THREADS"):
        return Choice("threads", torch.get_num_threads(), "OMP_NUM_THREADS")
    allowed = allowed_cpus()
    cores = count_cores(allowed)
    if torch.get_num_threads() not in (cores, len(allowed)):  # torch begins with one of these
        return Choice("threads", torch.get_num_threads(), "as torch was set")
    quota = read_quota()
    threads = cores if quota is None else max(1, min(cores, math.floor(quota)))
    torch.set_num_threads(threads)
    if threads < cores:
        return Choice("threads", threads, f"the container's quota is {quota:g} CPUs")
    return Choice("threads", threads, "auto: one a physical core")


def allowed_cpus() -> list[int]:
    """Return the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def count_cores(cpus: list[int], topology: Path = _TOPOLOGY) -> int:
    """Return how many physical cores the logical `cpus` are; all of them where nothing says so."""
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add((topology / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(cpus)
    return len(siblings)


def read_quota(membership: Path = _MEMBERSHIP, root: Path = _CGROUPS) -> float | None:
    """Return the CPUs' worth of time that the control groups of this process leave it, or None."""
    quotas = [quota for group in control_groups(membership, root) if (quota := _quota(group))]
    return min(quotas, default=None)


def control_groups(
    membership: Path = _MEMBERSHIP, root: Path = _CGROUPS, controller: str = "cpu"
) -> Iterator[Path]:
    """Give the directories that may hold a limit, from this process's group to the root.

    In a container the path may be the host's, which is not there, and the root is its own group.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        top = root if number == "0" else root / controller
        group = top / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(top))


def _quota(group: Path) -> float | None:
    """Return the quota of one group in CPUs, of version 2 (cpu.max) or 1 (cpu.cfs_…)."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        limit = float(quota) / float(period)  # "max" is no number, and version 1 writes -1
    except (OSError, ValueError):
        return None
    return limit if limit > 0 else None
