"""Shares of numbered parts: each part belongs to one share, however shares are cut again."""

import pytest

from dstrain.data.parts import Share


@pytest.mark.parametrize("parts", [0, 1, 5, 17])
@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_the_parts_of_a_share_are_those_of_its_ranks(parts: int, count: int, ranks: int) -> None:
    seen = []
    for index in range(count):
        share = Share(index, count)
        pieces = [share.part(rank, ranks) for rank in range(ranks)]
        assert sorted(number for piece in pieces for number in piece.of(parts)) == list(share.of(parts))
        seen += [number for piece in pieces for number in piece.of(parts)]
    assert sorted(seen) == list(range(parts))
