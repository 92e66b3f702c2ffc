"""Step time of a sharded run on several GPUs, for `plan`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftlevel.extensions import Extension

if TYPE_CHECKING:
    from ftlevel.config.flag import Flag


def _flags() -> list[Flag]:
    from ftlevel.config.flag import DAILY, option

    declare = partial(option, on=("plan",), panel=DAILY, metavar="N")
    num_gpus = partial(declare, type=int, default=1, minimum=1)
    return [
        num_gpus("--nodes", "Number of machines with GPUs of type --gpu, for --shard."),
        num_gpus("--gpus-per-node", "Number of GPUs per machine."),
        declare(
            "--interconnect-gbps",
            "Network bandwidth per GPU between machines, in Gbit/s.",
            type=float,
            default=400.0,
        ),
    ]


EXTENSION = Extension(
    flags=_flags, hooks={"forecast_cluster": "ftlevel.extras.cluster.forecast:forecast_cluster"}
)
