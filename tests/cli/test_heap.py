"""One heap for all threads of a training process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

WHERE = """
import ctypes, threading
from ftlevel.cli.heap import share_one_heap
done = share_one_heap()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
found = []
threads = [threading.Thread(target=lambda: found.append(library.malloc(50_000))) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
heap = [line.split()[0].split("-") for line in open("/proc/self/maps") if "[heap]" in line]
inside = [any(int(a, 16) <= at < int(b, 16) for a, b in heap) for at in found]
print(done, all(inside))
"""


def run(**environment: str) -> str:
    own = {n: v for n, v in os.environ.items() if "MALLOC" not in n and n != "LD_PRELOAD"}
    done = subprocess.run(
        [sys.executable, "-c", WHERE], env={**own, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
def test_what_threads_ask_for_comes_from_one_heap():
    assert run() == "True True"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_somebody_has_set_is_left_alone(name: str):
    value = "glibc.malloc.arena_max=8" if name == "GLIBC_TUNABLES" else "8"
    assert run(**{name: value}).startswith("False")
