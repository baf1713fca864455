"""Sharded work under a launcher: the ranks of deepspeed, torchrun or srun divide the shards that --shard chooses.

On a node with GPUs every rank has one of its own. Ranks do not talk while they work; at the end they wait for one another, and
the first one finishes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from dstrain.errors import DataError
from dstrain.storage.sharded_job import Worker


@dataclass(frozen=True)
class Task:
    """What this process has to do, and on which device. is_first: whether it alone shows progress."""

    worker: Worker
    device: str
    is_first: bool = True


def worker(text: str) -> Worker:
    """I/N, for `type=` of an argument."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share I/N of the work with I from 0 to N - 1; of two: 0/2 and 1/2")
    return Worker(int(found[1]), int(found[2]))


def do_work(args: argparse.Namespace, work: Callable[[Task], str]) -> bool:
    """Let `work` do what is this process's, and print what it says of that.

    Returns whether this process is the one to finish: the first rank, where --shard leaves no work to others. Raises
    TrainingError where another rank has failed.
    """
    from dstrain.parallel.launch_environment import num_ranks

    chosen: Worker = args.shard
    if num_ranks(os.environ) == 1:
        print(work(Task(chosen, args.device)))
        return chosen.count == 1
    if args.device not in ("auto", "cpu", "cuda"):
        raise DataError(f"--device {args.device} is one device, but every rank needs its own; use --device cuda")
    from dstrain.parallel.mesh import build_mesh, finalize

    world = build_mesh(args.device, backend="gloo").world
    task = Task(chosen.divide(world.rank, world.size), str(world.device), is_first=world.rank == 0)
    print(f"rank {world.rank}: {work(task)}", flush=True)
    world.wait_for_work()
    finalize()
    return chosen.count == 1 and task.is_first
