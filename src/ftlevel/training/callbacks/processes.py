"""Report processes of a run that stop responding or delay the others."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlevel.training.processes import Processes

PATIENCE = 15.0
"""Seconds without a heartbeat after which a process is reported."""
_EVERY = 2.0
_LONGER = 5  # multiple of the median step time
_KEY = "ftlevel/signs/{rank}"


class WatchProcesses(TrainerCallback):
    """Send a heartbeat every two seconds, and report processes whose heartbeat is missing.

    Heartbeats use the process group's store, which needs no collective call. Rank 0 watches the
    others; rank 1 watches rank 0, which may host the store. Each process is reported once until it
    recovers. Use as a context manager around training.
    """

    def __init__(self, processes: Processes, warn: Callable[[str], None]) -> None:
        self._world = processes.world
        rank, count = processes.world.rank, processes.count
        self._watched = {0: range(1, count), 1: range(1)}.get(rank, range(0))
        self._warn = warn if rank == 0 else self._say
        self._step = 0
        self._ended = threading.Event()
        self._heard = time.monotonic()
        self._signs: dict[int, tuple[float, Any]] = {}  # time received, and content
        self._steps: list[float] = []
        self._began = 0.0

    @staticmethod
    def _say(message: str) -> None:
        sys.stderr.write(f"warning: {message}\n")
        sys.stderr.flush()

    def __enter__(self) -> WatchProcesses:
        """Start the threads if there are several processes."""
        if self._world.size > 1:
            threading.Thread(target=self._exchange, daemon=True).start()
        if len(self._watched):
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the start of a step, whose rows are read."""
        now = time.monotonic()
        if self._began:
            self._steps = [*self._steps[-9:], now - self._began]
        self._began, self._step = now, state.global_step + 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the heartbeats; the first process continues alone."""
        self._ended.set()

    def _exchange(self) -> None:
        """Send this process's heartbeat and read those of watched ranks, until the run ends."""
        world, number = self._world, 0
        host = socket.gethostname()
        try:
            store = distributed.TCPStore(  # type: ignore[attr-defined]
                world.address,
                world.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=PATIENCE),
            )
        except RuntimeError:  # the launcher has another kind of store
            self._ended.set()
            return
        before: dict[int, str] = {}
        while not self._ended.wait(_EVERY):
            number += 1
            try:
                store.set(_KEY.format(rank=world.rank), json.dumps([number, host, self._step]))
                keys = {rank: _KEY.format(rank=rank) for rank in self._watched}
                known = {rank: key for rank, key in keys.items() if store.check([key])}
                said = store.multi_get(list(known.values())) if known else []
            except RuntimeError:  # the store or its host process is gone
                continue
            self._heard = time.monotonic()
            for rank, sign in zip(known, (sign.decode() for sign in said), strict=True):
                if before.get(rank) != sign:
                    before[rank] = sign
                    self._signs[rank] = (self._heard, json.loads(sign))

    def _watch(self) -> None:
        """Report each missing process once, until it recovers."""
        named: set[int] = set()
        last = time.monotonic()
        while not self._ended.wait(_EVERY):
            now = time.monotonic()
            if now - last > PATIENCE:  # this process itself was suspended
                self._heard = now
                self._signs = {rank: (now, said) for rank, (_, said) in self._signs.items()}
            last = now
            missed = dict(self._missed(now))
            for rank, message in missed.items():
                if rank not in named:
                    self._warn(message)
            named = set(missed)

    def _missed(self, now: float) -> Iterator[tuple[int, str]]:
        """Yield the ranks that delay the others, with a message."""
        mine = self._step
        is_alone = self._world.rank > 0 and now - self._heard > PATIENCE  # rank 0 hosts the store
        is_long = now - self._began > max(PATIENCE, self._usual())
        for rank, (came, (_, host, step)) in self._signs.items():
            who = f"rank {rank} ({host})"
            if is_alone or now - came > PATIENCE:
                message = (
                    f"{who} has not responded for {PATIENCE:.0f} s, and the others wait for it at "
                    f"step {mine}: it hangs, or its machine or network does."
                )
                yield rank, message
            elif is_long and step < mine and now - came < 3 * _EVERY:  # with a heartbeat
                message = (
                    f"{who} has not begun step {mine} for {PATIENCE:.0f} s, and the others wait "
                    "for it: it reads rows, writes or scores for longer than they do."
                )
                yield rank, message

    def _usual(self) -> float:
        return _LONGER * statistics.median(self._steps) if self._steps else float("inf")
