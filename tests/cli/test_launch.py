"""`launch` writes job files; the job trains, is interrupted, and is requeued to resume."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from command_line import Cli
from ftlevel.cli.app import run
from run_files import ModelDir, write_rows

TESTS = str(Path(__file__).parents[1])
TRAIN = ["--method", "lora", "--max-steps", "6", "--output-dir"]
START = ["--dataset", "builtin:docstrings", "--resume"]

# srun as SLURM 24.11 does: one process per task with its variables; SIGTERM kills all of them.
SRUN = """#!{python}
import os, signal, sys
sys.path.insert(0, {tests!r})
from forked import Forked
words = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
tasks = [Forked(words[1:], env={{**os.environ,
    "SLURM_PROCID": str(n), "SLURM_LOCALID": "0", "SLURM_NODEID": str(n),
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "localhost,b"}}) for n in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [os.kill(task.pid, signal.SIGKILL) for task in tasks])
open(sys.argv[0] + ".pids", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""


def test_slurm_job_file(tmp_path: Path, cli: Cli) -> None:
    job_file, out = tmp_path / "job.sbatch", tmp_path / "My run"
    arguments = ["launch", "--on", "slurm", "--nodes", "2", "--gpus-per-node=8", "--job-option",
                 "partition=gpu", "--job-file", str(job_file), *TRAIN, str(out)]  # fmt: skip
    assert f"submit it: sbatch {job_file}" in cli(*arguments)
    text = job_file.read_text()
    for line in ("--job-name=ftlevel-my-run", "--nodes=2", "--ntasks-per-node=8",
                 "--gpus-per-node=8", "--partition=gpu", "--requeue"):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    command = f"ftlevel train --method lora --max-steps 6 --output-dir '{out}'"
    assert f" {command} --dataset builtin:docstrings --resume &" in text  # data starts a new run
    assert subprocess.run(["bash", "-n", job_file], check=False).returncode == 0
    cli.fails(*arguments)  # the file exists


def test_kubernetes_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["launch", "--on", "k8s", "--nodes", "3", "--gpus-per-node", "4", "--image",
                 "a/b:1", "--claim", "c", "--dry-run", *TRAIN, str(tmp_path / "run")]  # fmt: skip
    assert run(arguments) == 0
    assert not list(tmp_path.iterdir())
    job = yaml.safe_load(capsys.readouterr().out)
    spec = job["spec"]["pytorchReplicaSpecs"]
    assert job["spec"]["nprocPerNode"] == "4"
    assert (spec["Master"]["replicas"], spec["Worker"]["replicas"]) == (1, 2)
    pod = spec["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["train", *TRAIN, str(tmp_path / "run"), *START]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": str(tmp_path)}]
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "c"


def test_ray_train_script(tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / 'my "run"'
    arguments = ["launch", "--on", "ray", "--nodes", "2", "--gpus-per-node", "4", "--job-option",
                 "CPU=6", "--dry-run", *TRAIN, str(out)]  # fmt: skip
    script = ast.parse(cli(*arguments))
    values = {
        keyword.arg: ast.literal_eval(keyword.value)
        for call in ast.walk(script) if isinstance(call, ast.Call)
        for keyword in call.keywords if keyword.arg in (
            "num_workers", "use_gpu", "resources_per_worker", "name", "storage_path")
    }  # fmt: skip
    assert values == {
        "num_workers": 8, "use_gpu": True, "resources_per_worker": {"CPU": 6},
        "name": "ftlevel-my-run", "storage_path": str(tmp_path),
    }  # fmt: skip
    (assigned,) = (node.value for node in script.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(assigned) == ["train", *TRAIN, str(out), *START]
    constants = {node.value for node in ast.walk(script) if isinstance(node, ast.Constant)}
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
            "MASTER_PORT"} <= constants  # fmt: skip


def test_job_that_continues_an_adapter_names_no_model(cli: Cli) -> None:
    """The base is the adapter's; --model with it would be another one."""
    train = ["--adapter", "runs/a", "--output-dir", "runs/b"]
    text = cli("launch --on slurm --dry-run", *train)
    assert f"ftlevel train {' '.join([*train, *START])} &" in text


def test_values_are_quoted(cli: Cli) -> None:
    out, model = "/data/all: #1/run", "builtin:m😀"
    train = ["--output-dir", out, "--model", model]
    spec = yaml.safe_load(cli("launch --on k8s --image a --claim c --dry-run", *train))["spec"][
        "pytorchReplicaSpecs"
    ]
    (container,) = spec["Master"]["template"]["spec"]["containers"]
    assert container["args"] == ["train", *train, "--resume"]
    assert container["volumeMounts"][0]["mountPath"] == "/data/all: #1"
    comment = ["--job-option", 'comment=it\'s "b" # c', "--job-option", "exclusive"]
    text = cli("launch --on slurm --dry-run", *comment, *train)  # as SLURM 24.11 reads it
    assert "\n#SBATCH --comment='it'\"'\"'s \"b\" # c'\n#SBATCH --exclusive\n" in text
    resource = ["--job-option", "accelerator_type:A100=0.01"]
    assert "{'accelerator_type:A100': 0.01}" in cli("launch --on ray --dry-run", *resource, *train)


@pytest.mark.parametrize(
    "given",
    [["--dry-run", "true"], ["--submit", "False", "--dry_run=yes"], ["--dry-run", "--json"]],
)
def test_job_has_no_words_of_launch(given: list[str], cli: Cli) -> None:
    train = ["--model", "builtin:tiny-llama", "--output-dir", "runs/x"]
    text = cli("launch --on slurm", *given, "--nodes=2", *train)
    assert f"ftlevel train {' '.join(train)} --resume &" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "slurm"], "needs --output-dir DIR"),
        (["--on", "pbs", "--output-dir", "x"], "expected one of slurm, k8s, ray"),
        (["--on", "ray", "--output-dir", "x"], "absolute path"),
        (["--on", "ray", "--output-dir", "/x", "--job-option", "CPU=two"], "as CPU=4"),
        (["--on", "slurm", "--output-dir", "x", "--overwrite"], "Remove the old run"),
        (["--on", "slurm", "--output-dir", "x", "--num-processes", "2"], "Use --nodes"),
        (["--on", "k8s", "--output-dir", "/x/y"], "--image IMAGE"),
        (["--on", "k8s", "--image", "a", "--claim", "c", "--output-dir", "x"], "absolute path"),
        (["--on", "k8s", "--image", "a", "--claim", "c", "--output-dir", "/x"], "mounted as /"),
        (["--on", "slurm", "--output-dir", "x", "--job-option", "=a"], "expected NAME or NAME"),
        (["--on", "slurm", "--output-dir", "x", "--lora-r", "0"], "method.r must be"),
    ],
)
def test_unsupported_job_options_are_rejected(arguments: list[str], message: str, cli: Cli) -> None:
    assert message in cli.fails("launch", *arguments)


def test_job_is_submitted_only_with_submit_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\necho "Submitted $1"; echo "$1" >> "$0.log"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    arguments = ["launch", "--on", "slurm", *TRAIN, str(tmp_path / "run"), "--job-file"]
    cli(*arguments, tmp_path / "a")
    assert not (tmp_path / "sbatch.log").exists()
    result = json.loads(cli(*arguments, tmp_path / "b", "--submit --json").splitlines()[-1])
    assert result["submitted"] == f"Submitted {tmp_path / 'b'}"
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert "there is no sbatch here" in cli.fails(*arguments, tmp_path / "c", "--submit")


@pytest.mark.slow
def test_interrupted_job_saves_checkpoint_and_requeues(
    tiny_model_dir: ModelDir, tmp_path: Path
) -> None:
    rows, out, job_file = tmp_path / "rows.jsonl", tmp_path / "run", tmp_path / "job"
    write_rows(rows, ({"prompt": "a dog", "completion": f"sees {n}"} for n in range(8)))
    assert run(["launch", "--on", "slurm", "--nodes", "2", "--job-file", str(job_file), "--model",
                str(tiny_model_dir("llama")), "--dataset", str(rows), "--max-steps", "3000",
                "--logging-steps", "1", "--set", "data.gate.near_duplicates=ignore",
                "--output-dir", str(out)]) == 0  # fmt: skip
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable, tests=TESTS)),
                       ("scontrol", '#!/bin/bash\necho "$@" > "$0.log"\n'),
                       ("scancel", f'#!/bin/bash\n[ "$*" = "--signal=TERM 7" ] && '
                                   f'kill $(cat {programs}/srun.pids)\n')):  # fmt: skip
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    port = str(20000 + os.getpid() % 20000)
    job = subprocess.Popen(
        ["bash", job_file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7",
             "MASTER_PORT": port},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)  # five minutes before the end
    output = job.communicate(timeout=200)[0]
    assert job.returncode == 0, output
    assert (programs / "scontrol.log").read_text() == "requeue 7\n"
    (checkpoint,) = (out / "checkpoints").glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()
    assert "interrupted after step" in output
    assert shutil.which("srun") != str(programs / "srun")
