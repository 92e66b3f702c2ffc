#!/usr/bin/env python3
"""Compare `ftlevel merge` with PEFT's merge_and_unload and save_pretrained.

    python benchmarks/merge.py
    python benchmarks/merge.py --runs 5 --model .models/SmolLM2-135M-Instruct
    python benchmarks/merge.py --no-large

Each merge is a process of its own; the two take turns. Private memory is RssAnon of /proc, sampled
every 5 ms, above what it was when everything had been imported: file pages that the kernel can drop
do not count. The large model is a Llama of 3 GB in 10 shards, made in a temporary folder of random
numbers; it is merged once more under a limit on the process's data (RLIMIT_DATA, which needs no
rights). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from measuring import MODEL, describe_machine, markdown, private_bytes

LIMIT_BYTES = 1536 << 20
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SHARDS = 10


class Peak:
    """Samples the private memory of this process in a thread."""

    def __init__(self) -> None:
        self.first = self.most = private_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, private_bytes())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def work(tool: str, base: str, adapter: str, out: str, limit: int) -> None:
    """Merge in this process, and print what it took as JSON."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import peft
    import peft.tuners.lora.model
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401 - both need it

    from ftlevel import MergeConfig, merge

    began = time.perf_counter()
    with Peak() as peak:
        if tool == "ftlevel":
            merge(
                MergeConfig(adapters=[adapter], base_model=base, output_dir=Path(out), verify=False)
            )
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
            merged.save_pretrained(out)
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(out)
    seconds = time.perf_counter() - began
    threads = torch.get_num_threads()
    print(json.dumps({"private_mb": (peak.most - peak.first) / 1e6, "above_imports_s": seconds,
                      "imports_mb": peak.first / 1e6,
                      "threads": threads}))  # fmt: skip


def measure(tool: str, base: Path, adapter: Path, out: Path, limit: int = 0) -> dict[str, float]:
    """Merge in a process of its own; `out` stays."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--worker", tool, str(base), str(adapter), str(out)]
    began = time.perf_counter()
    done = subprocess.run([*command, "--limit", str(limit)], capture_output=True, text=True,
                          check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    wall = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"{tool}: {done.stderr.strip().splitlines()[-1]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": wall}


def make_large(folder: Path) -> Path:
    """Write a Llama of about 3 GB in bfloat16 in 10 files, without having it in memory."""
    import torch
    import transformers

    from ftlevel.models.builtin import model_path
    from ftlevel.weights.checkpoint import TensorPart, TensorSpec, write_files

    config = transformers.LlamaConfig(**LARGE)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    noise = noise.to(torch.bfloat16)

    def draw(name: str, spec: TensorSpec) -> TensorPart:
        count = spec.nbytes // 2
        times = -(-count // len(noise))
        return TensorPart(
            {name: spec}, lambda: {name: noise.repeat(times)[:count].clone().view(spec.shape)}
        )

    names = {n: TensorSpec(torch.bfloat16, tuple(t.shape)) for n, t in model.state_dict().items()}
    share = sum(spec.nbytes for spec in names.values()) / SHARDS
    files: dict[str, list[TensorPart]] = {}
    written = 0.0
    for name, spec in names.items():
        number = min(int(written / share), SHARDS - 1) + 1
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        files.setdefault(file, []).append(draw(name, spec))
        written += spec.nbytes
    folder.mkdir()
    write_files(folder, files)
    config.save_pretrained(folder)
    for path in model_path("tiny-llama").glob("*token*"):
        shutil.copy(path, folder)
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """Save a LoRA of rank 8 on every linear of `base`, of random numbers."""
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    settings = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, settings, low_cpu_mem_usage=True)
    settings.base_model_name_or_path = str(base)
    shapes = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    folder.mkdir()
    settings.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=generator) * 0.02 for n, t in shapes.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    return folder


def same_tensors(first: Path, second: Path) -> tuple[int, int]:
    """Return how many tensors of two checkpoints are the same bytes, and how many there are."""
    import torch

    from ftlevel.weights.checkpoint import read_header, weight_files

    found, expected = (
        {n: t for file in weight_files(folder) for n, t in read_header(file)[0].items()}
        for folder in (first, second)
    )  # fmt: skip
    if set(found) != set(expected):
        return 0, len(expected)
    return sum(torch.equal(found[n].read(), t.read()) for n, t in expected.items()), len(expected)


def compare(name: str, base: Path, folder: Path, runs: int) -> list[str]:
    """Return a row of the table: `ftlevel` beside PEFT on `base`."""
    adapter = make_adapter(base, folder / f"adapter-{base.name}")
    found: dict[str, list[dict[str, float]]] = {"ftlevel": [], "peft": []}
    for number in range(runs):
        for tool, results in found.items():
            print(f"{name}: round {number + 1} of {runs}, {tool}", file=sys.stderr)
            results.append(measure(tool, base, adapter, folder / tool))
    equal, total = same_tensors(folder / "ftlevel", folder / "peft")

    def median(tool: str, key: str) -> float:
        return statistics.median(result[key] for result in found[tool])

    private = [median(tool, "private_mb") for tool in found]
    wall = [median(tool, "wall_s") for tool in found]
    return [
        name, f"{private[0]:,.0f}", f"{private[1]:,.0f}", f"{private[0] / private[1]:.3f}",
        f"{wall[0]:.1f}", f"{wall[1]:.1f}", f"{wall[0] / wall[1]:.2f}", f"{equal} of {total}",
    ]  # fmt: skip


def under_limit(base: Path, folder: Path) -> str:
    """Say what becomes of both under the limit on memory."""
    said = []
    for tool in ("ftlevel", "peft"):
        try:
            result = measure(
                tool, base, folder / f"adapter-{base.name}", folder / tool, LIMIT_BYTES
            )
            said.append(f"{tool}: done, {result['private_mb']:,.0f} MB above imports")
        except RuntimeError as error:
            said.append(f"{tool}: fails ({str(error)[:160]})")
    return f"Under RLIMIT_DATA = {LIMIT_BYTES / 2**30:.1f} GiB: " + "; ".join(said) + "."


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each on the small model")
    parser.add_argument("--model", type=Path, default=MODEL, help="the small model")
    parser.add_argument("--no-large", action="store_true", help="leave the 3 GB model out")
    parser.add_argument("--worker", nargs=4, metavar=("TOOL", "BASE", "ADAPTER", "OUT"))
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        tool, base, adapter, out = arguments.worker
        work(tool, base, adapter, out, arguments.limit)
        return 0
    head = ["", "private MB", "PEFT's", "ratio", "wall s", "PEFT's", "ratio", "equal tensors"]
    rows: list[list[str]] = []
    notes = []
    with tempfile.TemporaryDirectory(prefix="ftlevel-merge-") as temporary:
        folder = Path(temporary)
        if arguments.model.is_dir():
            rows.append(compare(arguments.model.name, arguments.model.resolve(), folder,
                                arguments.runs))  # fmt: skip
        if not arguments.no_large:
            base = make_large(folder / "large")
            rows.append(compare("Llama of 3 GB, 10 shards", base, folder, 1))
            notes.append(under_limit(base, folder))
    print(f"{describe_machine()}.\n")
    print(markdown(head, rows))
    print("\n" + "\n".join(notes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
