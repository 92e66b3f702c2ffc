"""Rank and world size from the environment of every launcher, and inconsistent environments."""

from __future__ import annotations

import pytest

from ftlevel.errors import ConfigError
from ftlevel.world import World, first_node, get_world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29400"}  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "node[07-09,12]",
        "SLURM_JOB_ID": "40123"}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2",
         "MASTER_ADDR": "b"}  # fmt: skip
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO",
              "ACCELERATE_USE_CPU": "true",
              "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}  # fmt: skip
POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "c", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("environment", "world"),
    [
        ({}, World()),
        # A shell of salloc or sbatch is one process, however many tasks the job may have.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, World()),
        (TORCHRUN, World("torchrun", 4, 3, 1, 2, 1, "a", 29400)),
        (ACCELERATE, World("torchrun", 4, 3, 1, 2, 1, "a", 29400)),
        (SRUN, World("srun", 7, 5, 1, 2, 2, "node07", 29500 + 123)),
        ({**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "9"},
         World("srun", 7, 5, 1, 2, 2, "x", 9)),
        ({**SRUN, **TORCHRUN}, World("torchrun", 4, 3, 1, 2, 1, "a", 29400)),
        # mpirun starts its daemons by srun.
        ({**SRUN, **OPEN_MPI}, World("mpirun (Open MPI)", 2, 1, 1, 2, 0, "127.0.0.1", 29500)),
        (MPICH, World("mpirun (MPICH)", 4, 1, 1, 2, 0, "b", 29500)),
        (POD, World("RANK and WORLD_SIZE", 2, 1, 0, 1, 0, "c", 23456)),
    ],
)  # fmt: skip
def test_world_of_each_launcher(environment, world):
    assert get_world(environment) == world


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is missing"),
        ({k: v for k, v in MPICH.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is missing"),
        ({**TORCHRUN, "RANK": "4"}, "RANK=4 and WORLD_SIZE=4: ranks go from 0 to 3"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, and 2 processes of torchrun"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        ({"RANK": "0"}, "WORLD_SIZE is missing"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is ''"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision .* ftlevel's --dtype"),
        ({**TORCHRUN, "ACCELERATE_USE_FSDP": "true"}, "--use_fsdp .* --shard full"),
        ({**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed"),
        ({**TORCHRUN, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "accumulation_steps=|_STEPS"),
    ],
)
def test_inconsistent_environment_raises(environment, message):
    with pytest.raises(ConfigError, match=message):
        get_world(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[07-12,15]", "node07"), ("big", "big"), ("a,b", "a"), ("r[1]n2", "r1n2"),
     ("gpu-a[003,005],c", "gpu-a003"), ("", "")],
)  # fmt: skip
def test_first_node(nodes, first):
    assert first_node(nodes) == first


def test_publish_sets_torchrun_variables():
    environment: dict[str, str] = {}
    get_world(SRUN).publish(environment)
    assert environment == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1",
                           "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node07",
                           "MASTER_PORT": "29623"}  # fmt: skip
