"""A whole copy of a model whose parameters are partitioned over the ranks (ZeRO-3).

Generation takes a different number of decoder steps on each rank, so it must not trigger collectives: under ZeRO-3 it runs
on a replica. The empty shape of the model is taken before DeepSpeed partitions it and costs no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def empty_copy(model: nn.Module) -> nn.Module:
    """The same modules with parameters on the meta device, ties kept; buffers are copied."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    shape: nn.Module = copy.deepcopy(model, memo)
    return shape


def filled_copy(shape: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A model of that shape in evaluation mode that holds `parameters`, by name, tied ones once."""
    memo: dict[int, object] = {
        id(empty): nn.Parameter(parameters[name], requires_grad=False) for name, empty in shape.named_parameters()
    }
    model: nn.Module = copy.deepcopy(shape, memo)
    return model.eval()
