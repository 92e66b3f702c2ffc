"""Training from every column format and file format."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Cli
from run_files import ModelDir

Rows = list[dict[str, Any]]
WORDS = ("argument", "parser", "module", "string", "value", "object", "file", "path")
CALL = {"name": "look", "arguments": {"word": "value"}}


def phrase(i: int) -> str:
    return f"the {WORDS[i % 8]} {WORDS[i * 3 % 7]} {i}"


def turns(i: int, role: str, text: str, names: tuple[str, str, str]) -> list[dict[str, str]]:
    system, user, assistant = names
    return [
        {role: system, text: "Be brief."},
        {role: user, text: phrase(i)},
        {role: assistant, text: phrase(i + 1)},
        {role: user, text: phrase(i + 2)},
        {role: assistant, text: phrase(i + 3)},
    ]


def tool_turns(i: int) -> Rows:
    return [
        {"from": "human", "value": phrase(i)},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": phrase(i + 1)},
        {"from": "gpt", "value": phrase(i + 2)},
    ]


def squad_row(i: int) -> dict[str, Any]:
    context = f"There is {phrase(i)} and {phrase(i + 1)}."
    answer = {"text": [phrase(i)], "answer_start": [9]}
    return {"context": context, "question": "What is there?", "answers": answer}


OPENAI, SHAREGPT = ("system", "user", "assistant"), ("system", "human", "gpt")
TOOLS = json.dumps([{"type": "function", "function": {"name": "look"}}])
FORMATS: dict[str, tuple[str, str, Callable[[int], dict[str, Any]]]] = {
    "text": ("text-generation", "llama", lambda i: {"text": phrase(i)}),
    "prompt + completion": (
        "text-generation", "llama", lambda i: {"prompt": phrase(i), "completion": phrase(i + 1)}),
    "instruction + output": (
        "text-generation", "llama",
        lambda i: {"instruction": phrase(i), "input": "", "output": phrase(i + 1)}),
    "messages": (
        "text-generation", "qwen2", lambda i: {"messages": turns(i, "role", "content", OPENAI)}),
    "conversations": (
        "text-generation", "qwen2",
        lambda i: {"conversations": turns(i, "from", "value", SHAREGPT)}),
    "conversations with tools": (
        "text-generation", "qwen2", lambda i: {"conversations": tool_turns(i), "tools": TOOLS}),
    "document + summary": (
        "summarization", "t5", lambda i: {"document": phrase(i) * 2, "summary": phrase(i)}),
    "source + target": (
        "translation", "t5", lambda i: {"source": phrase(i), "target": phrase(i + 1)}),
    "text + label": (
        "text-classification", "bert", lambda i: {"text": phrase(i), "label": "ab"[i % 2]}),
    "text + label as numbers": (
        "text-classification", "bert", lambda i: {"text": phrase(i), "label": i % 2}),
    "text + several labels": (
        "text-classification", "bert",
        lambda i: {"text": phrase(i), "label": ["x", "y"][: i % 3]}),
    "text + text_pair + label": (
        "text-classification", "bert",
        lambda i: {"premise": phrase(i), "hypothesis": phrase(i + 1), "label": i % 2}),
    "tokens + tags": (
        "token-classification", "bert",
        lambda i: {"tokens": phrase(i).split(), "tags": ["O", "B-X", "O", "O"]}),
    "context + question + answers": ("question-answering", "bert", squad_row),
}  # fmt: skip


def write_jsonl(path: Path, rows: Rows) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: Rows) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_csv(path: Path, rows: Rows) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Rows) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def write_saved(path: Path, rows: Rows) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


def write_directory(path: Path, rows: Rows) -> Path:
    path.mkdir()
    write_jsonl(path / "train", rows[:-4])
    write_csv(path / "validation", rows[-4:])
    return path


def write_text(path: Path, rows: Rows) -> Path:
    path = path.with_suffix(".txt")
    path.write_text("\n\n".join(row["prompt"] for row in rows), encoding="utf-8")
    return path


WRITERS = (
    write_text,
    write_jsonl,
    write_json,
    write_csv,
    write_parquet,
    write_saved,
    write_directory,
)


def train(data: Path, task: str, model: Path, out: Path, cli: Cli, *options: str) -> str:
    arguments = ["--dataset", data, "--task", task, "--model", model, "--output-dir", out,
                 "--max-steps", "2", "--learning-rate", "0.01", "--device", "cpu"]  # fmt: skip
    return cli("train", *arguments, *options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_column_format_trains(
    name: str, tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    task, family, row = FORMATS[name]
    data = write_jsonl(tmp_path / "rows", [row(i) for i in range(12)])
    head = "mlm" if family == "bert" else None
    options = ["--chat-template", "qwen"] if "tools" in name else []
    out = train(data, task, tiny_model_dir(family, head), tmp_path / "run", cli, *options)
    columns = name.partition(" as ")[0].partition(" with ")[0].replace("several labels", "label")
    assert f"columns: {columns}: " in out


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__.removeprefix("write_"))
def test_every_file_format_trains(
    write: Callable[[Path, Rows], Path], tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli
) -> None:
    rows = [{"prompt": phrase(i), "completion": phrase(i + 1)} for i in range(12)]
    data = write(tmp_path / "rows", rows)
    out = train(data, "text-generation", tiny_model_dir("llama"), tmp_path / "run", cli)
    columns = (
        "text: 'text'" if write is write_text else "prompt + completion: 'prompt', 'completion'"
    )
    assert f"columns: {columns}" in out


def test_mapped_columns_train(tmp_path: Path, tiny_model_dir: ModelDir, cli: Cli) -> None:
    rows = [{"frage": phrase(i), "antwort": phrase(i + 1)} for i in range(12)]
    data, model = write_jsonl(tmp_path / "rows", rows), tiny_model_dir("llama")
    assert (
        "Columns: 'frage', 'antwort'. Expected one of: messages, conversations, prompt + "
        "completion, instruction + output, text. Map the columns: --map prompt=frage "
        "--map completion=antwort."
    ) in cli.fails(f"train --dry-run --dataset {data} --model {model}")
    out = train(data, "text-generation", model, tmp_path / "run", cli,
                "--map", "prompt=frage", "--map", "completion=antwort")  # fmt: skip
    assert "columns: prompt + completion: prompt from 'frage', completion from 'antwort'" in out
