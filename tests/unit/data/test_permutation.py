from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.data.batching.permutation import Permutation


@pytest.mark.parametrize("size", [*range(1, 130), 999, 1000, 1001, 65535, 65536, 65537, 1_000_003])
def test_every_element_has_one_position(size: int) -> None:
    places = Permutation(size, seed=7).elements(0, size)
    assert np.array_equal(np.sort(places), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_any_part_is_had_without_the_rest(size: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = Permutation(size, seed).elements(0, size)
    assert sorted(whole) == list(range(size))
    assert np.array_equal(Permutation(size, seed).elements(start, stop), whole[start:stop])


def test_the_order_is_fixed_for_ever() -> None:
    """Another order under the same seed would change what a resumed run reads next."""
    assert Permutation(10, seed=1).elements(0, 10).tolist() == [1, 8, 5, 3, 4, 9, 2, 7, 6, 0]
    assert Permutation(100_000_000, seed=1).elements(0, 4).tolist() == [70554849, 50796405, 69879395, 60634925]


def by_definition(size: int, seed: int) -> list[int]:
    """The network once more, one cell at a time."""
    rows = 1
    while rows * rows < size:
        rows += 1
    columns = (size + rows - 1) // rows
    bits = np.random.PCG64(seed)
    tables = []
    for _ in range(4):
        tables.append([int(x) % rows for x in bits.random_raw(columns)])
        tables.append([int(x) % columns for x in bits.random_raw(rows)])

    def send(cell: int) -> int:
        row, column = divmod(cell, columns)
        for number, table in enumerate(tables):
            if number % 2 == 0:
                row = (row + table[column]) % rows
            else:
                column = (column + table[row]) % columns
        return row * columns + column

    order = []
    for place in range(size):
        cell = send(place)
        while cell >= size:
            cell = send(cell)
        order.append(cell)
    return order


@pytest.mark.parametrize("size", [1, 2, 3, 5, 12, 17, 123, 1000])
def test_equals_the_definition_computed_cell_by_cell(size: int) -> None:
    assert Permutation(size, seed=size).elements(0, size).tolist() == by_definition(size, seed=size)


def test_every_element_is_equally_likely_at_every_position() -> None:
    """Chi-square over 53 x 53 cells and 5,000 seeds: mean 52 * 52, standard deviation sqrt(2 * 52 * 52) = 74."""
    size, draws = 53, 5_000
    counts = np.zeros((size, size))
    for seed in range(draws):
        counts[np.arange(size), Permutation(size, seed).elements(0, size)] += 1
    expected = draws / size
    assert abs(((counts - expected) ** 2 / expected).sum() - 52 * 52) < 5 * 74


def test_neighbors_are_independent() -> None:
    """In a random order, places i and i+1 hold successive numbers with probability 1/n and correlate with nothing."""
    size = 200_000
    order = Permutation(size, seed=3).elements(0, size)
    assert np.count_nonzero(np.diff(order) == 1) < 12  # Poisson with mean 1
    for lag in (1, 2, 447, 448, 449):  # 448 columns: neighbors in the grid too
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 5 / np.sqrt(size)


def test_few_elements_come_in_every_order() -> None:
    seen = Counter(tuple(Permutation(4, seed).elements(0, 4).tolist()) for seed in range(2000))
    assert set(seen) == set(permutations(range(4)))


def test_seeds_differ() -> None:
    orders = {tuple(Permutation(50, seed).elements(0, 50).tolist()) for seed in range(200)}
    assert len(orders) == 200
