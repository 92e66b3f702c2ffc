"""Collective operations of `Processes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ranks
from ftlevel.errors import RunError
from ftlevel.training import processes as module
from ftlevel.training.processes import Processes, started_processes
from ftlevel.world import World

NAMES = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")


def _exchange(folder: Path) -> None:
    processes = started_processes()
    processes.join()
    rank = processes.world.rank
    squares = processes.divide(lambda own: [(n * n, rank) for n in own], range(5))
    gathered = processes.gather_rows(torch.full((rank, 2), float(rank)), [0, 1, 2])
    on_machine = processes.ranks_on_machine()

    def fail(own: range) -> list[int]:
        if rank == 1:
            raise RunError("no")
        return list(own)

    try:
        processes.divide(fail, range(3))
        message = ""
    except RunError as error:
        message = str(error)
    own: list[int] = []
    equal = processes.divide(lambda part: own.extend(part) or part, range(4), equally=True)
    values = [squares, [part.tolist() for part in gathered], on_machine, bool(message), equal, own]
    (folder / f"{rank}.json").write_text(json.dumps(values))


def test_processes_divide_items_and_gather_rows(tmp_path):
    """All processes get all results in order; an error in one is raised in all."""
    assert ranks.end(ranks.start(_exchange, [(tmp_path,)] * 3), 60) == [0, 0, 0]
    squares = [[n * n, n % 3] for n in range(5)]
    rows = [[], [[1.0, 1.0]], [[2.0, 2.0]] * 2]
    for rank in range(3):
        content = json.loads((tmp_path / f"{rank}.json").read_text())
        own = [[0, 3], [1, 3], [2, 3]][rank]
        assert content == [squares, rows, [0, 1, 2], True, [0, 1, 2, 3], own]


def test_single_process_computes_all_items():
    assert Processes().divide(lambda own: [n + 1 for n in own], [1, 2]) == [2, 3]


@pytest.mark.parametrize(("is_supported", "device", "count", "preset", "expected"), [
    (False, "cuda", 2, {}, dict.fromkeys(NAMES, "1")),
    (False, "cuda", 2, {NAMES[0]: "0"}, {NAMES[0]: "0", NAMES[1]: "1"}),
    (True, "cuda", 2, {}, {}), (False, "cpu", 2, {}, {}), (False, "cuda", 1, {}, {}),
])  # fmt: skip
def test_unsupported_transports_are_disabled(
    monkeypatch, is_supported, device, count, preset, expected
):  # fmt: skip
    monkeypatch.setattr(module, "check_cuda_p2p_ib_support", lambda: is_supported)
    environment = dict(preset)
    processes = Processes(World("torchrun", count))
    choices = processes.disable_unsupported_transports(device, environment)
    assert environment == expected
    changed = [name for name in NAMES if name in expected and name not in preset]
    assert [str(choice.value) for choice in choices] == (
        [" ".join(f"{name}=1" for name in changed)] if changed else []
    )
