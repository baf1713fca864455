"""Groups and their collectives on one to four ranks, with and without gradient, and DeepSpeed under an mpu."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.parallel.mesh import group_ranks
from tests.parallel.launch import run_ranks

SHAPES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
"""(tensor, sequence) on four ranks. tensor = 1 comes first, as DeepSpeed keeps a process's last mpu for engines without."""


def check_group(found: dict[str, Any], ranks: list[int], rank: int) -> None:
    """What one group returned on world rank `rank`, where it holds `ranks`."""
    size = len(ranks)
    assert found["place"] == [ranks.index(rank), size]
    assert found["sums"] == [float(sum(ranks)), size * (2.0**40 + 0.5)]
    assert found["max"] == [float(max(ranks)), float(-min(ranks))]
    assert found["broadcast"] == {"from": ranks[0]}
    assert found["broadcast_last"] == {"from": ranks[-1]}
    assert found["gathered"] == [{"rank": other} for other in ranks]
    assert found["rows"] == [[float(other)] for other in ranks for _ in range(other % 3)]
    assert found["all"] == [True, False, size == 1]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_world(world_size: int, tmp_path: Path) -> None:
    for rank, found in enumerate(run_ranks("collectives", world_size, tmp_path)):
        for backend in ("gloo", "nccl"):
            check_group(found[backend], list(range(world_size)), rank)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every rank found, by mesh."""
    return run_ranks("meshes", 4, tmp_path_factory.mktemp("meshes"), shapes=SHAPES)


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=[f"t{tensor}s{sequence}" for tensor, sequence in SHAPES])
def test_every_group_of_a_mesh(four: list[Any], index: int) -> None:
    expected = {**group_ranks(4, *SHAPES[index]), "world": [[0, 1, 2, 3]]}
    for rank, shapes in enumerate(four):
        found = shapes[index]["groups"]
        assert found.keys() == expected.keys()
        for name, lists in expected.items():
            check_group(found[name], next(ranks for ranks in lists if rank in ranks), rank)


@pytest.mark.parametrize("index", [3, 4, 5], ids=["t2", "t2s2", "t4"])
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_gradients_of_collectives(four: list[Any], index: int, compiled: str) -> None:
    """Against autograd in one process: each rank's slice of sum(tanh(sum_r x w_r)^2), of second order too."""
    for rank, shapes in enumerate(four):
        tensor = SHAPES[index][0]
        x = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
        weights = torch.linspace(-0.7, 0.9, 6 * tensor, dtype=torch.float64).view(tensor, 6).requires_grad_()
        loss = (x * weights).sum(0).tanh().square().sum()
        gradients = torch.autograd.grad(loss, [x, weights], create_graph=True)
        (second,) = torch.autograd.grad(gradients[0].square().sum(), [x])
        found = shapes[index]["gradients"][compiled]
        torch.testing.assert_close(torch.tensor(found["loss"], dtype=torch.float64), loss.detach())
        torch.testing.assert_close(torch.tensor(found["x"], dtype=torch.float64), gradients[0].detach())
        torch.testing.assert_close(torch.tensor(found["weight"], dtype=torch.float64), gradients[1][rank % tensor].detach())
        if compiled == "eager":
            torch.testing.assert_close(torch.tensor(found["second"], dtype=torch.float64), second)


@pytest.mark.parametrize("index", [1, 2, 4], ids=["s2", "s4", "t2s2"])
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_sequence_ranks_exchange_heads_for_tokens(four: list[Any], index: int, compiled: str) -> None:
    """Two heads a rank: what rank r does with its heads comes back to the tokens of every rank, and so does the gradient."""
    factors = [rank + 1 for rank in range(SHAPES[index][1]) for _ in range(2)]
    for shapes in four:
        found = shapes[index]["exchanged"][compiled]
        assert found["result"] == pytest.approx(factors)
        assert found["grad"] == pytest.approx([2 * factor**2 for factor in factors])


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=[f"t{tensor}s{sequence}" for tensor, sequence in SHAPES])
def test_deepspeed_averages_over_the_replicas(four: list[Any], index: int) -> None:
    """One SGD step of a weight whose gradient on replica r is r + 1, of a mesh's own mpu: tensor ranks do not count."""
    replicas = 4 // SHAPES[index][0]
    average = sum(range(1, replicas + 1)) / replicas
    for shapes in four:
        assert shapes[index]["updated"] == pytest.approx([1.0 - 0.1 * average] * 3)


@pytest.mark.parametrize("shape", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)], ids=["tensor", "sequence"])
def test_compiled_layers_share_the_gradients_that_plain_ones_share(shape: tuple[int, int], tmp_path: Path) -> None:
    tensor, sequence = shape
    for found in run_ranks("compiled_layers", 2, tmp_path, model="rotary", tensor=tensor, sequence=sequence):
        assert len(found) > 5
        for name, (difference, largest) in found.items():
            assert largest > 0, name
            assert difference <= 1e-5 * largest, name
