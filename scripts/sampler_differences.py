"""Measure how far the log-probabilities of sampler and trainer differ by rounding.

    python scripts/sampler_differences.py [--models .models/SmolLM2-135M-Instruct] [--steps 2]

Trains each family and method of the lists below for a few steps with `--task rl` in float32 and
bfloat16, and prints the largest mean |Δℓ| of a step in nats per token. The bounds of
`training/rl/step.py` are based on it. Tiny models have random weights (tests/tiny_models.py);
the built-in model and `--models` are trained ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from ftlevel.commands.train import train
from ftlevel.config import TrainConfig
from ftlevel.errors import FtlevelError
from tiny_models import save_tiny

FAMILIES = ("gpt2", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3")
BUILT_IN = "builtin:tiny-llama"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "dora": {"kind": "lora", "use_dora": True},
    "pissa": {"kind": "lora", "init_lora_weights": "pissa"},
    "qlora": {"kind": "qlora"},
    "qlora-8bit": {"kind": "qlora", "quant": "8bit"},
    "ia3": {"kind": "ia3"},
    "adalora": {"kind": "adalora"},
    "full": {"kind": "full"},
}
REWARD = """
def vowels(completions, **kwargs):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
"""


def cases(models: list[str]) -> Iterator[tuple[str, str]]:
    """Yield pairs of model and method: every method with one model, and every family with LoRA."""
    for method in METHODS:
        yield BUILT_IN, method
    for name in (*FAMILIES, *models):
        yield name, "lora"


def measure(model: str, method: str, dtype: str, steps: int, folder: Path) -> dict[str, float]:
    """Return the means over the steps' tokens, and the largest of these, of a short run."""
    out = folder / f"{Path(model).name}-{method}-{dtype}"
    method_fields = dict(METHODS[method])
    quant = {"quant": {"kind": method_fields.pop("quant")}} if "quant" in method_fields else {}
    train(
        TrainConfig(
            task="rl",
            model={"name_or_path": model, "dtype": dtype},
            data={"dataset": str(folder / "rows.jsonl")},
            method=method_fields,
            rl={
                "reward": [f"{folder}/reward.py:vowels"],
                "num_generations": 4,
                "max_completion_length": 32,
                "check_groups": 0,
            },
            train={
                "max_steps": steps,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-5 if method == "full" else 1e-3,
                "save_strategy": "no",
            },
            speed={"verify": False},
            output={"dir": out},
            **quant,
        )
    )
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    differences = [line["sampler_difference"] for line in lines if "sampler_difference" in line]
    return {"mean": sum(differences) / len(differences), "largest": max(differences)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], help="Directories of trained models.")
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "reward.py").write_text(REWARD, encoding="utf-8")
        rows = [{"prompt": f'def f{i}(a, b):\n    """Return'} for i in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        for model, method in cases(arguments.models):
            path = str(save_tiny(folder / model, model)) if model in FAMILIES else model
            for dtype in ("float32", "bfloat16"):
                try:
                    result = measure(path, method, dtype, arguments.steps, folder)
                    shown = f"{result['mean']:.1e}  largest step {result['largest']:.1e}"
                except FtlevelError as error:
                    shown = f"not run: {error}"
                sys.stdout.write(f"{Path(model).name:24} {method:12} {dtype:9} {shown}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
