"""The processes of a run, one per device, as started by a launcher.

Every process resolves the same run from the same files, which is checked. Only the first process
prints and writes; all compute each optimizer step together.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from ftlevel.config import TrainerConfig
from ftlevel.errors import ConfigError, FtlevelError, RunError, join_names
from ftlevel.world import World, read_world

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The number of processes and the rank of this one, from the launcher's environment."""

    world: World = field(default_factory=World)

    @property
    def count(self) -> int:
        """Number of processes on all machines."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.world.rank == 0

    def join(self) -> None:
        """Initialize the process group, with gloo for CPU tensors and NCCL for GPU tensors.

        Raises:
            RunError: the other processes cannot be reached.
        """
        if self.count == 1 or distributed.is_initialized():
            return
        self.world.publish()
        where = f"{self.world.address}:{self.world.port}"
        try:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            )
        except (distributed.DistError, RuntimeError) as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise RunError(
                f"rank {self.world.rank} of {self.count} ({socket.gethostname()}) did not meet the "
                f"others at {where}: {reason}. Look at what they say, and whether MASTER_ADDR and "
                "MASTER_PORT are the same for all."
            ) from None

    def take_device(self, device: str) -> None:
        """Select the GPU with this process's local rank.

        Raises:
            ConfigError: there are too few GPUs, or the device supports one process only.
        """
        if self.count == 1:
            return
        how = f"{self.count} processes of {self.world.launcher}"
        if device == "mps":
            raise ConfigError(f"{how}: Apple's GPU serves one process. Use --device cpu, or one.")
        if device == "cuda":
            there, local = torch.cuda.device_count(), self.world.local_rank
            if local >= there:
                raise ConfigError(
                    f"{how}: local rank {local} needs a GPU of its own, and {socket.gethostname()} "
                    f"has {there}. Start {there} processes on this machine."
                )
            torch.cuda.set_device(local)

    def wait(self) -> None:
        """Wait until all processes reach this call."""
        if self.count > 1:
            distributed.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process and return its result, or raise its error, in all."""
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
            box[1].is_reported = not self.is_first
            raise box[1]
        made: T = box[0]
        return made

    def in_all(self, make: Callable[[], T]) -> T:
        """Call `make` in every process and return its result; an error in one is raised in all."""
        if self.count == 1:
            return make()
        made, own = None, None
        try:
            made = make()
        except FtlevelError as error:
            own = error
        said: list[Any] = [None] * self.count
        told = None if own is None else (socket.gethostname(), str(own), own.exit_code)
        distributed.all_gather_object(said, told)
        if own is not None and self.is_first:
            raise own
        for rank, other in enumerate(said):
            if other is not None:
                host, message, code = other
                kind = ConfigError if code == ConfigError.exit_code else RunError
                shared = kind(message if said[0] else f"rank {rank} ({host}): {message}")
                shared.is_reported = not self.is_first
                raise shared
        return cast("T", made)  # set if no process raised

    def exchange(self, own: T) -> list[T]:
        """Return the values of all processes, in rank order."""
        if self.count == 1:
            return [own]
        said: list[Any] = [None] * self.count
        distributed.all_gather_object(said, own)
        return said

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError in all processes if `values` differ from the first process's.

        `values` maps dotted names to JSON values; the message lists every rank and field that
        differs.
        """
        if self.count == 1:
            return
        said: list[Any] = [None] * self.count
        distributed.all_gather_object(said, (socket.gethostname(), dict(values)))
        where, first = said[0]
        problems = []
        for rank, (host, own) in enumerate(said):
            other = [key for key in sorted({**first, **own}) if first.get(key) != own.get(key)]
            shown = join_names(
                f"{key} is {own.get(key)!r} and {first.get(key)!r} there" for key in other
            )
            if other:
                problems.append(
                    f"rank {rank} ({host}) is not of the same run as rank 0 ({where}): {shown}. "
                    "Nothing was trained. Give all processes the same flags, files and versions."
                )
        if problems:
            error = ConfigError(problems)
            error.is_reported = not self.is_first
            raise error

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.most(int(flag)))

    def mean(self, value: float) -> float:
        """Return the mean of `value` over all processes."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(box)
        return float(box) / self.count

    def most(self, wish: int) -> int:
        """Return the maximum of `wish` over all processes."""
        if self.count == 1:
            return wish
        box = torch.tensor(wish)
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return int(box)


def started_processes() -> Processes:
    """Return the processes started by a launcher; a single one without a launcher.

    Raises:
        ConfigError: the launcher's environment variables are inconsistent.
    """
    return Processes(read_world())


def resolve_processes(train: TrainerConfig, processes: Processes, rows_only: bool) -> TrainerConfig:
    """Return `train` with the actual number of processes (None for one), or raise ConfigError.

    With `rows_only` nothing is trained, and one process may stand for any configured number.
    """
    wish, count = train.num_processes, processes.count
    by = f" by {processes.world.launcher}" if processes.world.launcher else ""
    if wish is not None and wish != count and not (rows_only and count == 1):
        raise ConfigError(
            f"--num-processes {wish}: {count} {'process was' if count == 1 else 'processes were'} "
            f"started{by}. Run it by the ftlevel program, which starts them, or by torchrun "
            f"--nproc-per-node {wish} -m ftlevel train …"
        )
    number = wish if rows_only else count
    number = None if number == 1 else number
    return train.model_copy(update={"num_processes": number})
