"""Step time of a sharded run on several GPUs, for `plan`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag


def _flags() -> list[Flag]:
    from ftlevel.config.flag import DAILY, option

    own = partial(option, on=("plan",), panel=DAILY, metavar="N")
    count = partial(own, type=int, default=1, minimum=1)
    return [
        count("--nodes", "Number of machines with GPUs of type --gpu, for --shard."),
        count("--gpus-per-node", "Number of GPUs per machine."),
        own(
            "--interconnect-gbps",
            "Network bandwidth per GPU between machines, in Gbit/s.",
            type=float,
            default=400.0,
        ),
    ]


EXTENSION = Extension(
    flags=_flags, hooks={"forecast_cluster": "ftlevel.extras.cluster.forecast:forecast_cluster"}
)
