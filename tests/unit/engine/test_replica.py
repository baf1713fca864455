"""Whole copies of a model from its empty shape."""

import torch
from torch import nn

from dstrain.engine.replica import empty_copy, filled_copy


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5)
        self.output.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.output(self.embedding(tokens) + self.table)
        return result


def test_an_empty_copy_holds_no_weights_but_the_ties() -> None:
    shape = empty_copy(Tied())
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert [name for name, _ in shape.named_parameters()] == ["embedding.weight", "output.bias"]
    assert torch.equal(shape.get_buffer("table"), torch.arange(3.0))


def test_a_filled_copy_computes_what_the_model_computes() -> None:
    model = Tied()
    shape = empty_copy(model)
    copy = filled_copy(shape, {name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    tokens = torch.tensor([[0, 4, 2]])
    assert torch.equal(copy(tokens), model(tokens))
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert copy.get_parameter("output.weight") is copy.get_parameter("embedding.weight")
    assert all(parameter.is_meta for parameter in shape.parameters())
