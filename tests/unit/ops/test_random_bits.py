"""Counted random bits: as good as a generator's, and the same whichever part of them is asked for."""

import math

import pytest
import torch

from dstrain.ops.random_bits import derived_keys, random_bits

TOKENS = torch.arange(80)[:, None] * (1 << 22) + 2 * torch.arange(25)
"""(80, 25) like the keys of the first tokens of 80 examples: few bits differ."""


def signs(bits: torch.Tensor) -> torch.Tensor:
    """(tokens, features) int16 -> (tokens, 16 * features) of 1 and -1."""
    return ((bits.flatten(0, -2).unsqueeze(-1) >> torch.arange(16, dtype=torch.int16)) & 1).flatten(1) * 2.0 - 1


@pytest.mark.parametrize("seed", [0, 1, -(2**63)])
def test_no_two_bits_agree_more_often_than_by_chance(seed: int) -> None:
    values = signs(random_bits(derived_keys(TOKENS, seed), 0, 64))  # (2000, 1024)
    count = len(values)
    agreement = (values.T @ values) / math.sqrt(count)  # of each pair of bits, in standard deviations
    agreement.fill_diagonal_(0)
    assert agreement.abs().max() < 6.5  # of half a million pairs the largest is expected at 5
    assert agreement.std().item() == pytest.approx(1, abs=0.01)
    assert (values.mean(0) * math.sqrt(count)).abs().max() < 5.5


def test_tokens_examples_seeds_and_features_draw_independently() -> None:
    keys = derived_keys(TOKENS, 5)
    bits = random_bits(keys, 0, 64)
    values = signs(bits).view(80, 25, -1)
    others = {
        "the next position": (values[:, 1:], values[:, :-1]),
        "the next example": (values[1:], values[:-1]),
        "another seed": (values, signs(random_bits(derived_keys(TOKENS, 6), 0, 64)).view(80, 25, -1)),
        "the next seed of the seed": (values, signs(random_bits(derived_keys(keys, 1), 0, 64)).view(80, 25, -1)),
        "the next feature": (values[..., 16:], values[..., :-16]),
    }
    for name, (first, second) in others.items():
        assert abs((first * second).mean().item()) * math.sqrt(first.numel()) < 4.5, name


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (4, 12), (3, 7), (5, 6), (0, 123), (61, 123)])
def test_a_part_of_the_features_has_the_bits_that_it_has_in_all(start: int, stop: int) -> None:
    keys = derived_keys(TOKENS, 9)
    assert torch.equal(random_bits(keys, start, stop), random_bits(keys, 0, 128)[..., start:stop])
    assert torch.equal(random_bits(keys[3:5, 2], start, stop), random_bits(keys, start, stop)[3:5, 2])


def test_values_are_fixed() -> None:
    """A run that is resumed with a later version repeats its masks."""
    keys = derived_keys(torch.tensor([0, 1, (7 << 22) + 6]), 42)
    assert keys.tolist() == KEYS
    assert random_bits(keys, 0, 4).tolist() == BITS


KEYS = [4107627471121872531, 4031979549018272924, 43033039051247111]
BITS = [[214, -25872, 10556, 14429], [28922, -25762, 12470, 6897], [25732, 10083, 2344, -8573]]
