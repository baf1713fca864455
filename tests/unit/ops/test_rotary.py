"""Rotary positions against complex multiplication, a plain loop, and what scalings promise."""

import cmath
import math

import pytest
import torch

from dstrain.ops.rotary import (
    Yarn,
    apply_rotary,
    compute_cos_sin,
    inverse_frequencies,
    ntk_theta,
    stretched_theta,
    yarn_attention_scaling,
    yarn_inv_freq,
)


@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
@pytest.mark.parametrize(("dim", "head_dim"), [(6, 6), (4, 7), (2, 5)])
def test_pairs_rotate_as_complex_numbers(layout: str, dim: int, head_dim: int) -> None:
    x = torch.randn(2, 3, 5, head_dim)
    positions = torch.tensor([0, 1, 7, 100, 2])
    turned = apply_rotary(x, compute_cos_sin(positions, inverse_frequencies(dim, 50.0), 1.0, torch.float32), layout)
    for index, position in enumerate(positions.tolist()):
        for pair in range(dim // 2):
            first, second = (pair, pair + dim // 2) if layout == "half_split" else (2 * pair, 2 * pair + 1)
            angle = cmath.exp(1j * position * 50.0 ** (-2 * pair / dim))
            before = torch.complex(x[:, :, index, first], x[:, :, index, second]) * angle
            after = torch.complex(turned[:, :, index, first], turned[:, :, index, second])
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., dim:], x[..., dim:])


def test_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        rotations = [
            compute_cos_sin(torch.tensor([position]), inverse_frequencies(8, 10000.0), 1.0, torch.float32) for position in (i, j)
        ]
        return float((apply_rotary(query, rotations[0], "half_split") * apply_rotary(key, rotations[1], "half_split")).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(4, 1), abs=1e-3)


def test_ntk_changes_nothing_up_to_the_original_length() -> None:
    bases = ntk_theta(10000.0, 8, 2.0, 16, torch.tensor([3, 16, 17, 64]))
    assert bases[:2].tolist() == [10000.0, 10000.0]
    expected = [10000 * (2 * length / 16 - 1) ** (8 / 6) for length in (17, 64)]
    assert bases[2:].tolist() == pytest.approx(expected, rel=1e-6)
    assert ntk_theta(10000.0, 2, 1.0, 4, torch.tensor([9])).isfinite().all()


def test_a_stretched_base_slows_the_slowest_pair_by_the_factor_and_keeps_the_fastest() -> None:
    plain, stretched = (inverse_frequencies(8, theta) for theta in (10000.0, stretched_theta(10000.0, 8, 4.0)))
    assert (plain / stretched)[[0, -1]].tolist() == pytest.approx([1.0, 4.0])
    assert stretched_theta(10000.0, 2, 4.0) > 1


def test_yarn_pair_by_pair() -> None:
    """The formula written out for each pair; the slowest are divided, the fastest kept."""
    dim, theta, factor, yarn = 64, 10000.0, 8.0, Yarn(original_length=2048, beta_fast=32, beta_slow=1)
    found = yarn_inv_freq(dim, theta, torch.tensor([factor]), yarn).tolist()

    def pair_of(rotations: float) -> float:
        return dim * math.log(2048 / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low, high = math.floor(pair_of(32)), math.ceil(pair_of(1))
    assert 0 < low < high < dim // 2
    for pair, value in enumerate(found):
        plain = theta ** (-2 * pair / dim)
        share = min(max((pair - low) / (high - low), 0), 1)
        assert value == pytest.approx(plain * (1 - share) + plain / factor * share, rel=1e-5)
    assert found[0] == pytest.approx(1.0)
    assert found[-1] == pytest.approx(theta ** (-62 / 64) / factor, rel=1e-5)
    assert float(yarn_attention_scaling(torch.tensor([8.0]), yarn)) == pytest.approx(1.20794, abs=1e-5)


def test_a_factor_of_one_changes_nothing() -> None:
    yarn = Yarn(original_length=16)
    torch.testing.assert_close(yarn_inv_freq(8, 100.0, torch.ones(1), yarn), inverse_frequencies(8, 100.0))
    assert float(yarn_attention_scaling(torch.ones(1), yarn)) == 1.0
