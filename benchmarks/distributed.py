"""Compare runs with every launcher and with sharding to the same run in one process.

    make distributed

prints three tables for docs/distributed.md: launcher × method, `--shard full` × method × kind of
model, and `--shard` × task. Tiny models without dropout are trained in float32 on CPU with gloo, by
two processes and by one with twice the gradient accumulation. Every run is evaluated before the
first step and at every second one, generates text if its task does, writes a checkpoint after each
evaluation, and keeps the best adapter. A cell is the largest relative difference of a step's or an
evaluation's loss, or the exit codes of failed processes. mpirun and srun are not started: their
variables are set by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from measuring import markdown

ROOT = Path(__file__).parent.parent
BOUND = 1e-6
STEPS, ROWS, BATCH = 4, 18, 4
EVAL_STEPS = 2  # steps between evaluations and checkpoints
SECONDS = 300  # timeout of a cell
LONG_STEPS = 40  # steps of the run that is killed
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"kind": "lora"}},
    "dora": {"method": {"kind": "lora", "use_dora": True}},
    "adapter": {"method": {"kind": "adapter"}},
    "prefix": {"method": {"kind": "prefix"}},
    "qlora": {"method": {"kind": "qlora"}, "quant": {"kind": "4bit"}},
    "full": {"method": {"kind": "full"}},
}
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {
    "decoder": ("llama", "text-generation", {}),
    "encoder": ("bert", "text-classification", BERT),
    "encoder-decoder": ("t5", "translation", {"dropout_rate": 0.0}),
}
TASKS = {
    **KINDS,
    "summary": ("t5", "summarization", {"dropout_rate": 0.0}),
    "tags": ("bert", "token-classification", BERT),
    "span": ("bert", "question-answering", BERT),
    "mask": ("bert", "masked-lm", BERT),
    "several labels": ("bert", "text-classification", BERT),
    "number": ("llama", "text-classification", {}),
    "reward": ("llama", "reward", {}),
}
TASK_METHODS = ("lora", "full")
LAUNCHED_METHODS = ("lora", "adapter", "prefix", "full")
WORDS = ["a", "dog", "sees", "the", "old", "house", "and", "the", "cat", "sits", "there"]


def prepare(folder: Path) -> None:
    """Write a tiny model and rows of each kind to `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import save_tiny

    for kind, (family, _, options) in TASKS.items():
        directory = folder / kind
        directory.mkdir(parents=True)
        save_tiny(directory, family, None, **options)
        for name, indices in (("", range(ROWS)), ("-validation", range(ROWS, ROWS + 6))):
            lines = [json.dumps(_row(kind, number)) + "\n" for number in indices]
            (folder / f"{kind}{name}.jsonl").write_text("".join(lines))


def _row(kind: str, index: int) -> dict[str, Any]:
    from preference_runs import create_pair
    from task_data import ROWS as TASK_ROWS

    builders = {name: TASK_ROWS[name] for name in ("tags", "span", "mask")}
    builders |= {"reward": create_pair, "several labels": TASK_ROWS["multi"],
                 "number": TASK_ROWS["regression"]}  # fmt: skip
    if kind in builders:
        return builders[kind](index)
    first, second = WORDS[: 2 + index % 5], WORDS[index % 6 : 8]
    if kind == "encoder":
        return {"text": " ".join(first + second), "label": "xy"[index % 2]}
    names = {"decoder": ("prompt", "completion"), "summary": ("document", "summary")}
    columns = names.get(kind, ("source", "target"))
    return dict(zip(columns, (" ".join(first), " ".join(second)), strict=True))


def settings(folder: Path, kind: str, method: str, out: Path) -> dict[str, Any]:
    """Return the configuration of a run by one process, as nested values."""
    _, task, _ = TASKS[kind]
    writes = task in ("text-generation", "translation", "summarization")
    return {
        **METHODS[method],
        "task": task,
        "model": {"name_or_path": str(folder / kind), "dtype": "float32"},
        "data": {"dataset": str(folder / f"{kind}.jsonl"),
                 "validation_file": str(folder / f"{kind}-validation.jsonl")},
        "train": {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2,
                  "max_steps": STEPS, "logging_steps": 1, "eval_on_start": True,
                  "eval_steps": EVAL_STEPS, "save_steps": EVAL_STEPS, "max_new_tokens": 4,
                  "max_generate_samples": 3, "predict_with_generate": writes or None,
                  # The best model cannot be kept with sharded weights.
                  "metric_for_best_model": None if method == "full" else "loss"},
        "speed": {"tokens_per_micro_batch": 48},  # unequal counts in two processes
        "output": {"dir": str(out), "overwrite": True},
    }  # fmt: skip


def work(folder: Path, cases: Sequence[str], out: Path, shard: str) -> None:
    """Train each of `cases` (`kind/method`) in this process, one of those that were started."""
    from ftlevel import TrainConfig, train
    from ftlevel.models.upstream.shards import local_shard
    from ftlevel.training.processes import started_processes

    processes = started_processes()
    for case in cases:
        kind, method = case.split("/")
        values = settings(folder, kind, method, out / case)
        if processes.count > 1:
            values["train"] |= {"gradient_accumulation_steps": 1, "shard": shard}
        model = train(TrainConfig.model_validate(values), listener=_Silence()).model
        local_size = sum(local_shard(p).numel() for p in model.parameters())
        share = local_size / sum(p.numel() for p in model.parameters())
        if processes.is_first:
            (out / case / "share.json").write_text(json.dumps(share))


class _Silence:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def losses(run: Path, name: str = "loss") -> list[float]:
    """Return the losses of a run's steps, or of its evaluations with `eval_loss`."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def difference(a_run: Path, b_run: Path, steps: int = STEPS) -> float:
    """Return the largest relative difference of a step's or an evaluation's loss."""
    largest = 0.0
    for name, count in (("loss", steps), ("eval_loss", steps // EVAL_STEPS + 1)):
        pairs = list(zip(losses(a_run, name), losses(b_run, name), strict=True))
        assert len(pairs) == count, (name, pairs)
        largest = max(largest, *(abs(a - b) / abs(a) for a, b in pairs))
    return largest


def worker(folder: Path, cases: Sequence[str], out: Path, shard: str = "none") -> list[str]:
    """Return the Python arguments that run `work`."""
    return [str(Path(__file__)), "work", str(folder), str(out), shard, *cases]


def run(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
    """Run `commands` in parallel, each with its own variables.

    Raises:
        RuntimeError: a command failed or timed out.
    """
    running = [
        subprocess.Popen([sys.executable, *command], env=environment(variables), text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command, variables in commands
    ]  # fmt: skip
    deadline = time.monotonic() + SECONDS
    errors = []
    try:
        for process in running:
            errors.append(process.communicate(timeout=max(deadline - time.monotonic(), 0))[1])
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{error.cmd}: not finished after {SECONDS} s") from None
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {''.join(error[-3000:] for error in errors)}")


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process, with `variables` and without a launcher's variables."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    source = os.pathsep.join([str(ROOT / "src"), inherited.get("PYTHONPATH", "")])
    return {**inherited, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **variables}


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def get_launch_commands(
    launcher: str, arguments: Sequence[str]
) -> list[tuple[list[str], dict[str, str]]]:
    """Return the commands with which `launcher` runs Python with `arguments` in two processes."""
    port = str(free_port())
    torchrun = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if launcher == "torchrun, two processes":
        return [([*torchrun, "--nproc-per-node", "2", *arguments], {})]
    if launcher == "torchrun, two nodes":
        return [([*torchrun, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
                  *arguments], {}) for node in range(2)]  # fmt: skip
    if launcher == "accelerate launch":
        return [(["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                  "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                  "--main_process_port", port, *arguments], {})]  # fmt: skip
    if launcher == "srun (its variables)":
        return [(list(arguments), {
            "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": "localhost,other", "MASTER_PORT": port,
        }) for rank in range(2)]  # fmt: skip
    if launcher == "mpirun (Open MPI's variables)":
        return [(list(arguments), {
            "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **address,
        }) for rank in range(2)]  # fmt: skip
    raise ValueError(launcher)


LAUNCHERS = ("torchrun, two processes", "torchrun, two nodes", "accelerate launch",
             "srun (its variables)", "mpirun (Open MPI's variables)")  # fmt: skip


def build_flags(folder: Path, method: str, out: Path) -> list[str]:
    """Return the command line of a run with `--num-processes 2`."""
    kind = METHODS[method]["method"]["kind"]
    return ["-m", "ftlevel", "train", "--num-processes", "2", "--method", kind,
            "--model", str(folder / "decoder"), "--dataset", str(folder / "decoder.jsonl"),
            "--dtype", "float32", "--per-device-train-batch-size", str(BATCH), "--max-steps",
            str(STEPS), "--set", "speed.tokens_per_micro_batch=48", *build_logging_flags(folder),
            "--output-dir", str(out), "--overwrite", "--quiet"]  # fmt: skip


def build_logging_flags(folder: Path) -> list[str]:
    """Return the flags for the logging, evaluation and saving of `settings`."""
    return ["--logging-steps", "1", "--validation-file", str(folder / "decoder-validation.jsonl"),
            "--eval-on-start", "--eval-steps", str(EVAL_STEPS), "--save-steps",
            str(EVAL_STEPS)]  # fmt: skip


def compare_killed_and_resumed(folder: Path) -> float:
    """Return the difference of a killed and resumed run of two nodes to one process.

    Each node is an agent of torchrun; after the first checkpoint, all processes of one are killed.
    """
    out, reference = folder / "killed", folder / "not-killed"
    command = ["-m", "ftlevel", "train", "--method", "lora", "--model", str(folder / "decoder"),
               "--dataset", str(folder / "decoder.jsonl"), "--dtype", "float32",
               "--per-device-train-batch-size", str(BATCH), "--max-steps", str(LONG_STEPS),
               *build_logging_flags(folder), "--quiet", "--output-dir"]  # fmt: skip
    nodes = [
        subprocess.Popen([sys.executable, *arguments], env=environment(variables),
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for arguments, variables in get_launch_commands("torchrun, two nodes", [*command, str(out)])
    ]  # fmt: skip
    while not list(out.glob("checkpoints/*/manifest.json")):
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    for process in (*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]):
        process.kill()
    assert all(node.wait() != 0 for node in nodes)
    assert not (out / "summary.json").exists()
    run(get_launch_commands("torchrun, two nodes", [*command, str(out), "--resume"]))
    run([([*command, str(reference), "--gradient-accumulation-steps", "2"], {})])
    return difference(reference, out, LONG_STEPS)


def fork(folder: Path, case: str, out: Path, shard: str, count: int) -> None:
    """Train `case` in `count` forked processes that have imported everything.

    Raises:
        RuntimeError: a process failed or timed out.
    """
    import distributed  # this file, importable by the processes

    import ranks

    worker_args = (folder, [case], out, shard)
    codes = ranks.end(ranks.start(distributed.work, [worker_args] * count), SECONDS)
    if any(code != 0 for code in codes):
        raise RuntimeError(f"exit codes {codes}: {case}, --shard {shard}")


@dataclass
class Cells:
    """Cells of the tables: `reference` has the runs of one process, `differences` the results."""

    folder: Path
    reference: Path
    differences: list[float] = field(default_factory=list)

    def add(self, difference_of: Callable[[], float]) -> str:
        """Return a cell's text."""
        try:
            self.differences.append(difference_of())
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            self.differences.append(math.inf)
            print(f"failed: {error}", file=sys.stderr, flush=True)
            return f"failed: {str(error).split(':')[0]}"
        return f"{self.differences[-1]:.1e}"

    def compare(self, case: str, other: Path) -> str:
        """Return the cell of a run in `other`."""
        return self.add(lambda: difference(self.reference / case, other))

    def shard(self, case: str, shard: str) -> str:
        """Train `case` in two processes with `--shard`, and return its cell."""
        out = self.folder / f"shard-{shard}"

        def difference_of() -> float:
            fork(self.folder, case, out, shard, 2)
            return difference(self.reference / case, out / case)

        return self.add(difference_of)


def launchers_table(cells: Cells) -> None:
    """Print launcher × method."""
    folder, rows = cells.folder, []
    decoders = [f"decoder/{method}" for method in LAUNCHED_METHODS]
    for launcher in LAUNCHERS:
        out = folder / launcher.replace(" ", "-")
        try:
            run(get_launch_commands(launcher, worker(folder, decoders, out)))
        except RuntimeError as error:  # its remaining cells are missing
            print(error, file=sys.stderr, flush=True)
        rows.append([launcher, *(cells.compare(case, out / case) for case in decoders)])

    def compare_ftlevel_run(method: str) -> float:
        run([(build_flags(folder, method, folder / "ours" / method), {})])
        return difference(cells.reference / f"decoder/{method}", folder / "ours" / method)

    ftlevel_cells = [
        cells.add(functools.partial(compare_ftlevel_run, method)) for method in LAUNCHED_METHODS
    ]
    rows.append(["ftlevel --num-processes 2", *ftlevel_cells])
    print(markdown(["launcher", *LAUNCHED_METHODS], rows) + "\n", flush=True)
    resumed = cells.add(lambda: compare_killed_and_resumed(folder))
    print(f"torchrun, two nodes, one killed, both resumed: {resumed}\n", flush=True)


def sharded_tables(cells: Cells) -> None:
    """Print `--shard full` × method × kind of model, and `--shard` × task."""
    rows = []
    for method in METHODS:
        cases = [f"{kind}/{method}" for kind in KINDS]
        texts = [cells.shard(case, "full") for case in cases]
        files = [cells.folder / "shard-full" / case / "share.json" for case in cases]
        shares = [json.loads(file.read_text()) for file in files if file.is_file()]
        rows.append([method, *texts, f"{max(shares, default=math.nan):.0%}"])
    head = ["--shard full", *KINDS, "largest share of parameters in a process"]
    print(markdown(head, rows) + "\n", flush=True)
    variants = [(shard, method) for shard in ("full", "grads") for method in TASK_METHODS]
    rows = [
        [f"{kind}: {task}", *(cells.shard(f"{kind}/{method}", shard) for shard, method in variants)]
        for kind, (_, task, _) in TASKS.items()
    ]
    print(markdown(["", *(f"--shard {s}, {method}" for s, method in variants)], rows), flush=True)


def compare_all(folder: Path) -> int:
    """Print the tables and return the number of cells that failed or exceed the bound."""
    os.environ["PYTHONPATH"] = environment({})["PYTHONPATH"] + f"{os.pathsep}{ROOT / 'tests'}"
    cells = Cells(folder, folder / "one")
    prepare(folder)
    cases = [f"{kind}/{method}" for kind in KINDS for method in METHODS]
    cases += [f"{kind}/{method}" for kind in TASKS if kind not in KINDS for method in TASK_METHODS]
    for case in cases:  # a failed reference run gives failed cells
        with contextlib.suppress(RuntimeError):
            fork(folder, case, cells.reference, "none", 1)
    launchers_table(cells)
    sharded_tables(cells)
    over = sum(not value <= BOUND for value in cells.differences)
    largest = max(cells.differences)
    count = len(cells.differences)
    print(f"{count} cells, largest {largest:.1e}, bound {BOUND:.0e}, exceeded by {over}")
    return over


def main() -> None:
    """Compare everything, or run `work` in one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", default="compare", choices=("compare", "work"))
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args()
    if args.mode == "work":
        folder, out, shard, *cases = args.rest
        work(Path(folder), cases, Path(out), shard)
        return
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(bool(compare_all(Path(folder) / "all")))


if __name__ == "__main__":
    main()
