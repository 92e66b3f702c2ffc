"""Commands that run on the simulated device and on the CPU, and the tiny models and rows they use."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlevel.methods import METHOD_INFO
from task_data import ROWS, WORDS
from tiny_models import build_config

DECODERS = ("gpt2", "gpt_neo", "gpt_neox", "opt", "mistral", "qwen2", "qwen3", "gemma3_text",
            "phi3", "mixtral", "qwen3_moe")  # fmt: skip
ENCODERS = ("roberta", "electra", "albert", "distilbert", "deberta-v2", "modernbert")
MEDIUM = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
          "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip
"""Overrides of the model whose memory is compared with the estimate of `plan`."""

OWN_ATTENTION = ("gpt_neo", "deberta-v2")
"""Families whose attention in transformers creates tensors on the host."""


def without_dropout(family: str) -> dict[str, float]:
    """Return overrides of a tiny model: the devices draw other masks, so that losses would differ."""
    values = build_config(family).to_dict()
    return {key: 0.0 for key in values if "drop" in key and isinstance(values[key], float)}


@dataclass(frozen=True)
class Cell:
    """Commands to run one after the other in a new folder, once on each device.

    Attributes:
        name: name of the cell, `group/name`.
        lines: arguments of `ftlevel`; `{llama}`, `{bert}`, … are models, `{sft}`, … files.
        card: settings of the device, as in `device.build_environment`.
        tolerance: largest relative difference of a loss.
        otherwise: flags of the run on the CPU in place of flags of the run on the card.
        waits: whether the host may wait in a training step, with the reason in a comment.
        is_planned: whether the last command is `plan --json`, whose estimate must be near the peak.
    """

    name: str
    lines: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-2
    otherwise: tuple[tuple[str, str], ...] = ()
    waits: bool = False
    is_planned: bool = False

    def __str__(self) -> str:
        return self.name


KILLED = "killed"
"""First word of a training that is killed once it has saved a checkpoint."""

SAMPLED = float("inf")
"""Tolerance of runs that sample completions: other rounding leads to other tokens."""

STEP = "--max-steps 5 --per-device-train-batch-size 4 --logging-steps 1 --seed 1 --output-dir run"
SHORT = f"{STEP} --dtype bfloat16"
TASKS = {
    "text": "--model {llama} --dataset {sft}",
    "chat": "--model {llama} --dataset {chat}",
    "summarization-t5": "--task summarization --model {t5} --dataset {summary}",
    "summarization-llama": "--task summarization --model {llama} --dataset {summary}",
    "translation-bart": "--task translation --model {bart} --dataset {pair} --source-language en "
                        "--target-language de",
    "class": "--task text-classification --model {bert} --dataset {class}",
    "class-llama": "--task text-classification --model {llama} --dataset {class}",
    "multi": "--task text-classification --model {bert} --dataset {multi}",
    "regression": "--task text-classification --model {bert} --dataset {regression}",
    "tags": "--task token-classification --model {bert} --dataset {tags}",
    "span": "--task question-answering --model {bert} --dataset {span}",
    "mask": "--task masked-lm --model {bert} --dataset {mask}",
    "preference": "--task preference --model {llama} --dataset {preference}",
    "reward": "--task preference --loss reward --model {llama} --dataset {preference}",
    "rl": "--task rl --model {llama} --dataset {rl} --reward {rewards}:length --set rl.num_generations=4 "
          "--set rl.max_completion_length=8 --check-groups 0",
    "embedding": "--task embedding --model {bert} --dataset {pairs}",
    "embedding-llama": "--task embedding --model {llama} --dataset {pairs}",
    "reranking": "--task reranking --model {bert} --dataset {ranked}",
}  # fmt: skip
METHODS = {"lora": "--method lora", "qlora": "--method qlora --quant 4bit", "full": "--method full"}


def build_cells() -> Iterator[Cell]:
    """Yield all cells."""
    yield from _task_cells()
    yield from _method_cells()
    yield from _objective_cells()
    yield from _option_cells()
    yield from _family_cells()
    yield from _card_cells()
    yield from _command_cells()
    yield from _memory_cells()


def _task_cells() -> Iterator[Cell]:
    for (task, flags), (method, chosen) in itertools.product(TASKS.items(), METHODS.items()):
        # Cosine similarities of an untrained decoder are near 1, where scores are times 20.
        tolerance = {"rl": SAMPLED, "embedding-llama": 5e-2}.get(task, 2e-2)
        yield Cell(
            f"task/{task}-{method}", (f"train {chosen} {flags} {SHORT}",), tolerance=tolerance
        )
    for task in ("text", "class", "preference", "embedding", "tags"):
        yield Cell(
            f"task/{task}-float32",
            (f"train --method lora {TASKS[task]} {STEP} --dtype float32 --no-tf32",),
            tolerance=1e-4,
        )


_FLAGS = {
    "loftq": f"{SHORT} --quant 4bit", "pissa": f"{STEP} --dtype float32",
    "olora": f"{STEP} --dtype float32",
    "c3a": f"{SHORT} --set method.block_size=16",
    "linear-probe": f"{SHORT} --learning-rate 1e-3",
}  # fmt: skip
"""Flags of methods that need others than `SHORT`."""


def _method_cells() -> Iterator[Cell]:
    for name, info in METHOD_INFO.items():
        if name in ("lora", "qlora", "full", "experts", "shira"):  # shira: no sparse tensors here
            continue
        task = TASKS["class" if name == "linear-probe" else "text"]
        line = f"train {info.flags} {task} {_FLAGS.get(name, SHORT)}"
        # PEFT prunes adalora's ranks after each step, and solves boft's systems with a check.
        yield Cell(f"method/{name}", (line,), waits=name in ("adalora", "boft"))
    yield Cell("method/experts", (
        "train --method lora --set method.target_parameters=experts --model {mixtral} "
        f"--dataset {{sft}} {SHORT}",
    ))  # fmt: skip
    yield Cell(  # LLM.int8() looks for outliers among the values
        "method/qlora-8bit", (f"train --method qlora --quant 8bit {TASKS['text']} {SHORT}",),
        waits=True,
    )  # fmt: skip
    yield Cell(
        "method/dora-4bit", (f"train --method lora --dora --quant 4bit {TASKS['text']} {SHORT}",)
    )


def _objective_cells() -> Iterator[Cell]:
    lora = "train --method lora"
    for loss in ("ipo", "simpo", "orpo", "hinge", "cpo"):
        yield Cell(f"preference/{loss}", (f"{lora} {TASKS['preference']} --loss {loss} {SHORT}",))
    yield Cell("preference/kto", (
        f"{lora} --task preference --loss kto --model {{llama}} --dataset {{kto}} {SHORT}",
    ))  # fmt: skip
    yield Cell("preference/bert-reward", (
        f"{lora} --task preference --loss reward --model {{bert}} --dataset {{preference}} {SHORT}",
    ))  # fmt: skip
    rl = TASKS["rl"]
    for loss in ("grpo", "dr_grpo"):
        yield Cell(f"rl/{loss}", (f"{lora} {rl} --loss {loss} {SHORT}",), tolerance=SAMPLED)
    # With equal rewards there is no gradient; the check of gradients ends two updates later.
    yield Cell("rl/built-in", (
        f"{lora} {rl.replace('{rewards}:length', 'regex:[aeiou]')} {SHORT}",
    ), tolerance=SAMPLED, waits=True)  # fmt: skip
    yield Cell("rl/iterations", (f"{lora} {rl} --num-iterations 2 {SHORT}",), tolerance=SAMPLED)
    yield Cell("rl/beta", (f"{lora} {rl} --beta 0.1 {SHORT}",), tolerance=SAMPLED)
    for cache in ("always", "never"):
        yield Cell(f"embedding/cache-{cache}", (
            f"{lora} {TASKS['embedding']} --set embedding.grad_cache={cache} {SHORT}",
        ))  # fmt: skip
    yield Cell("embedding/matryoshka", (
        f"{lora} {TASKS['embedding']} --set embedding.matryoshka_dims=[16,8] {SHORT}",
    ))  # fmt: skip
    for loss in ("bce", "listnet", "ranknet", "lambda"):
        yield Cell(f"reranking/{loss}", (f"{lora} {TASKS['reranking']} --loss {loss} {SHORT}",))
    yield Cell("distillation/text", (f"{lora} {TASKS['text']} --teacher {{llama2}} {SHORT}",))
    yield Cell(
        "class/weights", (f"{lora} {TASKS['class']} --set train.class_weights=balanced {SHORT}",)
    )
    yield Cell("class/focal", (f"{lora} {TASKS['class']} --set train.focal_gamma=2 {SHORT}",))
    yield Cell("text/smoothing", (f"{lora} {TASKS['text']} --label-smoothing-factor 0.1 {SHORT}",))


def _option_cells() -> Iterator[Cell]:
    lora, text = "train --method lora", TASKS["text"]
    for name, flags in {
        "no-fast": "--no-fast", "checkpointing": "--gradient-checkpointing",
        "accumulation": "--gradient-accumulation-steps 2", "rest": "--num-train-epochs 1",
        "verify-fast": "--verify-fast", "no-verify-fast": "--no-verify-fast",
        "best": "--validation-file {sft_validation} --eval-steps 2 --save-steps 2 --load-best-model-at-end",
        "epochs": "--validation-file {sft_validation} --eval-strategy epoch",
        "adamw-8bit": "--optim adamw_8bit", "neftune": "--set train.neftune_noise_alpha=5",
        "tokens": "--set speed.tokens_per_micro_batch=64",
        "shared": "--set speed.share_prefixes=always", "long": "--max-length 64 --overlong truncate-prompt",
        "clip": "--max-grad-norm 0.1", "cosine": "--lr-scheduler-type cosine",
        "group": "--set train.train_sampling_strategy=group_by_length",
        "eager": "--set model.attn_implementation=eager",
    }.items():  # fmt: skip
        # Plain transformers reads whether a mask hides anything; bitsandbytes synchronizes.
        waits = name in ("no-fast", "neftune", "adamw-8bit", "eager")
        yield Cell(f"option/{name}", (f"{lora} {text} {SHORT} {flags}",), waits=waits)
    offload = f"{lora} {text} {SHORT} --gradient-checkpointing --offload-activations"
    yield Cell("option/offload", (offload,), otherwise=((" --offload-activations", ""),))
    for task in ("class", "preference", "embedding", "rl", "reranking", "tags", "span"):
        yield Cell(f"option/no-fast-{task}", (f"{lora} {TASKS[task]} {SHORT} --no-fast",), waits=True,
                   tolerance=SAMPLED if task == "rl" else 2e-2)  # fmt: skip
    for task in ("preference", "embedding", "class", "reranking"):
        yield Cell(f"option/checkpointing-{task}", (
            f"{lora} {TASKS[task]} {SHORT} --gradient-checkpointing",
        ))  # fmt: skip
    saving = f"{lora} {text} {SHORT} --save-steps 2"
    yield Cell("option/resume", (
        f"{KILLED} {saving.replace('--max-steps 5', '--max-steps 8')}",
        "train --resume --output-dir run",
    ))  # fmt: skip
    two = "--num-processes 2 --per-device-train-batch-size 2"
    for name, flags in {
        "two": two, "two-shard": f"{two} --shard grads", "two-full": f"{two} --shard full",
    }.items():  # fmt: skip
        method = "train --method full" if name == "two-full" else lora
        yield Cell(f"processes/{name}", (f"{method} {text} {SHORT} {flags}",), {"cards": 2})
    for task in ("preference", "class", "embedding", "rl", "reranking"):
        tolerance = SAMPLED if task == "rl" else 2e-2
        line = f"{lora} {TASKS[task]} {SHORT} {two}"
        yield Cell(f"processes/{task}", (line,), {"cards": 2}, tolerance=tolerance)


def _family_cells() -> Iterator[Cell]:
    for family in DECODERS:
        line = f"train --method lora --model {{{family}}} --dataset {{sft}} {SHORT}"
        yield Cell(f"family/{family}", (line,), waits=family in OWN_ATTENTION)
    for family in ENCODERS:
        yield Cell(f"family/{family}", (
            f"train --method lora --task text-classification --model {{{family}}} --dataset {{class}} {SHORT}",
        ), waits=family in OWN_ATTENTION)  # fmt: skip
    yield Cell("family/mt5", (
        f"train --method lora --task summarization --model {{mt5}} --dataset {{summary}} {SHORT}",
    ))  # fmt: skip


def _card_cells() -> Iterator[Cell]:
    old = {"capability": "7.5", "bytes": 16 * 10**9}
    exact = (("--dtype auto", "--dtype float32"),)
    for task in ("text", "class", "preference", "embedding", "tags", "span", "rl", "reranking",
                 "summarization-t5", "mask"):  # fmt: skip
        # The gradient scaler reads whether gradients are finite, and skips the first steps.
        tolerance = SAMPLED if task == "rl" else 5e-2
        line = f"train --method lora {TASKS[task]} {STEP} --dtype auto"
        yield Cell(f"t4/{task}", (line,), old, tolerance, exact, waits=True)
    line = f"train --method qlora --quant 4bit {TASKS['text']} {STEP} --dtype auto"
    yield Cell("t4/qlora", (line,), old, 5e-2, exact, waits=True)
    for size in (16, 24):
        card = {"capability": "8.9", "bytes": size * 10**9}
        line = f"train --method qlora --quant 4bit {TASKS['text']} {SHORT}"
        yield Cell(f"ada/{size}", (line,), card)


def _command_cells() -> Iterator[Cell]:
    lora = "train --method lora"
    run = f"{lora} {TASKS['text']} {SHORT}"
    after = {
        "evaluate": "evaluate run --dataset {sft_validation}",
        "evaluate-no-base": "evaluate run --dataset {sft_validation} --no-base",
        "predict": "predict run --dataset {sft_validation} --output out.jsonl",
        "generate": "generate run --prompt value --max-new-tokens 8",
        "merge": "merge run --out merged", "export-mlx": "export run --for mlx --out out",
        "export-peft": "export run --for vllm --out out",
        "report": "report run",
    }  # fmt: skip
    for name, line in after.items():
        yield Cell(f"command/{name}", (run, line))
    for task in ("class", "tags", "span", "preference", "embedding", "reranking", "mask",
                 "summarization-t5"):  # fmt: skip
        file = TASKS[task].rpartition("{")[2].rstrip("}")
        yield Cell(f"command/evaluate-{task}", (
            f"{lora} {TASKS[task]} {SHORT}", f"evaluate run --dataset {{{file}_validation}}",
        ))  # fmt: skip
    for task in ("class", "tags", "span", "embedding"):
        file = TASKS[task].rpartition("{")[2].rstrip("}")
        yield Cell(f"command/predict-{task}", (
            f"{lora} {TASKS[task]} {SHORT}",
            f"predict run --dataset {{{file}_validation}} --output out.jsonl",
        ))  # fmt: skip
    qlora = f"train --method qlora --quant 4bit {TASKS['text']} {SHORT}"
    yield Cell("command/merge-qlora", (qlora, "merge run --out merged"))
    yield Cell("command/quantize", ("quantize {llama} --quant 4bit --out small",))
    yield Cell("command/mine", ("mine {bert} --dataset {pairs} --output mined.jsonl",))
    yield Cell("command/compare", (
        f"compare --methods lora,ia3 {TASKS['text']} --max-steps 3 --per-device-train-batch-size 4 "
        "--dtype bfloat16 --validation-file {sft_validation} --out compared",
    ))  # fmt: skip
    yield Cell("command/plan", (f"plan --method lora {TASKS['text']} --gpu 24GB",))
    yield Cell("command/doctor", ("doctor",))
    yield Cell("readme/lora", ("train --method lora --output-dir run",))
    yield Cell("readme/qlora", ("train --method qlora --quant 4bit --output-dir run",))


def _memory_cells() -> Iterator[Cell]:
    """Yield runs of a model whose activations and weights are larger than constant overheads.

    Rows have one length and share no prefix, so that each step is the largest one, as in `plan`.
    """
    for name, flags in {
        "lora": "--method lora", "qlora": "--method qlora --quant 4bit", "full": "--method full",
        "checkpointing": "--method lora --gradient-checkpointing", "dora": "--method lora --dora",
        "adapter": "--method adapter", "prefix": "--method prefix",
        "no-fast": "--method lora --no-fast", "float32": "--method lora --dtype float32 --no-tf32",
    }.items():  # fmt: skip
        dtype = "" if "--dtype" in flags else " --dtype bfloat16"
        flags += f"{dtype} --per-device-train-batch-size 8 --set speed.verify=false"
        flags += (
            " --model {medium} --dataset {even} --validation-file {even_validation} --max-steps 3"
        )
        waits = name in ("no-fast",)
        yield Cell(f"memory/{name}", (
            f"train {flags} --logging-steps 1 --output-dir run", f"plan {flags} --json",
        ), is_planned=True, waits=waits)  # fmt: skip


SAMPLE = (
    "task/text-lora", "task/text-qlora", "task/preference-lora", "task/rl-lora",
    "task/embedding-lora", "task/tags-lora", "task/span-lora", "task/text-float32",
    "t4/text", "processes/two", "option/resume", "command/merge",
)  # fmt: skip
"""Cells that CI runs."""


def write_files(folder: Path) -> dict[str, str]:
    """Write the rows of every task; return name → path of the training file."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, build in _ROWS.items():
        for suffix, first in (("", 0), ("_validation", 40)):
            path = folder / f"{name}{suffix}.jsonl"
            rows = [json.dumps(build(i)) for i in range(first, first + (40 if not first else 12))]
            path.write_text("\n".join(rows) + "\n", encoding="utf-8")
            files[name + suffix] = str(path)
    rewards = folder / "rewards.py"
    rewards.write_text(
        "def length(completions, **_):\n    return [min(len(text), 20) / 20 for text in completions]\n"
    )
    files["rewards"] = str(rewards)
    return files


def _words(i: int, count: int) -> str:
    return " ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, count + 1))


def _rotated(i: int, count: int) -> str:
    return " ".join(WORDS[(i + k) % len(WORDS)] for k in range(count))


_ROWS: dict[str, Any] = {
    **{name: ROWS[name] for name in ("tags", "span", "mask", "class", "multi", "regression", "pair")},
    "sft": lambda i: {"prompt": f"Tell of {_words(i, 2 + i % 5)}:", "completion": _words(i + 3, 3 + i % 9)},
    "even": lambda i: {"prompt": f"{i + 10} {_rotated(i, 80)}:", "completion": _rotated(i // 8, 40)},
    "chat": lambda i: {"messages": [
        {"role": "user", "content": _words(i, 2 + i % 4)},
        {"role": "assistant", "content": _words(i + 1, 3 + i % 7)},
    ]},
    "summary": lambda i: {"text": _words(i, 12 + i % 8), "summary": _words(i, 3)},
    "preference": lambda i: {
        "prompt": f"Tell of {_words(i, 2 + i % 5)}:", "chosen": _words(i + 1, 3 + i % 6),
        "rejected": _words(i + 5, 2 + i % 8),
    },
    "kto": lambda i: {
        "prompt": f"Tell of {_words(i, 2 + i % 5)}:", "completion": _words(i + 1, 3 + i % 6),
        "label": bool(i % 2),
    },
    "rl": lambda i: {"prompt": f"Repeat {_words(i, 1 + i % 3)}:", "answer": WORDS[i % 8]},
    "pairs": lambda i: {"query": f"{_words(i, 3)} {i}", "positive": f"{_words(i, 6 + i % 9)} {i}"},
    "ranked": lambda i: {
        "query": f"{_words(i, 3)} {i}", "positive": f"{_words(i, 6)} {i}",
        "negative": f"{_words(i + 3, 8)} {i}",
    },
}  # fmt: skip
