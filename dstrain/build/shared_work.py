"""Sharded work under a launcher: the ranks of deepspeed, torchrun or srun divide the shards of this job.

On a node with GPUs every rank has one of its own. Ranks do not communicate while they work; at the end they wait for one another,
and the first one finishes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from dstrain.errors import DataError
from dstrain.parallel.launch_environment import num_ranks
from dstrain.parallel.mesh import build_mesh, finalize
from dstrain.storage.sharded_job import Worker

ALL_WORK = Worker(0, 1)


@dataclass(frozen=True)
class Task:
    """The work of this process, and its device. is_first: only the first rank prints progress."""

    worker: Worker
    device: str
    is_first: bool = True


def do_work(worker: Worker, device: str, work: Callable[[Task], str], report: Callable[[str], object]) -> bool:
    """Let `work` do this process's part of what `worker` does, and `report` the line that it returns.

    Returns whether this process is the one to finish: the first rank, if `worker` leaves no shards to others. Raises
    TrainingError if another rank has failed.
    """
    if num_ranks(os.environ) == 1:
        report(work(Task(worker, device)))
        return worker.count == 1
    match device:
        case "auto" | "cpu" | "cuda":
            world = build_mesh(device, backend="gloo").world
        case _:
            raise DataError(f"--device {device} is one device, but every rank needs its own; use --device cuda")
    task = Task(worker.divide(world.rank, world.size), str(world.device), is_first=world.rank == 0)
    report(f"rank {world.rank}: {work(task)}")
    world.wait_for_work()
    finalize()
    return worker.count == 1 and task.is_first
