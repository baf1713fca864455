"""Which process this is among how many, and the few collectives that are not DeepSpeed's.

A process finds its place in the environment of its launcher: `deepspeed` and `torchrun` set RANK, WORLD_SIZE and
MASTER_*; under `srun` the same names are filled in from SLURM_*; without any of them the process is alone and needs no port.
With one process no collective communicates. Groups speak gloo on the CPU and NCCL on GPUs.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dstrain.errors import TrainingError

T = TypeVar("T")
DeviceChoice = Literal["auto", "cpu", "cuda"]

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Environment variables that say which process this is."""

TIMEOUT = timedelta(minutes=30)
"""How long a collective may wait. Long, because other ranks wait while one of them writes a checkpoint."""

PATIENCE = timedelta(days=365)
"""How long a rank that is done with its share waits for those that are not."""


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `world_size`, `local_rank` of `local_world_size` on its node, and its device."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.all_reduce_sums([0.0])

    def all_reduce_sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks in float64; the same list on every rank."""
        if self.world_size == 1:
            return [float(value) for value in values]
        sums: list[float] = self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()
        return sums

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor summed over the ranks, in place, without waiting for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_true(self, value: bool) -> bool:
        """Whether it holds on every rank."""
        return self.all_reduce_sums([float(not value)]) == [0.0]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Rank `source`'s value, on every rank. Pickled: between ranks of one run only."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, device=self.device)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value in the order of ranks, on every rank. Pickled: between ranks of one run only."""
        if self.world_size == 1:
            return [value]
        gathered = [value] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of ranks, on every rank. (n, ...) -> (N, ...); each rank has its own n."""
        if self.world_size == 1:
            return rows
        mine = torch.zeros(self.world_size, dtype=torch.int64, device=rows.device)
        mine[self.rank] = len(rows)
        counts = self.all_reduce(mine).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([share[:count] for share, count in zip(gathered, counts, strict=True)])


def initialize(device: DeviceChoice = "auto", *, backend: Literal["gloo", "nccl"] | None = None) -> World:
    """Find this process's place, join the process group and choose device and thread count. Call once per process.

    backend: None for the one that suits the device. RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* are in the environment afterwards,
    where DeepSpeed looks for them.
    Raises TrainingError where the environment is contradictory, a device is missing or the port is taken.
    """
    place = rank_from_environment(os.environ)
    rank, world_size, local_rank, local_world_size = (_number(place, name) for name in RANK_VARIABLES)
    if rank >= world_size:
        raise TrainingError(f"RANK={rank} does not fit WORLD_SIZE={world_size}; start with deepspeed, torchrun or srun")
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        local_rank = chosen.index
    os.environ.update({**place, "LOCAL_RANK": str(local_rank)})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // local_world_size))
    world = World(rank, local_rank, world_size, local_world_size, chosen)
    if not dist.is_initialized():
        _join(world, backend or ("nccl" if world.device.type == "cuda" else "gloo"))
    return world


def num_ranks(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started; 1 without one. Raises TrainingError where the environment is contradictory."""
    return _number(rank_from_environment(environment), "WORLD_SIZE")


def wait_for_all() -> None:
    """Wait until every rank has come here, for as long as it takes; the group must speak gloo.

    Raises TrainingError, on every rank, where one has ended before.
    """
    try:
        dist.monitored_barrier(timeout=PATIENCE)
    except RuntimeError as error:
        raise TrainingError(
            "another rank has ended before its share was done, see its message; what is finished stays: run the same command "
            "again to go on"
        ) from error


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process at once, with everything buffered written.

    DeepSpeed keeps process groups alive after `finalize`; their threads may run into the interpreter's shutdown, which then
    aborts a process that has succeeded. For the very end of programs that have trained.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(world: World, backend: Literal["gloo", "nccl"]) -> None:
    if world.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)  # type: ignore[attr-defined]
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise TrainingError(f"WORLD_SIZE={world.world_size} but {name} is not set: start with deepspeed, torchrun or srun")
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.world_size, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = "the port is in use; choose a free MASTER_PORT" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise TrainingError(f"rank {world.rank} cannot meet the other ranks at {address}: {reason}") from error


def rank_from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of RANK_VARIABLES, and MASTER_* where srun leaves them to us. Raises TrainingError where they contradict."""
    if "RANK" in environment:
        return _from_launcher(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(environment)
    return dict(zip(RANK_VARIABLES, ("0", "1", "0", "1"), strict=True))


def _from_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun or the deepspeed launcher has set."""
    rank, world_size = environment["RANK"], environment.get("WORLD_SIZE")
    if world_size is None:
        raise TrainingError(f"RANK={rank} is set but WORLD_SIZE is not; unset RANK, or start with deepspeed, torchrun or srun")
    local_world_size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", world_size))
    return dict(zip(RANK_VARIABLES, (rank, world_size, environment.get("LOCAL_RANK", rank), local_world_size), strict=True))


def _from_slurm(step: Mapping[str, str]) -> dict[str, str]:
    """What srun has set for one task per rank."""
    here = tasks_per_node(step["SLURM_STEP_TASKS_PER_NODE"])[int(step["SLURM_NODEID"])]
    port = 20000 + (8 * int(step["SLURM_JOB_ID"]) + int(step["SLURM_STEP_ID"])) % 20000
    values = (step["SLURM_PROCID"], step["SLURM_STEP_NUM_TASKS"], step["SLURM_LOCALID"], str(here))
    return {
        **dict(zip(RANK_VARIABLES, values, strict=True)),
        "MASTER_ADDR": step.get("MASTER_ADDR", first_host(step["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": step.get("MASTER_PORT", str(port)),
    }


def _number(place: Mapping[str, str], name: str) -> int:
    if not place[name].isdecimal():
        raise TrainingError(f"{name}={place[name]!r} in the environment is not a number; start with deepspeed, torchrun or srun")
    return int(place[name])


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` -> [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or "1")
    return counts


def first_host(node_list: str) -> str:
    """The first host of Slurm's `gpu[03-05,9],login1` -> gpu03."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,\[]*))?", node_list)
    if match is None:
        raise TrainingError(f"SLURM_STEP_NODELIST={node_list!r} names no host")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _cores() -> int:
    """Cores that this process may use; macOS cannot say, so there it is all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(choice: DeviceChoice, local_rank: int) -> torch.device:
    asked_for_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if choice == "cpu" or (choice == "auto" and asked_for_cpu):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TrainingError("device cuda was asked for, but torch sees no GPU; use --device cpu, or check the driver")
    count = torch.cuda.device_count()
    own = "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")  # the launcher shows this rank one GPU of its own
    if local_rank >= count and not own:
        raise TrainingError(f"LOCAL_RANK={local_rank} but this node has {count} GPUs: start at most {count} ranks a node")
    index = local_rank if local_rank < count else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
