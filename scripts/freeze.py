"""Record what ftlevel computes, to compare before and after a refactoring.

    python scripts/freeze.py record DIR               run every item and write DIR/ITEM.txt
    python scripts/freeze.py compare BEFORE AFTER     print differences; exit code 1 if any

An item is a list of command lines in an empty folder. Its record has their output and every file
they write, one value per line, without times and paths: two recordings of one tree on one machine
are equal byte for byte. Only the program is run, and nothing of ftlevel is imported, so modules can
move. Real models are read from FTLEVEL_MODELS, or .models.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("llama", "gpt2", "roberta", "bart", "mixtral")  # tiny models, besides a t5
_WORDS = "the parser reads a module string and keeps its default file until another caller asks"


def _words(seed: float, count: int) -> str:
    return " ".join(random.Random(f"{seed}").choices(_WORDS.split(), k=count))


def _messages(i: int) -> dict[str, Any]:
    roles = ("system", "user", "assistant", "user", "assistant")[: 5 if i % 3 else 3]
    texts = (_words(k * (i + 0.5), 3 + (i + k) % 4 if k else 40) for k in range(5))
    return {"messages": [{"role": role, "content": next(texts)} for role in roles]}


def _tagged(i: int) -> dict[str, Any]:
    location, words = ("Paris", "Rome", "New York")[i % 3].split(), _words(i, 2 + i % 5).split()
    tags = ["O"] * len(words) + ["B-LOC", "I-LOC"][: len(location)] + ["O"]
    return {"tokens": [*words, *location, "."], "tags": tags}


def _question(i: int) -> dict[str, Any]:
    context_start, answer = f"{_words(i, 10 + 7 * (i % 5))}. The name is ", f"module {i}"
    answers = {"text": [answer][: i % 4], "answer_start": [len(context_start)][: i % 4]}
    context = f"{context_start}{answer}. {_words(-i, 12)}."
    return {"context": context, "question": "What is the name?", "answers": answers}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "prompts": lambda i: {"prompt": _words(i, 3 + i % 7), "completion": _words(-i, 2 + i % 5)},
    "chat": _messages,
    "articles": lambda i: {"document": _words(i, 12 + i % 9), "summary": _words(-i, 4 + i % 3)},
    "pairs": lambda i: {"en": _words(i, 3 + i % 4), "de": _words(-i, 3 + i % 5)},
    "plain": lambda i: {"text": _words(i, 30 + 30 * (i % 4))},
    "class": lambda i: {"text": _words(i, 3 + i % 9), "label": "abc"[i % 3]},
    "several": lambda i: {"text": _words(i, 3 + i % 9), "label": ["x", "y", "z"][: i % 4]},
    "number": lambda i: {"text": _words(i, 3 + i % 9), "label": i / 4},
    "tags": _tagged,
    "span": _question,
}
"""Name of a set → function from index to row; 24 training and 6 validation rows."""

TRAIN = "train --output-dir run --json --logging-steps 1 --max-steps 4 --batch-size 4"
SAMPLE = 'generate run --json --max-new-tokens 12 -p "say the value" -p "read a file in New York ."'
SCORE, MERGE = "evaluate run --json --predictions scored.jsonl", "merge run --json --out merged"
MINILM, DOCS = "--model .models/all-MiniLM-L6-v2", "--max-samples 24 --set data.max_eval_samples=6"
PROMPTS, PLAIN, CHAT = (f"--dataset rows/{name}" for name in ("prompts", "plain", "chat"))
TINY, MASKED = f"--model models/llama {PROMPTS}", f"--task masked-lm {PLAIN}"
CLASSES, CLASSIFY = "--dataset rows/class --task text-classification", "--task text-classification"
SUMMARY = "--task summarization --dataset rows/articles --set train.max_new_tokens=8"
PAIRS = "--task translation --dataset rows/pairs --map source=en --map target=de"
SPANS = "--task question-answering --dataset rows/span --max-length 48 --set data.doc_stride=16"
TAGS = "--task token-classification --dataset rows/tags"
TARGETS = """llama mistral qwen2 qwen3 smollm3 granite olmo2 gemma gemma2 gemma3_text mixtral phi
    qwen3_moe phi3 starcoder2 gpt2 gpt_neo gptj gpt_bigcode bloom falcon gpt_neox opt bert roberta
    xlm-roberta camembert distilbert electra albert mpnet deberta-v2 modernbert t5 mt5 umt5 bart
    mbart pegasus marian m2m_100 blenderbot other models/llama models/gpt2 models/t5"""
COMMANDS = "train preview evaluate generate merge quantize export recipes list-targets list-methods"
ITEMS = f"""
lora: {DOCS} | {SCORE} | {SAMPLE} --compare-base | {MERGE} | export run --json --out run.gguf
  | quantize merged --quant 4bit --out four --json | train run/config.yaml --output-dir again --json
lora-dora: {DOCS} --dora --dtype float32 --learning-rate 1e-3 | {MERGE}
lora-plus: {PROMPTS} --model models/gpt2 --dtype float32 --rslora --lora-plus-ratio 4 | {MERGE}
lora-pissa: {DOCS} --init pissa --dtype float32 | {MERGE}
lora-eva: {TINY} --init eva --dtype float32
lora-loftq: {TINY} --init loftq --quant 4bit
lora-dropout: {DOCS} --lora-dropout 0.1 --target-modules q_proj,v_proj
lora-experts: {PROMPTS} --model models/mixtral --set method.target_parameters=experts
schedule: {PROMPTS} --model models/gpt2 --gradient-accumulation-steps 2 --lr-scheduler-type cosine
  --warmup-steps 2 --gradient-checkpointing --set train.train_sampling_strategy=group_by_length
qlora: {DOCS} --method qlora | {SAMPLE} | {SCORE} | {MERGE}
qlora-fp4: {PROMPTS} --method qlora --quant-type fp4 --double-quant --dora --dtype float32
qlora-8bit: {DOCS} --method qlora --quant 8bit --dtype float32 | {MERGE} --onto original --no-verify
adalora: {CLASSES} {MINILM} --method adalora | {SCORE} | {MERGE} --no-verify
ia3: {CLASSIFY} --dataset rows/several {MINILM} --method ia3 | {SCORE} | {SAMPLE}
vera: {CLASSIFY} --dataset rows/number --model models/roberta --method vera | {SCORE}
oft: {TINY} --method oft --dtype float32 | {MERGE} --no-verify
boft: {CLASSES} {MINILM} --method boft
loha: {TINY} --method loha --dtype float32 | {MERGE} --no-verify
lokr: {CLASSES} --model models/roberta --method lokr
adapter: {TAGS} {MINILM} --method adapter | {SCORE} | {SAMPLE}
adapter-pfeiffer: {SUMMARY} --model models/t5 --method adapter --set method.placement=pfeiffer
adapter-parallel: {PROMPTS} --quant 4bit --method adapter --set method.placement=parallel
prefix: {SUMMARY} --model models/bart --method prefix | {SCORE} | {SAMPLE}
prompt: {PAIRS} --model models/t5 --method prompt | {SCORE}
p-tuning: {PROMPTS} --method p-tuning --bf16 | {SAMPLE}
ln-tuning: {SPANS} {MINILM} --method ln-tuning | {SCORE} | {SAMPLE} --context "The name is file 3."
full: {DOCS} --method full --bf16 | {SCORE} | export run --out run.gguf --outtype q8_0
full-masked: {MASKED} --max-length 96 --model models/roberta --method full | {SCORE}
probe: {CLASSES} {MINILM} --method full --set method.freeze_base=true
masked: {MASKED} --max-length 96 --overlong split {MINILM} --bf16
tags-decoder: {TAGS} --model models/gpt2
class-decoder: {CLASSES} --quant 4bit | {SCORE}
summaries: {SUMMARY} --eval-on-start --eval-steps 2 | evaluate run --json --split train --no-base
translation: {PAIRS} --set train.max_new_tokens=8
plain: {PLAIN} --max-length 150 --overlong split --validation-split 0.2
chat: {CHAT} --set speed.share_prefixes=never | {SAMPLE}
chat-shared: {CHAT} --set speed.share_prefixes=always | {SCORE}
chat-template: {CHAT} --model models/gpt2 --chat-template mistral
mixed: {PROMPTS} --dataset builtin:docstrings --mix 3,7 --validation-split 0.1
no-fast: {DOCS} --no-fast
no-fast-encoder: {CLASSES} {MINILM} --no-fast
verified: {DOCS} --verify-fast --dtype float32
resumed: {DOCS} --save-steps 2 --lora-dropout 0.1 | rm -r run/adapter run/checkpoints/checkpoint-4
  | train --output-dir run --resume --json
screen: {SUMMARY} | train run/config.yaml --output-dir again | evaluate run
  | generate run -p hello --compare-base | merge run --out merged | export merged --out merged.gguf
  | quantize merged --quant 8bit --out eight | preview run --row 3 --html page.html
adapters: {TINY} | train --output-dir other --json {TINY} --max-steps 3 --lora-r 4
  | merge run other --out svd --strategy svd --weights 0.7,0.3 --json
  | generate run --adapter second=other --json -p hello | evaluate run --json --against other
two-processes: {DOCS} --num-processes 2
two-threads: {DOCS} --set speed.tokens_per_micro_batch=256 | {SCORE}
two-threads-qlora: {PROMPTS} --method qlora --set speed.tokens_per_micro_batch=64
two-threads-encoder: {CLASSES} {MINILM} --set speed.tokens_per_micro_batch=16
two-threads-t5: {PAIRS} --model models/t5 --set speed.tokens_per_micro_batch=32
preview: preview --json {PROMPTS} | preview {CHAT} --json | preview {SPANS} {MINILM} --json
  | preview {PLAIN} --max-length 150 --overlong split --json | preview {TAGS} {MINILM} --json
  | preview {SUMMARY} --model models/bart --json | preview {PAIRS} | preview {MASKED} {MINILM}
  | preview {CLASSES} {MINILM}
  | preview recipes/demo.yaml --max-samples 40 --json
list-targets: {" | ".join(f"list-targets {name} --json" for name in TARGETS.split())}
list-methods: list-methods | list-methods --json | list-methods --model models/gpt2 --quant 8bit
dry-run: train --dry-run --json | train --dry-run --json --method ia3 {MINILM} {CLASSES}
  | train --dry-run --json --method qlora {TINY} --max-steps 5 --lora-r 4
  | train --dry-run --model models/t5 {PAIRS} --quant 8bit | train --schema
  | quantize models/llama --quant 4bit --out q --dry-run | export models/llama --out q.gguf
help: --help | {" | ".join(f"{name} --help" for name in COMMANDS.split())}
  | train --help-all | preview --help-all
"""
# A line per item: its name, and command lines without `ftlevel`. One that begins with a flag is a
# training run. Items called two-… run alone, on both cores.


def build_items() -> Iterator[tuple[str, list[str]]]:
    """Yield name and command lines of every item."""
    for line in ITEMS.strip().replace("\n  ", " ").splitlines():
        name, _, text = line.partition(": ")
        commands = text.split(" | ")
        is_run = text.startswith("--") and name != "help"
        yield name, [f"{TRAIN} {commands[0]}", *commands[1:]] if is_run else commands


_VARIES = re.compile(r"^(timings|memory|versions|finished|peft_version|seconds)$|_s$|^peak_")
_TEMPORARY = "tmp"
_NOISE = (
    (re.compile(rf"<work>/own/[\w-]+/{_TEMPORARY}/[\w.-]+"), "<temporary>"),
    (re.compile(r"\b\d[\d,]*(\.\d+)?( ?s| ms| tok/s| tokens/s| rows/s| [GM]iB)\b"), "<n>\\2"),
)


class Recorder:
    """Runs items in the empty folder `work`, and writes their records to `out`."""

    def __init__(self, work: Path, out: Path) -> None:
        self.work, self.out = work, out
        models = Path(os.environ.get("FTLEVEL_MODELS") or ROOT / ".models").resolve()
        self.links = {"models": work / "models", "rows": work / "rows", ".models": models,
                      "recipes": ROOT / "recipes"}  # fmt: skip
        self.path_names = {f"{work}": "<work>", f"{models}": "<models>", f"{ROOT}": "<tree>",
                       sys.prefix: "<prefix>"}  # fmt: skip

    def create_inputs(self) -> None:
        """Write the rows and tiny models that the items use."""
        sys.path.insert(0, str(ROOT / "tests"))
        from transformers.utils import logging

        from tiny_models import save_tiny
        from tiny_tokenizers import build_tokenizer

        logging.disable_progress_bar()
        for name, row in ROWS.items():
            for split, numbers in (("train", range(24)), ("validation", range(24, 30))):
                path = self.work / "rows" / name / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
        for family in MODELS:
            save_tiny(self.work / "models" / family, family)
        folder = save_tiny(self.work / "models" / "t5", "t5", pad_token_id=1, eos_token_id=2)
        # The training of T5's own tokenizer is not deterministic.
        build_tokenizer("bart").save_pretrained(folder)

    def record(self, item: tuple[str, list[str]]) -> None:
        """Run an item, write its record and print a line."""
        start, (name, commands) = time.perf_counter(), item
        folder = self.work / "items" / name
        folder.mkdir(parents=True)
        for link, target in self.links.items():
            (folder / link).symlink_to(target)
        outputs = [self._run(command, folder) for command in commands]
        top_paths = [path for path in sorted(folder.iterdir()) if not path.is_symlink()]
        paths = [
            path for top in top_paths for path in (top, *sorted(top.rglob("*"))) if path.is_file()
        ]
        files = {str(path.relative_to(folder)): _content(path) for path in paths}
        text = "\n".join(_flatten({"commands": outputs, "files": files})) + "\n"
        for prefix in sorted(self.path_names, key=len, reverse=True):
            text = text.replace(prefix, self.path_names[prefix])
        for pattern, replacement in _NOISE:
            text = pattern.sub(replacement, text)
        (self.out / f"{name}.txt").write_text(text, encoding="utf-8")
        codes = [entry["exit"] for entry in outputs]
        print(f"{name}: {time.perf_counter() - start:.1f} s, exit codes {codes}", flush=True)

    def _run(self, command: str, folder: Path) -> dict[str, Any]:
        words = shlex.split(command)
        program = words if words[0] == "rm" else [sys.executable, "-m", "ftlevel", *words]
        home, threads = self.work / "own" / folder.name, 1 + ("threads" in folder.name)
        (home / _TEMPORARY).mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ, "HOME": f"{home}", "XDG_CACHE_HOME": f"{home}", "HF_HOME": f"{home}",
            "TMPDIR": f"{home}/{_TEMPORARY}", "PYTHONPATH": f"{ROOT}/src",
            "OMP_NUM_THREADS": f"{threads}", "COLUMNS": "100", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        result = subprocess.run(program, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, check=False)  # fmt: skip
        error = result.stderr
        if "Traceback (most recent call last)" in error:
            error = error.rstrip().rpartition("\n")[2]  # frames may move
        is_json = result.stdout.startswith("{")
        out = json.loads(result.stdout) if is_json else result.stdout.splitlines()
        return {
            "command": command,
            "exit": result.returncode,
            "out": out,
            "err": error.splitlines(),
        }


def _content(path: Path) -> Any:
    """Return the recorded content of a file: text, or a digest of weights and long texts."""
    if path.suffix in (".pt", ".pth", ".bin") or path.name == "manifest.json":
        return "is there"  # pickles contain module names; the manifest contains their digests
    if path.suffix in (".safetensors", ".gguf") or path.stat().st_size > 50_000:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text) if path.suffix == ".json" else text.splitlines()


def _flatten(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield a line per leaf of a JSON value or line of a text, without times, memory, versions."""
    if isinstance(value, dict) and value:
        for key, entry in value.items():
            if key.endswith(("_modules", "_to_save")) and isinstance(entry, list):
                entry = sorted(entry)  # PEFT writes sets
            if key.endswith("intervals") and isinstance(entry, dict):
                entry = dict(sorted(entry.items()))  # ordered by a set
            if not _VARIES.search(key):
                yield from _flatten(entry, f"{prefix} › {key}" if prefix else key)
    elif isinstance(value, list) and value:
        for index, entry in enumerate(value, 1):
            is_line = isinstance(entry, str)  # without index: an added line moves no other
            yield from [f"{prefix}: {entry}"] if is_line else _flatten(entry, f"{prefix} › {index}")
    else:
        yield f"{prefix}: {json.dumps(value, ensure_ascii=False)}"


def record(out: Path, only: str, jobs: int) -> int:
    """Run the items that match `only`, `jobs` at a time, and write a file each to `out`."""
    items = [item for item in build_items() if re.search(only, item[0])]
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="freeze-") as work:
        recorder = Recorder(Path(work).resolve(), out)
        recorder.create_inputs()
        for sequential, workers in ((False, jobs), (True, 1)):
            selected = [item for item in items if item[0].startswith("two-") == sequential]
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(recorder.record, selected))
    return 0


def compare(before: Path, after: Path) -> int:
    """Print the differences of two recordings; return 1 if there are any."""
    names = sorted({path.name for folder in (before, after) for path in folder.glob("*.txt")})
    differing = 0
    for name in names:
        paths = before / name, after / name
        old, new = (path.read_text("utf-8").split("\n") if path.is_file() else [] for path in paths)
        lines = list(difflib.unified_diff(old, new, f"{paths[0]}", f"{paths[1]}", n=0, lineterm=""))
        if lines:
            differing += 1
            print(*lines, sep="\n")
    print(f"{differing} of {len(names)} files differ")
    return 1 if differing or not names else 0


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("record", "compare"))
    parser.add_argument("directories", type=Path, nargs="+", help="DIR, or BEFORE and AFTER")
    parser.add_argument("--only", default="", help="items whose names match this")
    parser.add_argument("--jobs", type=int, default=2, help="number of parallel items")
    args = parser.parse_args()
    if len(args.directories) != (2 if args.command == "compare" else 1):
        parser.error(f"{args.command}: {len(args.directories)} folders are given")
    if args.command == "record":
        return record(args.directories[0], args.only, args.jobs)
    return compare(*args.directories)


if __name__ == "__main__":
    sys.exit(main())
