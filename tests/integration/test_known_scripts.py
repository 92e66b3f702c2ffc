"""Commands of well-known examples, with local directories in place of Hub names."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ftlevel.cli.app import run

GPT2_ON_IMDB = """
ftlevel train --method lora --model_name_or_path gpt2 --dataset_name imdb
  --task_type text_generation --lora_r 8 --lora_alpha 16 --lora_dropout 0.05
  --target_modules c_attn,c_proj
  --num_train_epochs 3 --learning_rate 5e-4 --per_device_train_batch_size 4
"""
LLAMA_ON_SAMSUM = """
ftlevel train --method qlora --model_name_or_path meta-llama/Llama-2-7b-hf --dataset_name samsum
  --task_type summarization --quantization_type 4bit --double_quant --quant_type nf4 --lora_r 16
"""


def write_splits(
    folder: Path, train: list[dict[str, object]], test: list[dict[str, object]]
) -> None:
    folder.mkdir(parents=True)
    for name, create_rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in create_rows)
        (folder / f"{name}.jsonl").write_text(lines)


def imdb_rows(count: int) -> list[dict[str, object]]:
    return [
        {"text": f"Film {n} was {'a joy to see' if n % 2 else 'far too long'}.", "label": n % 2}
        for n in range(count)
    ]


def samsum_rows(count: int) -> list[dict[str, object]]:
    return [
        {
            "id": f"row-{n}",
            "dialogue": f"Anna: Shall we meet at {n % 12 + 1}?\r\nBen: Yes, at the station.",
            "summary": f"Anna and Ben will meet at {n % 12 + 1}.",
        }
        for n in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "family", "model", "dataset", "create_rows"),
    [
        (GPT2_ON_IMDB, "gpt2", "gpt2", "imdb", imdb_rows),
        (LLAMA_ON_SAMSUM, "llama", "meta-llama/Llama-2-7b-hf", "samsum", samsum_rows),
    ],
    ids=["gpt2", "llama"],
)
def test_hub_names_resolve_to_local_directories(
    command: str,
    family: str,
    model: str,
    dataset: str,
    create_rows: Callable[[int], list[dict[str, object]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_dir: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir(family), tmp_path / model)
    write_splits(tmp_path / dataset, create_rows(24), create_rows(4))
    assert run([*shlex.split(command)[1:], "--quiet"]) == 0
    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["proof"]["adapter_effect"] > 0
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["model"]["name_or_path"] == str(tmp_path / model)
    assert config["data"]["dataset"] == str(tmp_path / dataset)
    assert config["method"]["r"] == int(
        shlex.split(command)[shlex.split(command).index("--lora_r") + 1]
    )
