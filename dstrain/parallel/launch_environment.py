"""The rank of this process, as its launcher set it in the environment, and the end of the process. Imports no torch.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE and MASTER_*. Under `srun` the same names are derived from SLURM_*. Without a
launcher there is one process, which needs no port. MASTER_PORT is derived here only; slurm/common.sh agrees with it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from dstrain.errors import TrainingError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables that identify a process among those of a run."""


def rank_from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of RANK_VARIABLES, and MASTER_* under srun, which sets none. Raises TrainingError if they contradict."""
    if "RANK" in environment:
        variables = _from_launcher(environment)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        variables = _from_slurm(environment)
    else:
        variables = dict(zip(RANK_VARIABLES, ("0", "1", "0", "1"), strict=True))
    for name in RANK_VARIABLES:
        if not variables[name].isdecimal():
            raise TrainingError(
                f"{name}={variables[name]!r} in the environment is not a number; start with deepspeed, torchrun or srun"
            )
    if int(variables["RANK"]) >= int(variables["WORLD_SIZE"]):
        rank, size = variables["RANK"], variables["WORLD_SIZE"]
        raise TrainingError(f"RANK={rank} does not fit WORLD_SIZE={size}; start with deepspeed, torchrun or srun")
    return variables


def num_ranks(environment: Mapping[str, str]) -> int:
    """The number of processes that a launcher started; 1 without one. Raises TrainingError as `rank_from_environment` does."""
    return int(rank_from_environment(environment)["WORLD_SIZE"])


def rank_for_messages(environment: Mapping[str, str]) -> int | None:
    """The rank before the ranks have joined, None for a single process or an environment that makes no sense; never raises."""
    rank = environment.get("RANK", environment.get("SLURM_PROCID", ""))
    size = environment.get("WORLD_SIZE", environment.get("SLURM_STEP_NUM_TASKS", ""))
    return int(rank) if rank.isdecimal() and size.isdecimal() and int(size) > 1 else None


def is_first_of_machine(environment: Mapping[str, str]) -> bool:
    """Whether this is the first rank of its machine, or no rank at all; never raises."""
    rank = environment.get("RANK", "0")
    return environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", rank)) == "0"


def master_port(job_id: int, step_id: int = 0) -> int:
    """The port at which the ranks of a Slurm job step meet, 20000 to 31999: below the range of which Linux gives out ports.

    Jobs with near ids, and the steps of one job, get different ports.
    """
    return 20000 + (8 * job_id + step_id) % 12000


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` -> [2, 2, 2, 1]."""
    counts = []
    for item in text.split(","):
        count, _, repeat = item.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or "1")
    return counts


def first_host(node_list: str) -> str:
    """The first host of Slurm's `gpu[03-05,9],login1` -> gpu03."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise TrainingError(f"SLURM_STEP_NODELIST={node_list!r} names no host")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def leave(code: int) -> NoReturn:
    """End the process at once, after flushing every buffer.

    DeepSpeed keeps process groups alive after `mesh.finalize`; their threads may run into the interpreter's shutdown, which then
    aborts a process that has succeeded. For the very end of programs that have trained.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _from_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun or the deepspeed launcher set."""
    rank, world_size = environment["RANK"], environment.get("WORLD_SIZE")
    if world_size is None:
        raise TrainingError(f"RANK={rank} is set but WORLD_SIZE is not; unset RANK, or start with deepspeed, torchrun or srun")
    local_world_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world_size))
    return dict(zip(RANK_VARIABLES, (rank, world_size, environment.get("LOCAL_RANK", rank), local_world_size), strict=True))


def _from_slurm(step: Mapping[str, str]) -> dict[str, str]:
    """The variables of a step that srun started with one task per rank."""
    local_world_size = tasks_per_node(step["SLURM_STEP_TASKS_PER_NODE"])[int(step["SLURM_NODEID"])]
    values = (step["SLURM_PROCID"], step["SLURM_STEP_NUM_TASKS"], step["SLURM_LOCALID"], str(local_world_size))
    return {
        **dict(zip(RANK_VARIABLES, values, strict=True)),
        "MASTER_ADDR": step.get("MASTER_ADDR", first_host(step["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": step.get("MASTER_PORT", str(master_port(int(step["SLURM_JOB_ID"]), int(step["SLURM_STEP_ID"])))),
    }


def num_cores() -> int:
    """Cores that this process may use; macOS does not report them: there all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
