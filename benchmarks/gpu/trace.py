"""Run `ftlevel` with a profiler on one optimizer step: `python trace.py BASE train --model …`.

Writes BASE.json.gz for a trace viewer, and BASE.txt with the operators sorted by device time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

WARM_UP_STEPS = 2
"""Steps before the traced one, for allocation and kernel warm-up."""
ROWS = 60


class Tracer:
    """Starts the profiler after some steps, and stops it after one more."""

    def __init__(self, base: Path) -> None:
        """Set the base of the file names."""
        self.base = base
        self.steps = 0
        self.profiler: Any = None

    def __call__(self, *_: Any) -> None:
        """Count a step of the optimizer."""
        self.steps += 1
        if self.steps == WARM_UP_STEPS:
            has_gpu = torch.cuda.is_available()
            gpu_activities = [ProfilerActivity.CUDA] if has_gpu else []
            self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu_activities])
            self.profiler.start()
        elif self.profiler is not None:
            self.profiler.stop()
            order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=order, row_limit=ROWS)
            self.profiler.export_chrome_trace(f"{self.base}.json.gz")
            Path(f"{self.base}.txt").write_text(table, encoding="utf-8")
            self.profiler = None


if __name__ == "__main__":
    from ftlevel.__main__ import main

    register_optimizer_step_post_hook(Tracer(Path(sys.argv[1])))
    del sys.argv[1]
    main()
