"""Compiled layers: what a layer does token by token becomes one graph for each part of it, which a compiler fuses.

It is a transform of a built model, as activation checkpointing is: `compile_layers` replaces the parts of every layer before,
between and after its attentions by compiled ones. Names and memory of the weights stay as they are. Attention itself has kernels
of its own, and shapes that follow the sequences; it stays outside, so a graph knows the number of tokens and nothing else of a
batch. The first micro-batch runs as it is, the next makes graphs of its size, the first of another size ones for any; no further
size makes any. A part
that cannot become one graph is an error, not a slower part.

Layers of one stack share their graphs. Cost: the first two micro-batches take minutes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dstrain.config_base import Compiling
from dstrain.nn.layers import ResidualLayer

Part = Callable[..., Any]
_PARTS = ("before_attention", "between_attentions", "after_attention")


def compile_layers(model: nn.Module, mode: Compiling, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the parts of all layers of `model` for training, unless `mode` is none. backend: of `torch.compile`.

    Without gradient they run as they are: evaluation and generation have too many sizes.
    """
    for module in model.modules() if mode == "layers" else ():
        if isinstance(module, ResidualLayer):
            for name in _PARTS:
                if hasattr(module, name):
                    part: Part = getattr(module, name)
                    setattr(module, name, _CompiledPart(part, torch.compile(part, backend=backend, fullgraph=True)))


class _CompiledPart:
    """Trains by the plain part once: what is chosen or made at a first call, as kernels are, is there for a graph to read."""

    def __init__(self, plain: Part, compiled: Part) -> None:
        self._plain = plain
        self._compiled = compiled
        self._has_run = False

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():  # an evaluation chooses no kernel of dropout: it is no first run
            return self._plain(*args)
        is_ready, self._has_run = self._has_run, True
        return (self._compiled if is_ready else self._plain)(*args)
