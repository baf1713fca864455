"""What ranks do with groups: every collective of every group of a mesh, their gradients, and DeepSpeed with the mesh's mpu."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dstrain.engine.launch import load_deepspeed
from dstrain.parallel.collectives import copy_to, reduce_from
from dstrain.parallel.group import Group
from dstrain.parallel.mesh import Mesh, build_mesh
from dstrain.parallel.sequence import heads_to_tokens, tokens_to_heads

Report = dict[str, Any]


def collectives(mesh: Mesh) -> Report:
    """What the collectives of the world return, and those of a world that leaves numbers and objects to a group over gloo."""
    with mock.patch.object(torch.distributed, "get_backend", return_value="nccl"):
        with_host_group = build_mesh("cpu").world
    assert (with_host_group.host_group is None) == (mesh.world.size == 1)
    return {name: _collectives(world, mesh.world.rank) for name, world in {"gloo": mesh.world, "nccl": with_host_group}.items()}


def _collectives(group: Group, world_rank: int) -> Report:
    group.barrier()
    signed = torch.tensor([1.0, -1.0]) * world_rank
    rows = torch.full((world_rank % 3, 1), float(world_rank))
    return {
        "place": [group.rank, group.size],
        "sums": group.all_reduce_sums([world_rank, 2.0**40 + 0.5]),
        "max": group.max(signed).tolist(),
        "broadcast": group.broadcast_object({"from": world_rank}),
        "broadcast_last": group.broadcast_object({"from": world_rank}, source=group.size - 1),
        "gathered": group.gather_objects({"rank": world_rank}),
        "rows": group.gather_rows(rows).tolist(),
        "all": [group.all_true(value) for value in (True, False, group.rank == 0)],
    }


def meshes(mesh: Mesh, *, shapes: list[list[int]]) -> list[Report]:
    """A mesh of each (tensor, sequence) on the same ranks; DeepSpeed knows how many they are, and asks no program."""
    deepspeed = load_deepspeed(mesh)
    assert deepspeed.accelerator.get_accelerator().device_count() == mesh.world.size
    return [_mesh(build_mesh("cpu", tensor=tensor, sequence=sequence)) for tensor, sequence in shapes]


def _mesh(mesh: Mesh) -> Report:
    names = ("world", "data", "sequence", "tensor", "replicas")
    return {
        "groups": {name: _collectives(getattr(mesh, name), mesh.world.rank) for name in names},
        "gradients": _gradients(mesh.tensor) if mesh.tensor.size > 1 else {},
        "exchanged": _exchanged(mesh.sequence) if mesh.sequence.size > 1 else {},
        "updated": _updated(mesh),
    }


def _gradients(group: Group) -> Report:
    """A loss of partial sums over the group, its gradients, and those under torch.compile without a graph break."""

    def loss_of(x: Tensor, weight: Tensor) -> Tensor:
        return reduce_from(copy_to(x, group) * weight, group).tanh().square().sum()

    report: Report = {}
    for name, function in (("eager", loss_of), ("compiled", torch.compile(loss_of, backend="aot_eager", fullgraph=True))):
        x = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
        weights = torch.linspace(-0.7, 0.9, 6 * group.size, dtype=torch.float64).view(group.size, 6)
        weight = weights[group.rank].clone().requires_grad_()
        loss = function(x, weight)
        grads = torch.autograd.grad(loss, [x, weight], create_graph=name == "eager")
        report[name] = {"loss": loss.item(), "x": grads[0].tolist(), "weight": grads[1].tolist()}
        if name == "eager":
            report[name]["second"] = torch.autograd.grad(grads[0].square().sum(), [x])[0].tolist()
    return report


def _exchanged(group: Group) -> Report:
    """Heads for tokens and back, where each rank multiplies its heads by its own number; gradients; eager and compiled."""

    def scaled(x: Tensor) -> Tensor:
        (heads,) = tokens_to_heads((x,), group)
        return heads_to_tokens(heads * (group.rank + 1), group)

    report: Report = {}
    for name, function in (("eager", scaled), ("compiled", torch.compile(scaled, backend="aot_eager", fullgraph=True))):
        x = torch.ones(2 * group.size, 3, 5, requires_grad=True)
        result = function(x)
        (grad,) = torch.autograd.grad(result.square().sum(), x)
        report[name] = {"result": result.flatten(1).mean(1).tolist(), "grad": grad.flatten(1).mean(1).tolist()}
    return report


def _updated(mesh: Mesh) -> list[float]:
    """A replicated weight after one step of SGD."""
    module = nn.Linear(3, 1, bias=False)
    nn.init.ones_(module.weight)
    config = {
        "train_batch_size": mesh.replicas.size,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    deepspeed = load_deepspeed(mesh)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config, mpu=mesh.mpu, dist_init_required=False)[0]
    engine.backward(engine(torch.full((1, 3), 1.0 + mesh.replicas.rank)).sum())
    engine.step()
    return module.weight.flatten().tolist()
