"""The collectives of `World`, alone and on three ranks, and the threads that each rank takes."""

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks


@pytest.mark.parametrize("world_size", [1, 3])
def test_collectives(world_size: int, tmp_path: Path) -> None:
    everyone = list(range(world_size))
    for rank, found in enumerate(run_ranks("collectives", world_size, tmp_path)):
        assert found["place"] == [rank, world_size]
        assert found["sums"] == [float(sum(everyone)), world_size * (2.0**40 + 0.5)]
        assert found["broadcast"] == {"from": 0}
        assert found["broadcast_last"] == {"from": world_size - 1}
        assert found["gathered"] == [{"rank": other} for other in everyone]
        assert found["all"] == [True, False, world_size == 1]
