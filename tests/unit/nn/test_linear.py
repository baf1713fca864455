"""Fused and separate projections are the same maps."""

import torch
from torch.nn import functional as F

from dstrain.nn.linear import FusedLinear, Linear, SeparateLinear

BLOCKS = {"q_proj": 6, "k_proj": 2, "v_proj": 3}


def test_fused_equals_separate() -> None:
    torch.manual_seed(1)
    fused, separate = FusedLinear(5, BLOCKS), SeparateLinear(5, BLOCKS)
    torch.nn.init.normal_(fused.weight)
    torch.nn.init.normal_(fused.bias)
    weights, biases = fused.weight.split(fused.sizes), fused.bias.split(fused.sizes)
    with torch.no_grad():
        for name, weight, bias in zip(BLOCKS, weights, biases, strict=True):
            linear = separate.get_submodule(name)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    x = torch.randn(2, 7, 5)
    for a, b, size in zip(fused(x), separate(x), BLOCKS.values(), strict=True):
        assert a.shape == (2, 7, size)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_blocks_of_a_fused_projection_are_views_of_one_product() -> None:
    fused = FusedLinear(5, BLOCKS)
    parts = fused(torch.randn(2, 7, 5))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_linear_is_torchs_without_initial_values() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    linear = Linear(4, 3)
    assert torch.equal(torch.get_rng_state(), before), "no random number is drawn"
    torch.nn.init.ones_(linear.weight)
    torch.nn.init.ones_(linear.bias)
    x = torch.randn(2, 4)
    torch.testing.assert_close(linear(x), F.linear(x, torch.ones(3, 4), torch.ones(3)))
