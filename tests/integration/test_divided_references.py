"""Values of reference, teacher and guide models are computed by all processes, a part each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ranks
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.extras.preference import likelihoods
from ftlevel.training import teacher
from ftlevel.training.processes import started_processes
from run_files import ModelDir

ITEMS = 10


def _fill_file(folder: Path, name: str | None) -> None:
    """Compute an array in this process and the others; write what this one computed."""
    processes = started_processes()
    processes.join()
    rank = processes.world.rank
    computed: list[int] = []

    def fill(array: np.ndarray, index: int, count: int) -> None:
        for item in range(ITEMS)[index::count]:
            if np.isnan(array[item]).any():
                array[item] = item, rank
                computed.append(item)

    path = folder / name if name else None
    results = [
        teacher.open_or_compute(path, (ITEMS, 2), np.dtype(np.float32), fill, processes)
        for _ in range(2)
    ]
    content = [(array.tolist(), was_cached) for array, was_cached in results]
    (folder / f"rank{rank}.json").write_text(json.dumps([computed, content]))


@pytest.mark.parametrize("name", ["values.npy", None])
def test_processes_fill_parts_of_one_array(tmp_path: Path, name: str | None) -> None:
    """A file is completed: its first two items are there. Without one, all is computed twice."""
    if name:
        array = np.full((ITEMS, 2), np.nan, dtype=np.float32)
        array[:2] = [[0, 7], [1, 7]]
        np.save(tmp_path / name, array)
    processes = ranks.start(_fill_file, [(tmp_path, name)] * 2)
    assert ranks.end(processes, 60) == [0, 0]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    expected = [[item, item % 2] for item in range(ITEMS)]
    if name:
        expected[:2] = [[0, 7], [1, 7]]
        assert [first[0], second[0]] == [[2, 4, 6, 8], [3, 5, 7, 9]]
        assert np.load(tmp_path / name).tolist() == expected
    else:
        assert [first[0], second[0]] == [[0, 2, 4, 6, 8] * 2, [1, 3, 5, 7, 9] * 2]
    assert first[1] == second[1] == [[expected, False], [expected, name is not None]]


def _row(i: int) -> dict[str, Any]:
    prompt, rejected = f"the {i} " * (1 + i % 4), "house " * (i % 5 + 1)
    return {"prompt": prompt, "chosen": f"a dog {i}", "rejected": rejected}


def _train_rank(config: TrainConfig, cache: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        for module in (likelihoods, teacher):
            patch.setattr(module, "CHUNK_SIZE", 4)
        train(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reference", "initial", "teacher"])
def test_cached_values_equal_those_of_one_process(
    kind: str, tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    for split, rows in (("train", range(18)), ("validation", range(18, 25))):
        lines = [json.dumps(_row(i)) + "\n" for i in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    other = str(tiny_model_dir("llama", seed=5))
    sections: dict[str, dict[str, Any]] = {
        "reference": {"preference": {"reference": other}},
        "initial": {"preference": {"loss": "dpo"}},
        "teacher": {"distillation": {"teacher": other},
                    "data": {"columns": {"prompt": "prompt", "completion": "chosen"}}},
    }[kind]  # fmt: skip
    values: dict[str, Any] = {
        "task": "text-generation" if kind == "teacher" else "preference",
        "model": {"name_or_path": str(tiny_model_dir("llama")), "dtype": "float32"},
        "data": {"dataset": str(tmp_path), **sections.pop("data", {})},
        "train": {"per_device_train_batch_size": 3, "max_steps": 1},
        "speed": {"verify": False},
        **sections,
    }
    stored = []
    for count in (1, 2):
        cache = tmp_path / f"cache{count}"
        output = {"dir": str(tmp_path / f"{count}")}
        config = TrainConfig.model_validate({**values, "output": output})
        ranks.run(_train_rank, config, cache, count=count)
        files = sorted(cache.rglob("*.npy"))
        stored.append({path.name: path.read_bytes() for path in files})
    assert len(stored[0]) == (1 if kind == "teacher" else 2), "validation rows have no teacher"
    assert stored[0] == stored[1]
