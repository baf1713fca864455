"""Which keys are hidden."""

import pytest
import torch

from dstrain.ops.bias import alibi_bias, alibi_slopes, causal_bias, padding_bias

CPU = torch.device("cpu")


def seen(bias: torch.Tensor) -> list:
    """1 where the bias is zero, 0 where it hides."""
    hidden = bias == torch.finfo(bias.dtype).min
    assert torch.equal(hidden, bias != 0), "values between seen and hidden"
    return (~hidden).int().tolist()


def test_padding() -> None:
    bias = padding_bias(torch.tensor([3, 1, 0]), 3, torch.float32)
    assert bias.shape == (3, 1, 1, 3)
    assert seen(bias[:, 0, 0]) == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]


def test_no_padding_needs_no_bias() -> None:
    assert padding_bias(torch.tensor([4, 4]), 4, torch.float32) is None


def test_causal_levels_the_last_query_with_the_last_key() -> None:
    assert seen(causal_bias(3, 3, torch.float32, CPU)) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert seen(causal_bias(2, 4, torch.float32, CPU)) == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_hidden_keys_get_exactly_no_weight_in_every_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        bias = padding_bias(torch.tensor([1]), 2, dtype)
        scores = torch.tensor([[[[-9.0, 9.0]]]], dtype=dtype) + bias
        assert scores.softmax(-1).flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2.0**-h for h in range(1, 9)]),
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (1, [2.0**-8]),
        (3, [2.0**-4, 2.0**-8, 2.0**-2]),
    ],
)
def test_alibi_slopes(heads: int, slopes: list[float]) -> None:
    assert alibi_slopes(heads) == slopes


@pytest.mark.parametrize("lead", [0.0, 0.5])
def test_scores_fall_with_distance(lead: float) -> None:
    slopes, query, keys = torch.tensor([0.5, 0.25]), torch.tensor([2, 3]), torch.tensor([0, 1, 2, 3])
    bias = alibi_bias(slopes, query, keys, lead=lead)
    assert bias.shape == (2, 2, 4)
    for head, slope in enumerate(slopes.tolist()):
        for i, place in enumerate(query.tolist()):
            for j in range(4):
                assert float(bias[head, i, j]) == -slope * (abs(place - j) - (lead if j > place else 0))
    rows = alibi_bias(slopes, query[None].expand(3, -1), keys[None].expand(3, -1), lead=lead)
    assert rows.shape == (3, 2, 2, 4)
    assert torch.equal(rows[1], bias)
