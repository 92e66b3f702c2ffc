"""The memory estimate of `plan --task rl`, compared with the peak of a run in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from forked import Forked
from tiny_models import save_tiny


def run_and_print_peak(arguments: Sequence[str]) -> int:
    """Run the command line and print the peak of its resident memory in KiB to stderr."""
    from ftlevel.cli.app import run

    code = run(arguments)
    status = Path("/proc/self/status").read_text()
    sys.stderr.write(status.partition("VmHWM:")[2].split()[0])
    return code


def run_and_measure_peak(*arguments: str) -> tuple[str, int]:
    """Returns what a command prints, and the peak of its resident memory in bytes."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = Forked(call=(run_and_print_peak, (arguments,)), **pipes)
    output, error = process.communicate()
    assert process.returncode == 0, error
    return output, int(error.split()[-1]) * 1024


def test_bfloat16_memory_estimate_is_close_to_peak(tmp_path: Path) -> None:
    """The shape of recipes/rl-smollm2-brief.yaml with fewer layers, prompts and tokens."""
    overrides = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    overrides |= {"num_key_value_heads": 3, "num_hidden_layers": 3, "vocab_size": 49_152}
    model = save_tiny(tmp_path / "model", "llama", **overrides)
    words = " ".join(f"parameter{i} is a number" for i in range(18))
    rows = ({"prompt": f"Describe f{i}. {words[: 40 + 15 * i]}"} for i in range(24))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def even(completion_ids, **_):\n"
        "    return [sum(token % 2 for token in ids) for ids in completion_ids]\n"
    )
    arguments = ["--task", "rl", "--reward", f"{tmp_path}/rewards.py:even", "--max-steps", "2"]
    arguments += ["--model", str(model), "--dataset", str(tmp_path / "rows.jsonl")]
    arguments += ["--dtype", "bfloat16", "--batch-size", "4", "--check-groups", "0"]
    arguments += ["--max-completion-length", "8", "--validation-split", "0.5"]
    _, measured = run_and_measure_peak("train", *arguments, "--output-dir", str(tmp_path / "run"))
    plan = json.loads((tmp_path / "run" / "summary.json").read_text())["plan"]
    assert 0.85 < plan["process_bytes"] / measured < 1.2, (plan, measured)


def test_plan_estimate_is_close_to_peak(tmp_path: Path) -> None:
    words = " ".join(f"parameter{i} is a number" for i in range(60))
    rows = ({"prompt": f"Describe f{i}. {words}", "answer": "x"} for i in range(8))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def vowels(completions, **_):\n"
        "    return [sum(map(text.count, 'aeiou')) / max(len(text), 1) for text in completions]\n"
    )
    reward = f"{tmp_path}/rewards.py:vowels"
    common = ["--task", "rl", "--reward", reward, "--max-steps", "1", "--check-groups", "0"]
    common += ["--model", "builtin:tiny-llama", "--dtype", "float32"]
    common += ["--dataset", str(tmp_path / "rows.jsonl"), "--max-completion-length", "48"]
    common += ["--validation-split", "0.25", "--beta", "0.05", "--batch-size", "4"]
    plan = json.loads(run_and_measure_peak("plan", "--json", "--brief", *common)[0])
    _, measured = run_and_measure_peak(
        "train", "--json", *common, "--output-dir", str(tmp_path / "run")
    )
    assert 0.88 < plan["process_bytes"] / measured < 1.2, (plan, measured)
    assert "initial weights" in plan["parts"]
