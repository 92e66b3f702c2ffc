"""The malloc arena limit of training processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from ftlevel.cli.startup import NUM_ARENAS

CODE = """
import ctypes, threading
from ftlevel.cli.startup import limit_malloc_arenas
done = limit_malloc_arenas()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
found, all_are_there = [], threading.Barrier(6)

def ask():
    all_are_there.wait()
    found.append(library.malloc(50_000))
    all_are_there.wait()

threads = [threading.Thread(target=ask) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
maps = [line.split() for line in open("/proc/self/maps")]
(low, high), *_ = [m[0].split("-") for m in maps if m[-1] == "[heap]"]
is_main = [int(low, 16) <= at < int(high, 16) for at in found]
heaps = {0 if main else at >> 26 for at, main in zip(found, is_main)}  # others begin at 64 MiB
print(done, len(heaps))
"""


def run(**environment: str) -> str:
    inherited = {n: v for n, v in os.environ.items() if "MALLOC" not in n and n != "LD_PRELOAD"}
    process = subprocess.run(
        [sys.executable, "-c", CODE], env={**inherited, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return process.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
def test_threads_use_limited_number_of_arenas():
    assert run() == f"True {NUM_ARENAS}"
    limited, heaps = run(MALLOC_ARENA_MAX="8").split()
    assert limited == "False"
    assert int(heaps) > NUM_ARENAS


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_user_malloc_settings_are_not_overridden(name: str):
    value = "glibc.malloc.arena_max=8" if name == "GLIBC_TUNABLES" else "8"
    assert run(**{name: value}).startswith("False")
