"""The database of a hyperparameter search that several processes create at once."""

from __future__ import annotations

import multiprocessing
from typing import Any

import alembic.command
import alembic.config
import alembic.migration
import alembic.script  # noqa: F401 - Optuna imports them late; a fork then opens the database at once
import optuna  # noqa: F401

from ftlevel.extras.compare.search import Study

PROCESSES = 4


def load_study(url: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        Study("study", url, {}, 1e-3, "loss", "minimize", 3).load()
        results.put("loaded")
    except Exception as error:  # noqa: BLE001 - reported by the test
        results.put(repr(error))


def test_processes_that_create_one_database_all_load_it(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        barrier, results = context.Barrier(PROCESSES), context.Queue()
        args = (f"sqlite:///{tmp_path}/{attempt}.db", barrier, results)
        processes = [context.Process(target=load_study, args=args) for _ in range(PROCESSES)]
        for process in processes:
            process.start()
        assert [results.get(timeout=120) for _ in processes] == ["loaded"] * PROCESSES
        for process in processes:
            process.join()
