"""Rank and world size of this process, from the environment variables of torchrun, mpirun or srun.

Must not import torch: the command line calls it before heavy imports.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from ftlevel.errors import ConfigError

_PORT, _PORTS = 29500, 20000  # torchrun's default; range of ports for SLURM jobs
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launcher:
    """Name of a launcher, and of the environment variable of each value ("" if it sets none)."""

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str = ""
    node: str = ""


def _mpirun(library: str, prefix: str) -> Launcher:
    names = (f"{prefix}_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Launcher(f"mpirun ({library})", *names)


# Innermost launchers first: mpirun starts daemons with srun, and srun can start torchrun.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    _mpirun("Open MPI", "OMPI_COMM_WORLD"),
    _mpirun("MVAPICH", "MV2_COMM_WORLD"),
    Launcher("mpirun (MPICH)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Launcher("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", "SLURM_NODEID"),
)
_POD = Launcher("RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "")
"""Kubernetes PyTorchJob with one process per machine and no local rank."""

_ACCUMULATION = "--gradient_accumulation_steps"
_ACCELERATE_VARIABLES = {
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "--shard full"),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "--shard full"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "--shard full"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", "--shard full"),
    "ACCELERATE_MIXED_PRECISION": ("--mixed_precision", "--dtype"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (_ACCUMULATION, _ACCUMULATION.replace("_", "-")),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", ""),
}
"""Variables with which `accelerate launch` overrides the configuration."""
_DISABLED_VALUES = {"", "no", "false", "0", "1"}  # 1: one micro-step; used features are "true"


@dataclass(frozen=True)
class World:
    """Rank of this process and size of the run.

    Attributes:
        launcher: name of the launcher; empty for a single process.
        size: number of processes on all machines.
        node: index of this machine.
        address: rendezvous address, empty for a single process.
    """

    launcher: str = ""
    size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    address: str = ""
    port: int = 0

    def publish(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Set torchrun's variables in `environment` (modified) for torch and transformers."""
        environment.update(
            {
                "RANK": str(self.rank),
                "WORLD_SIZE": str(self.size),
                "LOCAL_RANK": str(self.local_rank),
                "LOCAL_WORLD_SIZE": str(self.local_size),
                "MASTER_ADDR": self.address,
                "MASTER_PORT": str(self.port),
            }
        )


def get_launcher(environment: Mapping[str, str] = os.environ) -> Launcher | None:
    """Returns the launcher that started this process, recognized by its variables, or None."""
    for launcher in LAUNCHERS:
        if all(name in environment for name in (launcher.rank, launcher.size, launcher.local_rank)):
            return launcher
    return _POD if _POD.rank in environment or _POD.size in environment else None


def is_launched() -> bool:
    """Returns whether a launcher started this process."""
    return get_launcher() is not None


def has_agent() -> bool:
    """Returns whether a torchelastic agent (torchrun, accelerate launch) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_follower() -> bool:
    """Returns whether the rank of this process is not 0."""
    launcher = get_launcher()
    return launcher is not None and os.environ.get(launcher.rank, "0") != "0"


def should_print() -> bool:
    """Returns whether this process prints errors, as local rank 0, before processes connect."""
    launcher = get_launcher()
    return launcher is None or os.environ.get(launcher.local_rank, "0") == "0"


def has_peers() -> bool:
    """Returns whether the run has other processes."""
    launcher = get_launcher()
    return launcher is not None and os.environ.get(launcher.size, "1") != "1"


def get_world(environment: Mapping[str, str] = os.environ) -> World:
    """Returns the rank, world size and rendezvous address of this process.

    Raises ConfigError if variables are inconsistent, or override the configuration (accelerate).
    """
    _check_accelerate(environment)
    launcher = get_launcher(environment)
    if launcher is None:
        return World()
    size = _number(environment, launcher.size, launcher, minimum=1)
    rank = _number(environment, launcher.rank, launcher)
    if rank >= size:
        raise ConfigError(
            f"{launcher.rank}={rank} and {launcher.size}={size}: ranks go from 0 to {size - 1}. "
            f"Start all processes by the same {launcher.name}, or unset both."
        )
    local = _number(environment, launcher.local_rank, launcher) if launcher.local_rank else 0
    node = _number(environment, launcher.node, launcher) if launcher.node in environment else 0
    local_size = _local_size(environment, launcher, node, 1 if launcher is _POD else size)
    if local >= local_size:
        raise ConfigError(
            f"{launcher.local_rank}={local}, and {local_size} processes of {launcher.name} are on "
            "this machine. Start all of them by the same launcher."
        )
    address, port = _rendezvous(environment, launcher, size, local_size)
    return World(launcher.name, size, rank, local, local_size, node, address, port)


def _number(
    environment: Mapping[str, str], name: str, launcher: Launcher, *, minimum: int = 0
) -> int:
    text = environment.get(name)
    if text is not None and text.strip().isdecimal() and int(text) >= minimum:
        return int(text)
    state = "is missing" if text is None else f"is {text!r}, expected {minimum} or more"
    raise ConfigError(
        f"{name} {state}, and other variables of {launcher.name}. Start ftlevel with it again, or "
        f"unset {launcher.rank} and {launcher.size} to run one process."
    )


def _local_size(environment: Mapping[str, str], launcher: Launcher, node: int, default: int) -> int:
    if launcher.local_size in environment:
        return _number(environment, launcher.local_size, launcher, minimum=1)
    if launcher.name != "srun":
        return default
    each = _tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return each[node] if node < len(each) else default


def _tasks_per_node(text: str) -> list[int]:
    """Returns SLURM's tasks per machine: `2(x3),1` is [2, 2, 2, 1]."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in groups for _ in range(int(times or 1))]


def _rendezvous(
    environment: Mapping[str, str], launcher: Launcher, size: int, local_size: int
) -> tuple[str, int]:
    if size == 1:
        return "", 0
    address, port = environment.get("MASTER_ADDR", ""), _PORT
    if launcher.name == "srun":
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        address = address or first_node(nodes)
        # Different ports for jobs that share a machine.
        port += int(environment.get("SLURM_JOB_ID", "0")) % _PORTS
    elif launcher.name.startswith("mpirun") and local_size == size:
        address = address or _LOOPBACK
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", launcher, minimum=1)
    if not address:
        raise ConfigError(
            f"{launcher.size}={size}, and MASTER_ADDR is missing: the processes cannot connect. "
            f"Set MASTER_ADDR to the first machine's name and MASTER_PORT to a free port there, "
            f"equal for all."
        )
    return address, port


def first_node(nodes: str) -> str:
    """Returns the first host of a SLURM node list: `node[07-12,15],big` is node07."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes.strip())
    return "".join(part or "" for part in match.groups()) if match else ""


def _check_accelerate(environment: Mapping[str, str]) -> None:
    problems = []
    for name, (flag, ours) in _ACCELERATE_VARIABLES.items():
        values = environment.get(name, "")
        if values.lower() not in _DISABLED_VALUES:
            instead = f"Use ftlevel's {ours}." if ours else "Drop it."
            problems.append(
                f"accelerate launch {flag} ({name}={values}): it would change a run "
                f"that its config.yaml does not describe. {instead}"
            )
    if problems:
        raise ConfigError(problems)
