"""A cache whose rows continue one another holds what a plain copy would, and moves little where rows descend from one another."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dstrain.nn.cache import LONG, KeyValueCache
from dstrain.ops.kernels import CACHE_MOVES
from tests.kernels import kernels_here

DEPTH, HEADS, DIM = 2, 3, 4


@pytest.fixture(params=kernels_here("cache_moves"), autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of the moves, each."""
    with CACHE_MOVES.forced(request.param):
        yield


class Beside:
    """The cache and a plain tensor of what it must hold, (depth, 2, N, H, length, K)."""

    def __init__(self, rows: int, *, max_length: int = 40) -> None:
        self.cache = KeyValueCache(
            depth=DEPTH, num_rows=rows, num_heads=HEADS, max_length=max_length, head_dim=DIM, like=torch.empty(0)
        )
        self.expected = torch.empty(DEPTH, 2, rows, HEADS, 0, DIM)
        self.generator = torch.Generator().manual_seed(5)

    def step(self, width: int = 1) -> None:
        """Append, and look at all that is there."""
        new = torch.randn(DEPTH, 2, self.cache.num_rows, HEADS, width, DIM, generator=self.generator)
        self.expected = torch.cat([self.expected, new], dim=4)
        for depth in range(DEPTH):
            seen = torch.stack(self.cache.at(depth).append(new[depth, 0], new[depth, 1]))
            assert torch.equal(seen, self.expected[depth])
        self.cache.advance(width)

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.expected = self.expected[:, :, rows]

    def parents(self, beams: int) -> Tensor:
        """Each row continues one of its sentence's, drawn at random."""
        count = self.cache.num_rows
        return torch.arange(count) // beams * beams + torch.randint(beams, (count,), generator=self.generator)


@pytest.mark.parametrize("max_length", [27, LONG])
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_a_long_search_with_sentences_that_leave(beams: int, max_length: int) -> None:
    pair = Beside(3, max_length=max_length)
    pair.step()
    pair.select(torch.arange(3).repeat_interleave(beams))
    for number in range(24):
        pair.step(2 if number == 9 else 1)
        pair.select(pair.parents(beams))
        if number in {7, 15}:
            pair.select(torch.arange(beams, pair.cache.num_rows))
    pair.step()


@pytest.mark.parametrize("max_length", [9, LONG])
def test_after_a_rewind_all_entries_are_new(max_length: int) -> None:
    pair = Beside(4, max_length=max_length)
    pair.step(3)
    pair.select(torch.tensor([1, 1, 2, 2]))
    pair.cache.length, pair.expected = 0, pair.expected[:, :, :, :, :0]
    pair.step(5)
    pair.select(torch.tensor([0, 0, 2, 3]))
    pair.step()


@pytest.mark.parametrize("max_length", [30, LONG + 1])
def test_what_rows_have_in_common_stays_where_it_is(max_length: int) -> None:
    """Of rows that were one a token ago one token moves, however long they are: numbers put in its place before it stay."""
    pair = Beside(4, max_length=max_length)
    pair.step(20)
    pair.select(torch.zeros(4, dtype=torch.long))
    marks = torch.randn(DEPTH, 2, 4, HEADS, 20, DIM, generator=pair.generator)
    for buffer, of_depth in zip(pair.cache.buffers, marks, strict=True):
        buffer[:, :, :, :20] = of_depth
    pair.expected = marks
    pair.step()
    latest = pair.expected[..., 20:, :]
    for rows in ([1, 0, 2, 3], [0, 0, 0, 1], [0, 1, 2, 3]):
        pair.cache.select(torch.tensor(rows))
        latest = latest[:, :, rows]
        pair.expected = torch.cat([marks, latest], dim=4)
        for depth, buffer in enumerate(pair.cache.buffers):
            assert torch.equal(buffer[:, :, :, :21], pair.expected[depth])
