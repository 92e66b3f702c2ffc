"""Compare runs by every launcher and with sharding to the same run in one process.

    make distributed

prints three tables for docs/distributed.md: launcher × method, `--shard full` × method × kind of
model, and `--shard` × task. Everything is trained on this machine's CPU by gloo: by two processes,
and by one with twice the accumulation, in float32 on tiny models without dropout. Every run is
evaluated before the first step and at every second one, generates text if its task writes some,
writes a checkpoint after each evaluation, and keeps the best adapter. The figure is the largest
relative difference of a step's loss and of an evaluation's; a cell without one names the exit codes
of its processes. mpirun and srun are not started: their variables are set by hand.
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

ROOT = Path(__file__).parent.parent
BOUND = 1e-6
STEPS, ROWS, BATCH = 4, 18, 4
WATCHED = 2  # steps from an evaluation and a checkpoint to the next
SECONDS = 300  # of a cell at most
LONG = 40  # steps of the run that is killed
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
OF_TASKS = ("lora", "full")
LAUNCHED = ("lora", "adapter", "prefix", "full")
WORDS = ["a", "dog", "sees", "the", "old", "house", "and", "the", "cat", "sits", "there"]


def prepare(folder: Path) -> None:
    """Write a tiny model and rows of each kind into `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_models import save_tiny

    for kind, (family, _, options) in TASKS.items():
        place = folder / kind
        place.mkdir(parents=True)
        save_tiny(place, family, None, **options)
        for name, numbers in (("", range(ROWS)), ("-validation", range(ROWS, ROWS + 6))):
            lines = [json.dumps(_row(kind, number)) + "\n" for number in numbers]
            (folder / f"{kind}{name}.jsonl").write_text("".join(lines))


def _row(kind: str, number: int) -> dict[str, Any]:
    from preference_runs import create_pair
    from task_data import ROWS as MADE

    made = {"tags": MADE["tags"], "span": MADE["span"], "mask": MADE["mask"], "reward": create_pair,
            "several labels": MADE["multi"], "number": MADE["regression"]}  # fmt: skip
    if kind in made:
        return made[kind](number)
    first, second = WORDS[: 2 + number % 5], WORDS[number % 6 : 8]
    if kind == "encoder":
        return {"text": " ".join(first + second), "label": "xy"[number % 2]}
    names = {"decoder": ("prompt", "completion"), "summary": ("document", "summary")}
    own = names.get(kind, ("source", "target"))
    return dict(zip(own, (" ".join(first), " ".join(second)), strict=True))


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
                  "eval_steps": WATCHED, "save_steps": WATCHED, "max_new_tokens": 4,
                  "max_generate_samples": 3, "predict_with_generate": writes or None,
                  # The best of a model that is shared out cannot be kept.
                  "metric_for_best_model": None if method == "full" else "loss"},
        "speed": {"tokens_per_micro_batch": 48},  # the two processes have not equally many
        "output": {"dir": str(out), "overwrite": True},
    }  # fmt: skip


def work(folder: Path, cases: Sequence[str], out: Path, shard: str) -> None:
    """Train each of `cases` (`kind/method`) as one of the processes that were started."""
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
        held = sum(local_shard(p).numel() for p in model.parameters())
        share = held / sum(p.numel() for p in model.parameters())
        if processes.is_first:
            (out / case / "share.json").write_text(json.dumps(share))


class _Silence:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def losses(run: Path, name: str = "loss") -> list[float]:
    """Return the losses of a run's steps; by the name `eval_loss` those of its evaluations."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def difference(one: Path, other: Path, steps: int = STEPS) -> float:
    """Return the largest relative difference of a step's loss or an evaluation's."""
    found = 0.0
    for name, count in (("loss", steps), ("eval_loss", steps // WATCHED + 1)):
        pairs = list(zip(losses(one, name), losses(other, name), strict=True))
        assert len(pairs) == count, (name, pairs)
        found = max(found, *(abs(a - b) / abs(a) for a, b in pairs))
    return found


def worker(folder: Path, cases: Sequence[str], out: Path, shard: str = "none") -> list[str]:
    """Return the arguments of Python that let it `work`."""
    return [str(Path(__file__)), "work", str(folder), str(out), shard, *cases]


def run(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> None:
    """Run `commands`, each with variables of its own, beside one another to their end.

    Raises:
        RuntimeError: the exit code of one is not 0, or one does not end.
    """
    running = [
        subprocess.Popen([sys.executable, *command], env=environment(more), text=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command, more in commands
    ]  # fmt: skip
    deadline = time.monotonic() + SECONDS
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=max(deadline - time.monotonic(), 0))[1])
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{error.cmd}: not at its end after {SECONDS} s") from None
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {''.join(error[-3000:] for error in said)}")


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process, `more` among them, and none of a launcher's."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    source = os.pathsep.join([str(ROOT / "src"), own.get("PYTHONPATH", "")])
    return {**own, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started_by(launcher: str, arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
    """Return the commands by which `launcher` runs Python with `arguments` in two processes."""
    port = str(free_port())
    torchrun = ["-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
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
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "2", **meet,
        }) for rank in range(2)]  # fmt: skip
    raise ValueError(launcher)


LAUNCHERS = ("torchrun, two processes", "torchrun, two nodes", "accelerate launch",
             "srun (its variables)", "mpirun (Open MPI's variables)")  # fmt: skip


def by_flags(folder: Path, method: str, out: Path) -> list[str]:
    """Return the command line of a run by `--num-processes 2`."""
    kind = METHODS[method]["method"]["kind"]
    return ["-m", "ftlevel", "train", "--num-processes", "2", "--method", kind,
            "--model", str(folder / "decoder"), "--dataset", str(folder / "decoder.jsonl"),
            "--dtype", "float32", "--per-device-train-batch-size", str(BATCH), "--max-steps",
            str(STEPS), "--set", "speed.tokens_per_micro_batch=48", *watched_by_flags(folder),
            "--output-dir", str(out), "--overwrite", "--quiet"]  # fmt: skip


def watched_by_flags(folder: Path) -> list[str]:
    """Return the flags by which a run is logged, evaluated and saved as `settings` has it."""
    return ["--logging-steps", "1", "--validation-file", str(folder / "decoder-validation.jsonl"),
            "--eval-on-start", "--eval-steps", str(WATCHED), "--save-steps",
            str(WATCHED)]  # fmt: skip


def killed_and_resumed(folder: Path) -> float:
    """Return how far a run of two nodes that was killed and resumed is from that of one process.

    Each node is an agent of torchrun; when there is a checkpoint, all of one is killed.
    """
    out, one = folder / "killed", folder / "not-killed"
    command = ["-m", "ftlevel", "train", "--method", "lora", "--model", str(folder / "decoder"),
               "--dataset", str(folder / "decoder.jsonl"), "--dtype", "float32",
               "--per-device-train-batch-size", str(BATCH), "--max-steps", str(LONG),
               *watched_by_flags(folder), "--quiet", "--output-dir"]  # fmt: skip
    nodes = [
        subprocess.Popen([sys.executable, *arguments], env=environment(more),
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for arguments, more in started_by("torchrun, two nodes", [*command, str(out)])
    ]  # fmt: skip
    while not list(out.glob("checkpoints/*/manifest.json")):
        assert all(node.poll() is None for node in nodes)
        time.sleep(0.05)
    for part in (*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]):
        part.kill()
    assert all(node.wait() != 0 for node in nodes)
    assert not (out / "summary.json").exists()
    run(started_by("torchrun, two nodes", [*command, str(out), "--resume"]))
    run([([*command, str(one), "--gradient-accumulation-steps", "2"], {})])
    return difference(one, out, LONG)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of Markdown."""
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print(flush=True)


def fork(folder: Path, case: str, out: Path, shard: str, count: int) -> None:
    """Train `case` in `count` processes that have imported everything.

    Raises:
        RuntimeError: the exit code of one is not 0, or one does not end.
    """
    import distributed  # this file, as the processes find it

    import ranks

    given = (folder, [case], out, shard)
    codes = ranks.end(ranks.start(distributed.work, [given] * count), SECONDS)
    if any(code != 0 for code in codes):
        raise RuntimeError(f"exit codes {codes}: {case}, --shard {shard}")


@dataclass
class Cells:
    """The cells of the tables.

    Attributes:
        folder: with the model and the rows of each kind.
        one: with the runs of one process, which the others are compared with.
        found: the difference of each cell so far; infinite for one that has failed.
    """

    folder: Path
    one: Path
    found: list[float] = field(default_factory=list)

    def add(self, difference_of: Callable[[], float]) -> str:
        """Return a cell's text."""
        try:
            self.found.append(difference_of())
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            self.found.append(math.inf)
            print(f"failed: {error}", file=sys.stderr, flush=True)
            return f"failed: {str(error).split(':')[0]}"
        return f"{self.found[-1]:.1e}"

    def compare(self, case: str, other: Path) -> str:
        """Return the cell of a run that is in `other`."""
        return self.add(lambda: difference(self.one / case, other))

    def shard(self, case: str, shard: str) -> str:
        """Train `case` in two processes by `--shard`, and return its cell."""
        out = self.folder / f"shard-{shard}"

        def difference_of() -> float:
            fork(self.folder, case, out, shard, 2)
            return difference(self.one / case, out / case)

        return self.add(difference_of)


def launchers_table(cells: Cells) -> None:
    """Print launcher × method."""
    folder, rows = cells.folder, []
    decoders = [f"decoder/{method}" for method in LAUNCHED]
    for launcher in LAUNCHERS:
        out = folder / launcher.replace(" ", "-")
        try:
            run(started_by(launcher, worker(folder, decoders, out)))
        except RuntimeError as error:  # the cells that it has not come to are missing
            print(error, file=sys.stderr, flush=True)
        rows.append([launcher, *(cells.compare(case, out / case) for case in decoders)])

    def by_ftlevel(method: str) -> float:
        run([(by_flags(folder, method, folder / "ours" / method), {})])
        return difference(cells.one / f"decoder/{method}", folder / "ours" / method)

    ours = [cells.add(functools.partial(by_ftlevel, method)) for method in LAUNCHED]
    print_table(["launcher", *LAUNCHED], [*rows, ["ftlevel --num-processes 2", *ours]])
    resumed = cells.add(lambda: killed_and_resumed(folder))
    print(f"torchrun, two nodes, one killed, both resumed: {resumed}\n", flush=True)


def sharded_tables(cells: Cells) -> None:
    """Print `--shard full` × method × kind of model, and `--shard` × task."""
    rows = []
    for method in METHODS:
        own = [f"{kind}/{method}" for kind in KINDS]
        texts = [cells.shard(case, "full") for case in own]
        files = [cells.folder / "shard-full" / case / "share.json" for case in own]
        shares = [json.loads(file.read_text()) for file in files if file.is_file()]
        rows.append([method, *texts, f"{max(shares, default=math.nan):.0%}"])
    print_table(["--shard full", *KINDS, "of the parameters in a process, at most"], rows)
    ways = [(shard, method) for shard in ("full", "grads") for method in OF_TASKS]
    rows = [
        [f"{kind}: {task}", *(cells.shard(f"{kind}/{method}", shard) for shard, method in ways)]
        for kind, (_, task, _) in TASKS.items()
    ]
    print_table(["", *(f"--shard {shard}, {method}" for shard, method in ways)], rows)


def compare_all(folder: Path) -> int:
    """Print the tables and return how many cells have failed or are above the bound."""
    os.environ["PYTHONPATH"] = environment({})["PYTHONPATH"] + f"{os.pathsep}{ROOT / 'tests'}"
    cells = Cells(folder, folder / "one")
    prepare(folder)
    cases = [f"{kind}/{method}" for kind in KINDS for method in METHODS]
    cases += [f"{kind}/{method}" for kind in TASKS if kind not in KINDS for method in OF_TASKS]
    for case in cases:  # one that fails has no run to be compared with, and so no cell
        with contextlib.suppress(RuntimeError):
            fork(folder, case, cells.one, "none", 1)
    launchers_table(cells)
    sharded_tables(cells)
    over = sum(not value <= BOUND for value in cells.found)
    largest = max(cells.found)
    print(f"{len(cells.found)} cells, largest {largest:.1e}, bound {BOUND:.0e}, above it: {over}")
    return over


def main() -> None:
    """Compare everything, or work as one process of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", nargs="?", default="compare", choices=("compare", "work"))
    parser.add_argument("rest", nargs="*")
    given = parser.parse_args()
    if given.mode == "work":
        folder, out, shard, *cases = given.rest
        work(Path(folder), cases, Path(out), shard)
        return
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(bool(compare_all(Path(folder) / "all")))


if __name__ == "__main__":
    main()
