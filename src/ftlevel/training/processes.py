"""The processes of a run, one per device, as started by a launcher.

Every process resolves the same run from the same files; this is checked. Only the first process
prints and writes; all compute each optimizer step together. Processes that stop responding or delay
the others are reported.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import check_cuda_p2p_ib_support
from torch import Tensor, distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.config import TrainerConfig
from ftlevel.config.section import Choice
from ftlevel.errors import ConfigError, FtlevelError, RunError, join_names
from ftlevel.world import World, get_world

_NCCL_VARIABLES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Processes:
    """The processes of a run (count and rank from the environment) and collective operations."""

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
        """Initialize the process group, with gloo for CPU tensors and NCCL for GPU tensors."""
        if self.count == 1 or distributed.is_initialized():
            return
        self.world.publish()
        address = f"{self.world.address}:{self.world.port}"
        try:
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            )
        except (distributed.DistError, RuntimeError) as error:
            message = " ".join(str(error).split("\n")[0].split())
            raise RunError(
                f"rank {self.world.rank} of {self.count} ({socket.gethostname()}) could not "
                f"connect to the others at {address}: {message}. Check their output, and that "
                f"MASTER_ADDR and MASTER_PORT are equal for all."
            ) from None

    def select_device(self, device: str) -> None:
        """Select the GPU with the local rank of this process; ConfigError if there is none."""
        if self.count == 1:
            return
        launcher = f"{self.count} processes of {self.world.launcher}"
        if device == "mps":
            raise ConfigError(
                f"{launcher}: Apple's GPU serves one process. Use --device cpu, or one."
            )
        if device == "cuda":
            gpus, local = torch.cuda.device_count(), self.world.local_rank
            if local >= gpus:
                raise ConfigError(
                    f"{launcher}: local rank {local} needs a GPU of its own, and "
                    f"{socket.gethostname()} has {gpus}. Start {gpus} processes on this machine."
                )
            torch.cuda.set_device(local)

    def disable_unsupported_transports(
        self, device: str, environment: MutableMapping[str, str] = os.environ
    ) -> list[Choice]:
        """Disable NCCL's P2P and InfiniBand where the driver does not support them.

        RTX 40 cards need this with drivers before 550.40.07; accelerate's launcher does the same.
        Sets variables of `environment` (modified) that have no value; returns them as log lines.
        """
        if self.count == 1 or device != "cuda" or check_cuda_p2p_ib_support():
            return []
        names = [name for name in _NCCL_VARIABLES if name not in environment]
        environment.update(dict.fromkeys(names, "1"))
        reason = "auto: several RTX 40 cards with a driver before 550.40.07"
        variables = " ".join(f"{name}=1" for name in names)
        return [Choice("NCCL", variables, reason)] if names else []

    def wait(self) -> None:
        """Wait until all processes reach this call."""
        if self.count > 1:
            distributed.barrier()

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process; all processes return the result, or raise the error."""
        if self.count == 1:
            return make()
        shared: list[Any] = [None, None]
        if self.is_first:
            try:
                shared[0] = make()
            except FtlevelError as error:
                shared[1] = error
        distributed.broadcast_object_list(shared, src=0)
        if shared[1] is not None:
            shared[1].is_reported = not self.is_first
            raise shared[1]
        result: T = shared[0]
        return result

    def in_all(self, make: Callable[[], T]) -> T:
        """Call `make` in every process; returns this process's result, or raises if any fails."""
        if self.count == 1:
            return make()
        result, local_error, report = None, None, None
        try:
            result = make()
        except FtlevelError as error:
            local_error, report = error, (socket.gethostname(), str(error), error.exit_code)
        failures = self.all_gather(report)
        if local_error is not None and self.is_first:
            raise local_error
        for rank, other in enumerate(failures):
            if other is not None:
                host, message, code = other
                error_class = ConfigError if code == ConfigError.exit_code else RunError
                shared = error_class(message if failures[0] else f"rank {rank} ({host}): {message}")
                shared.is_reported = not self.is_first
                raise shared
        return cast("T", result)  # set if no process raised

    def all_gather(self, value: T) -> list[T]:
        """Returns the list of every process's `value`, in rank order, in all processes."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def divide(
        self,
        compute: Callable[[Sequence[T]], Sequence[R]],
        items: Sequence[T],
        *,
        equally: bool = False,
    ) -> list[R]:
        """Returns `compute(items)` in all processes; each computes every n-th of `items`.

        `compute` returns one result per item. Call it in all processes; if it fails in one, all
        raise. With `equally`, processes that have one item less compute the last one, too.
        """
        rank, count = self.world.rank, self.count
        own = list(items[rank::count])
        if equally and len(own) * count < len(items):
            own.append(items[-1])
        parts = self.all_gather(self.in_all(lambda: compute(own)))
        return [parts[at % count][at // count] for at in range(len(items))]

    def gather_rows(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Returns the tensors `rows` `(n, …)` of all processes; `counts` has the n of each.

        They are exchanged by the backend of their device: NCCL on a GPU.
        """
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def ranks_on_machine(self) -> list[int]:
        """Returns the ranks of the processes on this machine, in order."""
        host = socket.gethostname()
        return [rank for rank, other in enumerate(self.all_gather(host)) if other == host]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError in all processes, with every difference, if their `values` differ."""
        if self.count == 1:
            return
        gathered = self.all_gather((socket.gethostname(), dict(values)))
        first_host, first = gathered[0]
        errors = []
        for rank, (host, others) in enumerate(gathered):
            keys = [key for key in sorted({**first, **others}) if first.get(key) != others.get(key)]
            differences = join_names(
                f"{key} is {others.get(key)!r} and {first.get(key)!r} there" for key in keys
            )
            if keys:
                errors.append(
                    f"rank {rank} ({host}) is not of the same run as rank 0 ({first_host}): "
                    f"{differences}. Nothing was trained. Use the same flags, files and versions "
                    "for all processes."
                )
        if errors:
            error = ConfigError(errors)
            error.is_reported = not self.is_first
            raise error

    def any(self, flag: bool) -> bool:
        """Returns whether `flag` is set in any process."""
        return bool(self.max(int(flag)))

    def mean(self, value: float) -> float:
        """Returns the mean of `value` over all processes."""
        return self.sum(value) / self.count

    def sum(self, value: float) -> float:
        """Returns the sum of `value` over all processes."""
        if self.count == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(box)
        return float(box)

    def max(self, value: int) -> int:
        """Returns the maximum of `value` over all processes."""
        if self.count == 1:
            return value
        box = torch.tensor(value)
        distributed.all_reduce(box, distributed.ReduceOp.MAX)
        return int(box)


def started_processes() -> Processes:
    """Returns the processes that a launcher started; without a launcher, a single one."""
    return Processes(get_world())


def resolve_processes(
    train: TrainerConfig, processes: Processes, is_dry_run: bool
) -> TrainerConfig:
    """Returns `train` with the number of started processes; ConfigError if it sets another.

    A dry run in one process keeps the configured number.
    """
    requested, size = train.num_processes, processes.count
    by = f" by {processes.world.launcher}" if processes.world.launcher else ""
    if requested is not None and requested != size and not (is_dry_run and size == 1):
        raise ConfigError(
            f"--num-processes {requested}: {size} "
            f"{'process was' if size == 1 else 'processes were'} "
            f"started{by}. Run it with the ftlevel program, which starts them, or with torchrun "
            f"--nproc-per-node {requested} -m ftlevel train …"
        )
    num_processes = requested or size
    return train.model_copy(update={"num_processes": num_processes if num_processes > 1 else None})


HEARTBEAT_TIMEOUT = 15.0
"""Seconds without a heartbeat after which a process is reported."""
_INTERVAL = 2.0
_STEP_FACTOR = 5  # multiple of the median step time
_KEY = "ftlevel/signs/{rank}"


class WatchProcesses(TrainerCallback):
    """Callback that sends a heartbeat every two seconds, and `warn`s of processes without one.

    Heartbeats use the process group's store, which needs no collective call. Rank 0 watches the
    others; rank 1 watches rank 0, which may host the store. A missing process is reported once, and
    again if it recovers and then goes missing. Use as a context manager around training.
    """

    def __init__(self, processes: Processes, warn: Callable[[str], None]) -> None:
        self._world = processes.world
        rank, size = processes.world.rank, processes.count
        self._watched = {0: range(1, size), 1: range(1)}.get(rank, range(0))
        self._warn = warn if rank == 0 else self._write
        self._step = 0
        self._ended = threading.Event()
        self._last_contact = time.monotonic()
        self._heartbeats: dict[int, tuple[float, Any]] = {}  # time received, and content
        self._steps: list[float] = []
        self._step_start = 0.0

    @staticmethod
    def _write(message: str) -> None:
        sys.stderr.write(f"warning: {message}\n")
        sys.stderr.flush()

    def __enter__(self) -> WatchProcesses:
        """Start the threads that send and check heartbeats, if there are several processes."""
        if self._world.size > 1:
            threading.Thread(target=self._send_heartbeats, daemon=True).start()
        if len(self._watched):
            threading.Thread(target=self._check_ranks, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record that this process has read the rows of a step and starts to compute it."""
        now = time.monotonic()
        if self._step_start:
            self._steps = [*self._steps[-9:], now - self._step_start]
        self._step_start, self._step = now, state.global_step + 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the heartbeats: after training, only the first process continues."""
        self._ended.set()

    def _send_heartbeats(self) -> None:
        world, number = self._world, 0
        host = socket.gethostname()
        try:
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                world.address,
                world.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=HEARTBEAT_TIMEOUT),
            )
        except RuntimeError:  # the launcher has another type of store
            self._ended.set()
            return
        previous: dict[int, str] = {}
        while not self._ended.wait(_INTERVAL):
            number += 1
            try:
                store.set(_KEY.format(rank=world.rank), json.dumps([number, host, self._step]))
                keys = {rank: _KEY.format(rank=rank) for rank in self._watched}
                keys_by_rank = {rank: key for rank, key in keys.items() if store.check([key])}
                heartbeats = store.multi_get(list(keys_by_rank.values())) if keys_by_rank else []
            except RuntimeError:  # the store or its host process is gone
                continue
            self._last_contact = time.monotonic()
            for rank, sign in zip(
                keys_by_rank, (sign.decode() for sign in heartbeats), strict=True
            ):
                if previous.get(rank) != sign:
                    previous[rank] = sign
                    self._heartbeats[rank] = (self._last_contact, json.loads(sign))

    def _check_ranks(self) -> None:
        known_ranks: set[int] = set()
        last = time.monotonic()
        while not self._ended.wait(_INTERVAL):
            now = time.monotonic()
            if now - last > HEARTBEAT_TIMEOUT:  # this process itself was suspended
                self._last_contact = now
                self._heartbeats = {
                    rank: (now, sign) for rank, (_, sign) in self._heartbeats.items()
                }
            last = now
            missing = dict(self._get_missing(now))
            for rank, message in missing.items():
                if rank not in known_ranks:
                    self._warn(message)
            known_ranks = set(missing)

    def _get_missing(self, now: float) -> Iterator[tuple[int, str]]:
        """Yields (rank, message) for each rank that, at time `now`, is silent or behind."""
        mine = self._step
        # Rank 0 hosts the store.
        is_isolated = self._world.rank > 0 and now - self._last_contact > HEARTBEAT_TIMEOUT
        is_long = now - self._step_start > max(HEARTBEAT_TIMEOUT, self._max_step_seconds())
        for rank, (received_at, (_, host, step)) in self._heartbeats.items():
            name = f"rank {rank} ({host})"
            if is_isolated or now - received_at > HEARTBEAT_TIMEOUT:
                message = (
                    f"{name} has not responded for {HEARTBEAT_TIMEOUT:.0f} s, and the others "
                    f"wait for it at step {mine}: it hangs, or its machine or network does."
                )
                yield rank, message
            elif is_long and step < mine and now - received_at < 3 * _INTERVAL:  # with a heartbeat
                message = (
                    f"{name} has not started step {mine} for {HEARTBEAT_TIMEOUT:.0f} s, and the "
                    f"others wait for it (reading, writing or evaluating)."
                )
                yield rank, message

    def _max_step_seconds(self) -> float:
        return _STEP_FACTOR * statistics.median(self._steps) if self._steps else float("inf")
