"""The processes of one run, each with a device of its own, as torch.distributed.run starts them.

Every process resolves the same plan from the same files. The first one alone speaks and writes; all
of them compute each optimizer step together, on as many rows as one process would with as many
micro-steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, FtlevelError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How many there are, and which this one is.

    Attributes:
        count: of all machines together.
        rank: from 0.
        local_rank: on this machine, from 0.
    """

    count: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Meet the others; a GPU is taken by the number on this machine.

        Args:
            device: torch device type.

        Raises:
            ConfigError: there are fewer GPUs than processes here, or the device has no backend.
        """
        if self.count == 1 or distributed.is_initialized():
            return
        if device == "mps":
            raise ConfigError(
                f"--num-processes {self.count}: Apple's GPU serves one process. Use --device cpu, "
                "or drop it."
            )
        if device == "cuda":
            there = torch.cuda.device_count()
            if self.local_rank >= there:
                raise ConfigError(
                    f"--num-processes {self.count}: this machine has {there} GPUs, and each "
                    f"process needs its own. Use --num-processes {there}."
                )
            torch.cuda.set_device(self.local_rank)
        # What the processes ask of one another goes by the CPU: a GPU would be waited for.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` gives in the first process, or raise its error, in all of them."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = make()
            except FtlevelError as error:
                box[1] = error
        distributed.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        made: T = box[0]
        return made

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in one of them: what all must do at the same step."""
        return bool(self.most(int(flag)))

    def mean(self, value: float) -> float:
        """Return the mean of `value` over all of them."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(box)
        return float(box) / self.count

    def most(self, wish: int) -> int:
        """Return the largest `wish` of all: what they must do at the same step."""
        if self.count == 1:
            return wish
        box = torch.tensor(wish)
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return int(box)


def started_processes() -> Processes:
    """Return what the launcher says in the environment; one process where there is no launcher."""
    count, rank, local = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
    )
    return Processes(count, rank, local)


def resolve_processes(config: TrainConfig, processes: Processes, rows_only: bool) -> TrainConfig:
    """Return `config` with the number of processes that there are; None stands for one.

    Args:
        config: the user's.
        processes: those that were started.
        rows_only: nothing is trained, so that one process can speak for all.

    Raises:
        ConfigError: another number was asked for.
    """
    wish, count = config.train.num_processes, processes.count
    if wish is not None and wish != count and not (rows_only and count == 1):
        raise ConfigError(
            f"--num-processes {wish}: {count} {'process was' if count == 1 else 'processes were'} "
            f"started. Run it by the ftlevel program, which starts them, or by torchrun "
            f"--nproc-per-node {wish} -m ftlevel train …"
        )
    number = wish if rows_only else count
    number = None if number == 1 else number
    train = config.train.model_copy(update={"num_processes": number})
    return config.model_copy(update={"train": train})
