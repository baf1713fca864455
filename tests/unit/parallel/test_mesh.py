"""The arithmetic of the mesh by brute force, the names that DeepSpeed asks for, and groups of one rank."""

import itertools

import pytest
import torch

from dstrain.errors import TrainingError
from dstrain.log import logger
from dstrain.parallel.collectives import all_to_all, copy_to, reduce_from
from dstrain.parallel.group import Group
from dstrain.parallel.mesh import Mesh, build_mesh, group_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("data", "sequence", "tensor"), [(1, 1, 1), (3, 1, 1), (1, 1, 4), (1, 4, 1), (2, 1, 2), (2, 2, 1), (3, 2, 4)]
)
def test_every_group_holds_the_ranks_that_differ_in_its_coordinates_only(data: int, sequence: int, tensor: int) -> None:
    positions = list(itertools.product(range(data), range(sequence), range(tensor)))
    ranks = {(d * sequence + s) * tensor + t: (d, s, t) for d, s, t in positions}
    fixed = {"data": (1, 2), "sequence": (0, 2), "tensor": (0, 1), "replicas": (2,)}
    sizes = {"data": data, "sequence": sequence, "tensor": tensor, "replicas": data * sequence}
    found = group_ranks(data * sequence * tensor, tensor, sequence)
    assert found.keys() == fixed.keys()
    for name, axes in fixed.items():
        expected = {
            tuple(sorted(other for other in ranks if all(ranks[other][axis] == ranks[rank][axis] for axis in axes)))
            for rank in ranks
        }
        assert sorted(map(tuple, found[name])) == sorted(expected)
        assert {len(group) for group in found[name]} == {sizes[name]}


def test_a_replica_is_numbered_by_data_then_sequence() -> None:
    for group in group_ranks(24, tensor=4, sequence=2)["replicas"]:
        assert [rank // 4 for rank in group] == list(range(6))


def test_one_rank_is_a_mesh_on_one_group_and_deepspeed_keeps_its_default() -> None:
    mesh = build_mesh("cpu")
    assert mesh.world is mesh.data is mesh.replicas
    assert [(group.rank, group.size) for group in (mesh.world, mesh.sequence, mesh.tensor)] == [(0, 1)] * 3
    assert (mesh.device, mesh.local_rank, mesh.mpu) == (CPU, 0, None)


def test_the_mpu_has_tensor_ranks_as_model_parallel_and_replicas_as_data_parallel() -> None:
    one, tensor, replicas = Group.single(CPU), Group(1, 2, None, CPU), Group(5, 6, None, CPU)
    mpu = Mesh(one, data=one, sequence=one, tensor=tensor, replicas=replicas, local_rank=0).mpu
    assert mpu is not None
    assert (mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()) == (1, 2)
    assert (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()) == (5, 6)
    assert (mpu.get_model_parallel_group(), mpu.get_data_parallel_group()) == (None, None)


def test_sizes_that_do_not_divide_the_ranks() -> None:
    with pytest.raises(TrainingError, match="tensor = 2 times sequence = 3 does not divide the number of ranks, 1; start"):
        build_mesh("cpu", tensor=2, sequence=3)


@pytest.mark.parametrize(("ranks_of_a_node", "tensor", "warns"), [(4, 3, True), (2, 4, True), (4, 2, False), (6, 3, False)])
def test_tensor_groups_over_nodes_are_warned_about(
    ranks_of_a_node: int, tensor: int, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first of 12 ranks, as a launcher starts it; it gets no further than to the others' address, which is missing."""
    launched = {"RANK": "0", "WORLD_SIZE": "12", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks_of_a_node)}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(logger, "propagate", True)
    with pytest.raises(TrainingError, match="MASTER_ADDR is not set"):
        build_mesh("cpu", tensor=tensor)
    message = f"engine.parallel.tensor = {tensor}: groups of as many ranks reach over nodes of {ranks_of_a_node}, and every layer"
    assert (message in caplog.text) == warns
    assert ("choose a divisor of the ranks of a node" in caplog.text) == warns


def test_tensor_ranks_must_divide_the_ranks_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "6", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "6"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        TrainingError, match="tensor = 4 times sequence = 1 does not divide the number of ranks, 6; start a multiple of 4 ranks"
    ):
        build_mesh("cpu", tensor=4)


def test_one_rank_never_communicates(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a group of one rank communicates")

    for name in (
        "all_reduce",
        "all_gather",
        "all_gather_object",
        "all_to_all_single",
        "broadcast_object_list",
        "monitored_barrier",
    ):
        monkeypatch.setattr(torch.distributed, name, refuse)
    group, rows, value = Group.single(CPU), torch.arange(6.0).view(3, 2), {"a": 1}
    assert group.all_reduce(rows) is group.max(rows) is group.gather_rows(rows) is group.all_to_all(rows) is rows
    assert copy_to(rows, group) is reduce_from(rows, group) is all_to_all(rows, group) is rows
    assert group.all_reduce_sums([1, 2.5]) == [1.0, 2.5]
    assert (group.all_true(True), group.all_true(False)) == (True, False)
    assert group.broadcast_object(value) is group.gather_objects(value)[0] is value
    group.barrier()
    group.wait_for_work()
