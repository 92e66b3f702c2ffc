from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Cli
from ftlevel.config import SPECS


def list_methods(cli: Cli, *flags: str) -> dict[str, dict]:
    report = cli.json("list-methods", *flags, "--json")
    return {row["name"]: row for row in report["methods"]}


def test_all_methods_are_listed(cli: Cli):
    rows = list_methods(cli)
    assert {row["method"] for row in rows.values()} == set(SPECS)
    assert rows["lora"]["works"] == "yes"
    assert rows["dora"]["works"] == "in part"
    assert rows["dora"]["reasons"] == [
        "not with --quant 8bit: PEFT cannot read 8-bit weights for the magnitude"
    ]


@pytest.mark.parametrize(
    ("flags", "row", "works"),
    [
        (["--model", "gpt2"], "oft", "in part"),
        (["--model", "gpt2", "--quant", "none"], "oft", "no"),
        (["--model", "gpt2", "--quant", "4bit"], "oft", "yes"),
        (["--model", "llama", "--quant", "4bit"], "full", "no"),
        (["--model", "flan-t5", "--task", "summarization"], "eva", "no"),
        (["--model", "bert", "--task", "text_generation"], "lora", "no"),
        (["--model", "granite", "--task", "text-classification"], "lora", "no"),
        (["--model", "mixtral"], "experts", "yes"),
        (["--model", "builtin:tiny-llama"], "experts", "no"),
    ],
)
def test_support_by_model_quantization_and_task(cli: Cli, flags, row, works):
    assert list_methods(cli, *flags)[row]["works"] == works


def test_model_directory_uses_its_model_type(cli: Cli, tiny_model_dir):
    assert list_methods(cli, "--model", str(tiny_model_dir("gpt2")), "--quant", "none")["lokr"][
        "reasons"
    ] == [
        "--method lokr cannot be used with gpt2: PEFT does not support its Conv1D layers. "
        "Use --method lora."
    ]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--quant", "3bit"],
         "--quant '3bit' is not known. Expected one of none, 4bit, 8bit. Did you mean '8bit'?"),
        (["--task", "summarisaton"], "Did you mean 'summarization'?"),
        (["--model", "lama"], "Did you mean 'llama'"),
        (["--model", "lama"], "use its directory or full id, OWNER/NAME."),
    ],
)  # fmt: skip
def test_unknown_values_are_rejected_with_suggestion(cli: Cli, flags, text):
    message = cli.fails("list-methods", *flags)
    assert text in message
    assert "list-targets" not in message


def test_text_output_fits_80_columns(cli: Cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("list-methods --model gpt2 --quant none")
    assert out.startswith("gpt2, --quant none\n\nlora          yes      two low-rank matrices")
    assert "oft           no       --method oft cannot be used with gpt2:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_list_methods_is_fast_and_imports_no_torch():
    code = (
        "import os, sys\nfrom ftlevel.cli.app import run\n"
        "run(['list-methods', '--model', 'llama'])\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'peft') if m in sys.modules])\n"
        "own = os.times().user\nfor _ in range(3_000_000): _ + 1\n"
        "print(own, os.times().user - own)"
    )
    ratios: list[float] = []
    while min(ratios, default=10) >= 10 and len(ratios) < 4:  # a busy machine's cores change speed
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        )  # fmt: skip
        *_, heavy, times = process.stdout.splitlines()
        assert heavy == "HEAVY []"
        own, additions = map(float, times.split())
        ratios.append(own / additions)
    assert min(ratios) < 10, f"{ratios}: 3 million additions take 0.1 s on an idle core, this 0.25"
