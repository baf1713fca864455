"""Who decays, who does not, and that tied parameters are updated once."""

from typing import Any

import pytest
import torch
from torch import nn

from dstrain.engine.config import AdamConfig
from dstrain.engine.optimizer import build_optimizer, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


def names(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[float, list[str]]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [(group["weight_decay"], [known[id(parameter)] for parameter in group["params"]]) for group in groups]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = Model()
    groups = parameter_groups(model, AdamConfig(learning_rate=1.0, weight_decay=0.1))
    assert names(model, groups) == [
        (0.1, ["embedding.weight", "linear.weight"]),
        (0.0, ["linear.bias", "norm.weight", "norm.bias"]),
    ]


@pytest.mark.parametrize("config", [AdamConfig(learning_rate=1.0, weight_decay=0.1, decay="all"), AdamConfig(learning_rate=1.0)])
def test_one_group_where_all_decay_alike(config: AdamConfig) -> None:
    model = Model()
    everything = ["embedding.weight", "linear.weight", "linear.bias", "norm.weight", "norm.bias"]
    assert names(model, parameter_groups(model, config)) == [(config.weight_decay, everything)]


def test_no_group_is_empty() -> None:
    groups = parameter_groups(nn.LayerNorm(3), AdamConfig(learning_rate=1.0, weight_decay=0.1))
    assert [len(group["params"]) for group in groups] == [2]


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_updates_equal_the_formula(kind: str) -> None:
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2."""
    rate, (beta1, beta2), eps, decay = 0.01, (0.9, 0.98), 1e-8, 0.1
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    model = nn.ParameterList([parameter])
    config = AdamConfig(kind=kind, learning_rate=rate, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    optimizer = build_optimizer(model, config)
    expected, mean, square = parameter.detach().double(), torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    for step in range(1, 6):
        gradient = torch.tensor([[0.3, -0.1], [1.0, 0.0]]) * step
        parameter.grad = gradient
        optimizer.step()
        slope = gradient.double()
        if kind == "adam":
            slope = slope + decay * expected
        else:
            expected = expected * (1 - rate * decay)
        mean, square = beta1 * mean + (1 - beta1) * slope, beta2 * square + (1 - beta2) * slope**2
        expected = expected - rate * (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
    assert torch.allclose(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_a_restored_state_continues_bit_for_bit() -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * step + index))
            optimizer.step()

    config = AdamConfig(kind="adamw", learning_rate=0.01, weight_decay=0.1)
    straight, first = nn.Linear(7, 5), nn.Linear(7, 5)
    first.load_state_dict(straight.state_dict())
    run(straight, build_optimizer(straight, config), range(6))
    optimizer = build_optimizer(first, config)
    run(first, optimizer, range(3))
    second = nn.Linear(7, 5)
    second.load_state_dict(first.state_dict())
    continued = build_optimizer(second, config)
    for old, new in zip(first.parameters(), second.parameters(), strict=True):
        continued.state[new] = {name: value.clone() for name, value in optimizer.state[old].items()}
    run(second, continued, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
