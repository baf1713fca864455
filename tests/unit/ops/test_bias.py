"""Which keys are hidden."""

import torch

from dstrain.ops.bias import causal_bias, padding_bias, segment_bias

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


def test_segments() -> None:
    bias = segment_bias(torch.tensor([[1, 2, 0]]), torch.tensor([[1, 1, 2, 0]]), torch.float32)
    assert bias.shape == (1, 1, 3, 4)
    assert seen(bias[0, 0]) == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_hidden_keys_get_exactly_no_weight_in_every_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        bias = padding_bias(torch.tensor([1]), 2, dtype)
        scores = torch.tensor([[[[-9.0, 9.0]]]], dtype=dtype) + bias
        assert scores.softmax(-1).flatten().tolist() == [1.0, 0.0]
