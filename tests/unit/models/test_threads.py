"""Threads of the CPU: physical cores, within affinity and the container's quota."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ftlevel.models import hardware


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("siblings", "cpus", "cores"),
    [
        (["0", "1", "2", "3"], [0, 1, 2, 3], 4),
        (["0,2", "1,3", "0,2", "1,3"], [0, 1, 2, 3], 2),
        (["0,2", "1,3", "0,2", "1,3"], [0, 2], 1),
        ([], [0, 1, 2], 3),
    ],
)
def test_hyperthreads_of_a_core_count_once(siblings, cpus, cores, tmp_path):
    for cpu, text in enumerate(siblings):
        write(tmp_path / f"cpu{cpu}/topology/thread_siblings_list", text + "\n")
    assert hardware.get_num_cores(cpus, tmp_path) == cores


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/not/here\n", {"cpu.max": "100000 100000\n"}, 1.0),  # a container's own root
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("3:memory:/m\n1:cpu,cpuacct:/a\n",
         {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("1:cpu:/a\n",
         {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_the_quota_is_the_narrowest_of_the_groups(membership, files, quota, tmp_path):
    write(tmp_path / "self", membership)
    for name, text in files.items():
        write(tmp_path / "root" / name, text)
    assert hardware.get_cpu_quota(tmp_path / "self", tmp_path / "root") == quota
    assert hardware.get_cpu_quota(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("omp", "set_before", "quota", "chosen", "reason"),
    [
        ("1", 8, None, 8, "OMP_NUM_THREADS"),
        ("", 8, None, 4, "auto: one a physical core"),
        ("", 4, None, 4, "auto: one a physical core"),
        ("", 4, 16.0, 4, "auto: one a physical core"),
        ("", 4, 2.5, 2, "the container's quota is 2.5 CPUs"),
        ("", 4, 0.5, 1, "the container's quota is 0.5 CPUs"),
        ("", 3, None, 3, "as torch was set"),
    ],
)
def test_nobody_who_has_chosen_is_overruled(
    omp, set_before, quota, chosen, reason, monkeypatch: pytest.MonkeyPatch
):
    now = [set_before]
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.append(n) or now.pop(0))
    monkeypatch.setattr(hardware, "allowed_cpus", lambda: list(range(8)))
    monkeypatch.setattr(hardware, "get_num_cores", lambda cpus: len(cpus) // 2)
    monkeypatch.setattr(hardware, "get_cpu_quota", lambda: quota)
    choice = hardware.select_threads()
    assert (choice.value, choice.reason) == (chosen, reason)
    assert now == [chosen]
