"""The schedule of layer passes and LayerDrop."""

import pytest
import torch
from torch import Tensor, nn

from dstrain.nn.stack import LayerStack


def stack(schedule: list[int], layer_drop: float = 0.0) -> LayerStack[nn.Linear]:
    torch.manual_seed(1)
    layers = [nn.Linear(4, 4) for _ in range(max(schedule) + 1)]
    return LayerStack(layers=layers, schedule=schedule, layer_drop=layer_drop, final_norm=nn.LayerNorm(4))


def through(part: LayerStack[nn.Linear], x: Tensor) -> tuple[Tensor, list[int]]:
    depths = []

    def run(depth: int, layer: nn.Linear, x: Tensor) -> Tensor:
        depths.append(depth)
        return layer(x)

    return part(x, run), depths


def test_layers_run_in_the_order_of_the_schedule_and_then_the_norm() -> None:
    part, x = stack([0, 1, 0, 2]), torch.randn(2, 4)
    result, depths = through(part, x)
    expected = x
    for index in (0, 1, 0, 2):
        expected = part.layers[index](expected)
    torch.testing.assert_close(result, part.final_norm(expected))
    assert depths == [0, 1, 2, 3]
    assert part.passes(lambda layer: layer) == [part.layers[0], part.layers[1], part.layers[0], part.layers[2]]
    assert len(list(part.layers)) == 3, "a layer that runs twice is stored once"


def test_layer_drop_skips_passes_at_the_configured_rate_in_training_only() -> None:
    part, x = stack([0], layer_drop=0.3), torch.randn(2, 4)
    skipped = part.final_norm(x)
    torch.manual_seed(2)
    times = sum(torch.equal(through(part, x)[0], skipped) for _ in range(2000))
    assert times / 2000 == pytest.approx(0.3, abs=0.04)
    part.eval()
    assert not any(torch.equal(through(part, x)[0], skipped) for _ in range(50))


def test_every_layer_gets_a_gradient_even_when_dropped() -> None:
    part = stack([0, 1, 2], layer_drop=0.999)
    through(part, torch.randn(2, 4))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in part.layers.parameters())
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in part.layers.parameters())
