"""The processes of one run, each with a device of its own, as a launcher starts them.

Every process resolves the same plan from the same files, which is checked. The first one alone
speaks and writes; all of them compute each optimizer step together, on as many rows as one process
would with as many micro-steps.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from ftlevel.config import TrainConfig
from ftlevel.errors import ConfigError, FtlevelError, RunError, listing
from ftlevel.world import World, read_world

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """How many there are, and which this one is.

    Attributes:
        world: what the launcher says.
    """

    world: World = field(default_factory=World)

    @property
    def count(self) -> int:
        """How many there are, of all machines together."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.world.rank == 0

    def join(self) -> None:
        """Meet the others. What they ask of one another goes by the CPU, GPUs share gradients.

        Raises:
            RunError: they do not come.
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
        """Take the GPU that is this process's, by the number on this machine.

        Args:
            device: torch device type.

        Raises:
            ConfigError: there are fewer GPUs than processes here, or the device serves only one.
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
            box[1].is_told = not self.is_first
            raise box[1]
        made: T = box[0]
        return made

    def in_all(self, make: Callable[[], T]) -> T:
        """Return what `make` gives in this process; raise in all what it raises in one of them."""
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
                shared.is_told = not self.is_first
                raise shared
        return cast("T", made)  # it was, where nobody raised

    def exchange(self, own: T) -> list[T]:
        """Return what each process gives, in their order."""
        if self.count == 1:
            return [own]
        said: list[Any] = [None] * self.count
        distributed.all_gather_object(said, own)
        return said

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Refuse a process that is about to compute something else than the first one.

        Args:
            values: what decides the run, by dotted name, as JSON would hold it.

        Raises:
            ConfigError: naming every process and field that differs, in all of them.
        """
        if self.count == 1:
            return
        said: list[Any] = [None] * self.count
        distributed.all_gather_object(said, (socket.gethostname(), dict(values)))
        where, first = said[0]
        problems = []
        for rank, (host, own) in enumerate(said):
            other = [key for key in sorted({**first, **own}) if first.get(key) != own.get(key)]
            shown = listing(f"{key} is {own.get(key)!r} and {first.get(key)!r} there"
                            for key in other)  # fmt: skip
            if other:
                problems.append(
                    f"rank {rank} ({host}) is not of the same run as rank 0 ({where}): {shown}. "
                    "Nothing was trained. Give all processes the same flags, files and versions."
                )
        if problems:
            error = ConfigError(problems)
            error.is_told = not self.is_first
            raise error

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
    """Return those that a launcher has started; one process where there is no launcher.

    Raises:
        ConfigError: what it says in the environment does not fit together.
    """
    return Processes(read_world())


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
    by = f" by {processes.world.launcher}" if processes.world.launcher else ""
    if wish is not None and wish != count and not (rows_only and count == 1):
        raise ConfigError(
            f"--num-processes {wish}: {count} {'process was' if count == 1 else 'processes were'} "
            f"started{by}. Run it by the ftlevel program, which starts them, or by torchrun "
            f"--nproc-per-node {wish} -m ftlevel train …"
        )
    number = wish if rows_only else count
    number = None if number == 1 else number
    train = config.train.model_copy(update={"num_processes": number})
    return config.model_copy(update={"train": train})
