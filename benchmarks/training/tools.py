"""Commands of each tool for a workload, through its public CLI or Python API.

`ftlevel` and `plain` run in the environment of the benchmark; every other tool has its own (`--peer
NAME=PYTHON`, or `--venvs FOLDER` with FOLDER/NAME). `docs/performance.md` describes how to install
them, and the tested versions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from training.workloads import Work

DIRECTORY = Path(__file__).resolve().parent
TEMPLATE = DIRECTORY / "chatml.jinja"  # SmolLM2's, with marks around the supervised text
THREADS = os.environ.get("OMP_NUM_THREADS") or str(psutil.cpu_count(logical=False) or 1)


class UnsupportedError(Exception):
    """The tool does not support the workload; the message has the reason."""


@dataclass(frozen=True)
class Tool:
    """A training tool; `command` maps workload, directory and the tool's Python to a command line.

    `peer` is the required `--peer`, empty for this environment.
    """

    name: str
    command: Callable[[Work, Path, str], list[str]]
    peer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def ftlevel(work: Work, folder: Path, python: str, *flags: str) -> list[str]:
    """Return the `ftlevel train` command."""
    method = "qlora" if work.quant == "4bit" else "lora"
    return [
        python, "-m", "ftlevel", "train", "--quiet", "--method", method, "--model", work.model,
        "--dataset", work.rows, "--task", work.task, "--max-length", str(work.max_length),
        "--dtype", work.dtype, "--set", f"model.device={work.device}",
        *(["--double-quant"] if work.quant == "4bit" else []), "--num-train-epochs", "1",
        "--per-device-train-batch-size", str(work.batch), "--seed", str(work.seed),
        "--gradient-accumulation-steps", str(work.accumulate), "--logging-steps", "1",
        "--learning-rate", str(work.learning_rate), "--lr-scheduler-type", "constant",
        "--output-dir", str(folder / "run"), "--overwrite", *flags,
    ]  # fmt: skip


def plain(work: Work, folder: Path, python: str) -> list[str]:
    """Return the plain script."""
    work.write(folder / "spec.json", sorted=False)
    return [python, str(DIRECTORY / "plain.py"), str(folder / "spec.json")]


def plain_sorted(work: Work, folder: Path, python: str) -> list[str]:
    """Return the plain script with rows of similar length in a batch, its fastest option."""
    command = plain(work, folder, python)
    work.write(folder / "spec.json", sorted=True)
    return command


def trl(work: Work, folder: Path, python: str, *flags: str) -> list[str]:
    """Return `trl sft`, trained on the answers of a chat."""
    _require_chats(work)
    data = folder / "data"
    data.mkdir(exist_ok=True)
    _write(data / "train.jsonl", _read(work))
    quant = ["--load_in_4bit", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant"]
    return [
        str(Path(python).parent / "trl"), "sft", "--model_name_or_path", work.model,
        "--dataset_name", str(data), "--output_dir", str(folder / "run"), "--dtype", work.dtype,
        "--max_length", str(work.max_length), "--num_train_epochs", "1",
        "--per_device_train_batch_size", str(work.batch),
        "--gradient_accumulation_steps", str(work.accumulate),
        "--learning_rate", str(work.learning_rate), "--lr_scheduler_type", "constant",
        "--seed", str(work.seed), "--use_peft", "--lora_r", "8", "--lora_alpha", "16",
        "--lora_dropout", "0", "--lora_target_modules", "all-linear",
        "--chat_template_path", str(TEMPLATE), "--assistant_only_loss", "true",
        "--bf16", "true" if work.dtype == "bfloat16" else "false",
        "--gradient_checkpointing", "false", "--logging_steps", "1", "--save_strategy", "no",
        "--report_to", "none", *_cpu(work, ["--use_cpu"]),
        *(quant if work.quant == "4bit" else []), *flags,
    ]  # fmt: skip


def trl_packed(work: Work, folder: Path, python: str) -> list[str]:
    """Return `trl sft` with packing: the rows of a micro-batch become one, without padding."""
    command = trl(work, folder, python, "--packing", "true", "--packing_strategy", "bfd")
    rows, accumulate = work.packs()
    command[command.index("--per_device_train_batch_size") + 1] = str(rows)
    command[command.index("--gradient_accumulation_steps") + 1] = str(accumulate)
    return command


def unsloth(work: Work, folder: Path, python: str) -> list[str]:
    """Return a script on Unsloth's Python API, with rows of similar length in a batch."""
    _require_chats(work)
    work.write(folder / "spec.json", sorted=True, template=str(TEMPLATE))
    return [python, str(DIRECTORY / "unsloth_api.py"), str(folder / "spec.json")]


def llamafactory(work: Work, folder: Path, python: str) -> list[str]:
    """Return `llamafactory-cli train` with packing under a block-diagonal mask."""
    _require_chats(work)
    _write(folder / "rows.jsonl", _read(work))
    rows, accumulate = work.packs()
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user",
            "assistant_tag": "assistant", "system_tag": "system"}  # fmt: skip
    entry = {"file_name": "rows.jsonl", "formatting": "sharegpt", "tags": tags,
             "columns": {"messages": "messages"}}  # fmt: skip
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}), encoding="utf-8")
    config = {
        "stage": "sft", "do_train": True, "model_name_or_path": work.model, "template": "smollm2",
        "finetuning_type": "lora", "lora_target": "all", "lora_rank": 8, "lora_alpha": 16,
        "lora_dropout": 0.0, "dataset": "rows", "dataset_dir": str(folder),
        "cutoff_len": work.max_length, "output_dir": str(folder / "run"),
        "per_device_train_batch_size": rows, "num_train_epochs": 1.0,
        "gradient_accumulation_steps": accumulate, "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant", "seed": work.seed, "bf16": work.dtype == "bfloat16",
        "disable_gradient_checkpointing": True, "packing": True, "neat_packing": True,
        "use_cpu": work.device == "cpu",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "overwrite_cache": True,
    }  # fmt: skip
    if work.quant == "4bit":
        config |= {"quantization_bit": 4, "quantization_method": "bnb",
                   "quantization_type": "nf4", "double_quantization": True}  # fmt: skip
    path = folder / "train.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return [str(Path(python).parent / "llamafactory-cli"), "train", str(path)]


WITH_THREADS = {"OMP_NUM_THREADS": THREADS}
TOOLS = (
    Tool("ftlevel", ftlevel),
    Tool("plain", plain),
    Tool("plain, sorted", plain_sorted),
    Tool("trl", trl, "trl", WITH_THREADS),
    Tool("trl, packing", trl_packed, "trl", WITH_THREADS),
    Tool("unsloth, sorted", unsloth, "unsloth"),
    Tool("llamafactory, neat_packing", llamafactory, "llamafactory"),
)
PEERS = tuple(dict.fromkeys(tool.peer for tool in TOOLS if tool.peer))


def select(peers: Mapping[str, str], only: Collection[str] | None) -> list[tuple[Tool, str]]:
    """Return the available tools with their Python; only those named by `only`, if given."""
    return [
        (tool, peers.get(tool.peer, sys.executable))
        for tool in TOOLS
        if (not tool.peer or tool.peer in peers) and (not only or tool.name in only)
    ]


def _require_chats(work: Work) -> None:
    if work.task != "text-generation":
        raise UnsupportedError("its command trains language models only")


def _cpu(work: Work, flags: list[str]) -> list[str]:
    return flags if work.device == "cpu" else []


def _read(work: Work) -> list[dict[str, Any]]:
    lines = Path(work.rows).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
