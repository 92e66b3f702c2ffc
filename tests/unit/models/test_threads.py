"""Tests of the number of CPU threads: physical cores, affinity and container quota."""

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
def test_hyperthreads_are_counted_once_per_core(siblings, cpus, cores, tmp_path):
    for cpu, text in enumerate(siblings):
        write(tmp_path / f"cpu{cpu}/topology/thread_siblings_list", text + "\n")
    assert hardware.get_num_cores(cpus, tmp_path) == cores


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2.5),
        ("0::/not/here\n", {"cpu.max": "100000 100000\n"}, 1.0),  # the container's root group
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, None),
        ("3:memory:/m\n1:cpu,cpuacct:/a\n",
         {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("1:cpu:/a\n",
         {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_cpu_quota_is_minimum_of_cgroups(membership, files, quota, tmp_path):
    write(tmp_path / "self", membership)
    for name, text in files.items():
        write(tmp_path / "root" / name, text)
    assert hardware.get_cpu_quota(tmp_path / "self", tmp_path / "root") == quota
    assert hardware.get_cpu_quota(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("omp", "set_before", "quota", "expected", "reason"),
    [
        ("1", 8, None, 8, "OMP_NUM_THREADS"),
        ("", 8, None, 4, "auto: one a physical core"),
        ("", 4, None, 4, "auto: one a physical core"),
        ("", 4, 16.0, 4, "auto: one a physical core"),
        ("", 4, 2.5, 2, "the container's quota is 2.5 CPUs"),
        ("", 4, 0.5, 1, "the container's quota is 0.5 CPUs"),
        ("", 3, None, 3, "as set in torch"),
    ],
)
def test_select_threads_respects_user_setting_and_quota(
    omp, set_before, quota, expected, reason, monkeypatch
):
    thread_count = [set_before]
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(torch, "get_num_threads", lambda: thread_count[0])
    monkeypatch.setattr(
        torch, "set_num_threads", lambda n: thread_count.append(n) or thread_count.pop(0)
    )
    monkeypatch.setattr(hardware, "allowed_cpus", lambda: list(range(8)))
    monkeypatch.setattr(hardware, "get_num_cores", lambda cpus: len(cpus) // 2)
    monkeypatch.setattr(hardware, "get_cpu_quota", lambda: quota)
    choice = hardware.select_threads()
    assert (choice.value, choice.reason) == (expected, reason)
    assert thread_count == [expected]
