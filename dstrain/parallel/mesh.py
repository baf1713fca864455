"""The mesh of ranks, data x sequence x tensor: built first, and the only source of groups for the rest of the package.

rank = (data * sequence_size + sequence) * tensor_size + tensor, so that the ranks of a tensor group are neighbors on one node.

| group | ranks | used for |
|---|---|---|
| world | all | signals, checks, files |
| data | same sequence and tensor rank | the examples that a rank reads |
| sequence | same data and tensor rank | positions of the same examples |
| tensor | same data and sequence rank | slices of the same parameters |
| replicas | same tensor rank (data x sequence) | losses, token counts, gradients, ZeRO |

With tensor = sequence = 1, world, data and replicas are one group on torch's default process group, and no other is made.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dstrain.config_base import DeviceChoice
from dstrain.errors import TrainingError
from dstrain.log import logger
from dstrain.parallel.group import TIMEOUT, Group
from dstrain.parallel.launch_environment import is_first_of_machine, num_cores, rank_from_environment

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits at the start for the other processes; those of a cold node may come minutes later."""
NOTE_AFTER = timedelta(seconds=30)
"""How long it waits before it says so."""

Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class ModelParallelUnit:
    """The groups under the six names by which DeepSpeed asks its `mpu` for them.

    DeepSpeed averages gradients and partitions states over its data-parallel group. Sequence ranks belong to it, as their
    gradients add up like those of data ranks. DeepSpeed never hears of sequence parallelism: its own support scales gradients by
    the sequence size under some ZeRO stages and not under others.
    """

    tensor: Group
    replicas: Group

    def get_model_parallel_rank(self) -> int:
        """This rank in its tensor group."""
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Tensor slices of a parameter."""
        return self.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold slices of the same parameters."""
        return self.tensor.process_group

    def get_data_parallel_rank(self) -> int:
        """This rank among the replicas."""
        return self.replicas.rank

    def get_data_parallel_world_size(self) -> int:
        """Replicas of a slice."""
        return self.replicas.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks whose gradients are averaged."""
        return self.replicas.process_group


@dataclass(frozen=True)
class Mesh:
    """The groups of this process; the table above gives their uses. local_rank: this process on its node."""

    world: Group
    data: Group
    sequence: Group
    tensor: Group
    replicas: Group
    local_rank: int

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.world.device

    @property
    def mpu(self) -> ModelParallelUnit | None:
        """What `deepspeed.initialize` takes as `mpu`.

        None for tensor = 1: DeepSpeed's default, data parallelism over the world, is then the same partition, and with an mpu it
        would need a process group of one rank, over which it reduces the gradient norm of every step.
        """
        return None if self.tensor.size == 1 else ModelParallelUnit(self.tensor, self.replicas)


def build_mesh(device: DeviceChoice = "auto", *, tensor: int = 1, sequence: int = 1, backend: Backend | None = None) -> Mesh:
    """Join the process group, choose device and thread count, and make the groups. Collective; the first object of a run.

    tensor, sequence: ranks that share one copy of the parameters, and one batch. backend: None for the one that suits the device.
    RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* are in the environment afterwards, where DeepSpeed looks for them.
    Raises TrainingError if the environment contradicts itself, a device is missing, the port is taken, or the sizes do not divide
    the number of ranks.
    """
    variables = rank_from_environment(os.environ)
    rank, world_size, local_world_size = (int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world_size % (tensor * sequence) != 0:
        raise TrainingError(
            f"engine.parallel: tensor = {tensor} times sequence = {sequence} does not divide the number of ranks, {world_size}; "
            f"start a multiple of {tensor * sequence} ranks, or lower one of the two"
        )
    if rank == 0 and (warning := crossing_warning(tensor, local_world_size)):
        logger.warning("%s", warning)
    chosen, local_rank = _choose_device(device, int(variables["LOCAL_RANK"]))
    os.environ.update({**variables, "LOCAL_RANK": str(local_rank)})
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // local_world_size))
    if not dist.is_initialized():
        _join(rank, world_size, backend or ("nccl" if chosen.type == "cuda" else "gloo"))
    world = Group(rank, world_size, dist.group.WORLD, chosen, _host_group(list(range(world_size))))
    if tensor * sequence == 1:
        alone = Group.single(chosen)
        return Mesh(world, data=world, sequence=alone, tensor=alone, replicas=world, local_rank=local_rank)
    groups = {name: _join_group(world, ranks) for name, ranks in group_ranks(world_size, tensor, sequence).items()}
    return Mesh(world, **groups, local_rank=local_rank)


def crossing_warning(tensor: int, ranks_of_node: int) -> str | None:
    """What to say of tensor groups that reach over nodes; None if they do not."""
    if ranks_of_node % tensor == 0:
        return None
    return (
        f"engine.parallel.tensor = {tensor}: groups of as many ranks reach over nodes of {ranks_of_node}, and every layer waits "
        "for the network; choose a divisor of the ranks of a node"
    )


def group_ranks(world_size: int, tensor: int, sequence: int) -> dict[str, list[list[int]]]:
    """The world ranks of every data, sequence, tensor and replicas group; each list is in the order of the group's own ranks."""
    ranks = torch.arange(world_size).view(-1, sequence, tensor)  # (data, sequence, tensor)
    lists: dict[str, list[list[int]]] = {
        "data": ranks.permute(1, 2, 0).flatten(0, 1).tolist(),
        "sequence": ranks.permute(0, 2, 1).flatten(0, 1).tolist(),
        "tensor": ranks.flatten(0, 1).tolist(),
        "replicas": ranks.permute(2, 0, 1).flatten(1, 2).tolist(),
    }
    return lists


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join_group(world: Group, lists: list[list[int]]) -> Group:
    """This rank's group among `lists`. Every rank makes all of them, in the same order, as torch requires."""
    own = world
    for ranks in lists:
        if len(ranks) == world.size:
            return world
        # Without a timeout of ours a group has torch's, which is shorter for NCCL.
        process_group, host_group = dist.new_group(ranks, timeout=TIMEOUT), _host_group(ranks)
        if world.rank in ranks:
            own = Group(ranks.index(world.rank), len(ranks), process_group, world.device, host_group)
    return own


def _host_group(ranks: list[int]) -> dist.ProcessGroup | None:
    """These ranks over gloo, if the groups speak something else. Every rank makes it."""
    if len(ranks) == 1 or dist.get_backend() == "gloo":
        return None
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=TIMEOUT, backend="gloo")
    return group


def _join(rank: int, world_size: int, backend: Backend) -> None:
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)  # type: ignore[attr-defined]
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise TrainingError(f"WORLD_SIZE={world_size} but {name} is not set: start with deepspeed, torchrun or srun")
    address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    note = threading.Timer(NOTE_AFTER.total_seconds(), _say_that_it_waits, (rank, world_size, address))
    note.daemon = True
    note.start()
    try:
        # Joining has a shorter limit than a collective: a rank that failed before it came here never comes.
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=JOIN_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = "the port is in use; choose a free MASTER_PORT" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise TrainingError(f"rank {rank} cannot meet the other ranks at {address}: {reason}") from error
    finally:
        note.cancel()


def _say_that_it_waits(rank: int, world_size: int, address: str) -> None:
    """Once a machine: a rank that failed before it joined is known only to its own output."""
    if is_first_of_machine(os.environ):
        logger.warning(
            "rank %d still waits for some of the %d ranks at %s, and will for up to %d minutes; if one has failed, its output "
            "says why: stop the others and start again",
            *(rank, world_size, address, JOIN_TIMEOUT.total_seconds() / 60),
        )


def _choose_device(choice: DeviceChoice, local_rank: int) -> tuple[torch.device, int]:
    """The device, and the local rank: on GPUs the index of the device."""
    prefers_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if choice == "cpu" or (choice == "auto" and prefers_cpu):
        return torch.device("cpu"), local_rank
    if not torch.cuda.is_available():
        raise TrainingError("device cuda was asked for, but torch sees no GPU; use --device cpu, or check the driver")
    count = torch.cuda.device_count()
    one_visible = "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")  # a launcher may show each rank only its own GPU
    if local_rank >= count and not one_visible:
        raise TrainingError(f"LOCAL_RANK={local_rank} but this node has {count} GPUs: start at most {count} ranks a node")
    index = local_rank if local_rank < count else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index), index
