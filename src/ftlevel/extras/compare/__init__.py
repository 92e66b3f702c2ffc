"""`compare`: train several methods on the same rows, search their settings, and rank them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Command, Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag


def _flags() -> list[Flag]:
    from ftlevel.config.flag import DAILY, option

    declare = partial(option, on=("compare",), panel=DAILY)
    names = partial(declare, type=list[str], multiple=True, metavar="NAME,…")
    count = partial(declare, type=int, minimum=1)
    minutes = partial(declare, type=float, metavar="M")
    return [
        names("--methods", "Comma-separated methods to compare, e.g. lora,qlora,ia3,full."),
        count(
            "--budget-steps",
            "Number of training steps per method; default: the epochs of the run.",
            metavar="N",
        ),
        minutes(
            "--budget-minutes", "Training minutes per method, converted to steps by a short probe."
        ),
        count("--seeds", "Number of seeds per method, starting at --seed.", default=1, metavar="K"),
        declare(
            "--max-memory",
            "Memory limit in GiB; methods that need more cannot be the best.",
            type=float,
            metavar="GIB",
        ),
        minutes(
            "--max-minutes", "Time limit per run in minutes; slower methods cannot be the best."
        ),
        names("--search", "Settings to tune per method: lr, r, alpha, dropout, weight-decay."),
        count("--trials", "Number of trials per search; default: 10.", metavar="N"),
        declare(
            "--study",
            "Database URL of the searches, which machines can share; default: a local file.",
            metavar="URL",
        ),
    ]


def _accepts(path: str) -> bool:
    if path.startswith("output."):
        return path in ("output.dir", "output.resume")
    return path != "method.kind"


EXTENSION = Extension(
    commands={
        "compare": Command(
            "ftlevel.extras.compare.cli:compare",
            "Compare several methods on the same data and budget.",
            config="ftlevel.config.train:TrainConfig",
            accepts=_accepts,
            is_quiet=True,
        )
    },
    flags=_flags,
)
