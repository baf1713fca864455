"""The block-wise pick equals a plain sort; the log-probabilities equal the out-of-place kernel."""

import math

import pytest
import torch

from dstrain.generation.candidates import best_continuations, to_log_probs, top_values


@pytest.mark.parametrize("width", [1, 5, 63, 64, 129, 1280, 1281, 1343, 7792])
@pytest.mark.parametrize("k", [1, 2, 10])
def test_top_values_equal_topk(width: int, k: int) -> None:
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(width + k))
    values, columns = top_values(x, k)
    expected, _ = x.topk(min(k, width), dim=1)
    assert torch.equal(values, expected)
    assert torch.equal(x.gather(1, columns), values)
    assert all(len(set(row)) == len(row) for row in columns.tolist())


@pytest.mark.parametrize("place", [0, 63, 64, 1279, 1280, 1299])
def test_the_greatest_value_is_found_wherever_it_stands(place: int) -> None:
    x = torch.zeros(2, 1300)
    x[1, place] = 1.0
    values, columns = top_values(x, 3)
    assert (values[1, 0].item(), columns[1, 0].item()) == (1.0, place)
    assert values[:, 1:].eq(0).all()


def test_rows_of_minus_infinity_but_one() -> None:
    x = torch.full((2, 1300), -torch.inf)
    x[:, 1299] = -3.0
    values, columns = top_values(x, 4)
    assert values.tolist() == [[-3.0, *[-math.inf] * 3]] * 2
    assert columns[:, 0].tolist() == [1299, 1299]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 5), (5, 123), (40, 7792)])
def test_log_probs_in_place_equal_those_out_of_place(shape: tuple[int, int], temperature: float) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 5
    expected = (logits.clone() / temperature).log_softmax(1)
    found = to_log_probs(logits, temperature)
    assert torch.equal(found, expected)
    assert found.data_ptr() == logits.data_ptr()


def test_log_probs_of_half_precision_are_float32_and_leave_the_logits_alone() -> None:
    logits = torch.randn(3, 70).bfloat16()
    kept = logits.clone()
    found = to_log_probs(logits, 1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, kept.float().log_softmax(1))
    assert torch.equal(logits, kept)


def test_best_continuations_of_all_hypotheses_together() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -8.0, -4.0]])
    totals, tokens, parents = best_continuations(log_probs, torch.tensor([[-1.0, -2.0]]), 3)
    assert totals.tolist() == [[-2.0, -2.5, -3.0]]
    assert tokens.tolist() == [[0, 0, 1]]
    assert parents.tolist() == [[0, 1, 0]]


def test_a_hypothesis_of_nan_is_dead_and_a_small_vocabulary_leaves_places_empty() -> None:
    log_probs = torch.tensor([[math.nan, math.nan], [-0.5, -1.0]])
    totals, tokens, parents = best_continuations(log_probs, torch.tensor([[0.0, 0.0]]), 5)
    assert totals.tolist() == [[-0.5, -1.0, -math.inf, -math.inf, -math.inf]]
    assert tokens[0, :2].tolist() == [0, 1]
    assert parents[0, :2].tolist() == [1, 1]
    assert int(parents.max()) <= 1
