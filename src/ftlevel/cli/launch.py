"""Start a command once for each process of a run: hand over to torch.distributed.run.

Not to `accelerate launch --cpu`, which starts one process whatever number it is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def launch_arguments(arguments: Sequence[str], processes: int) -> list[str]:
    """Return the command that runs `ftlevel` with these `arguments` in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, "-m", "ftlevel", *arguments]


def hand_over(arguments: Sequence[str], processes: int | None) -> None:
    """Become the launcher of several processes; return where there is one, or one of them is this.

    Args:
        arguments: of the command line, as typed.
        processes: how many.
    """
    if processes is None or processes == 1 or "LOCAL_RANK" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, launch_arguments(arguments, processes))


def is_follower() -> bool:
    """Whether another process of the run speaks for this one."""
    return os.environ.get("RANK", "0") != "0" and "LOCAL_RANK" in os.environ
