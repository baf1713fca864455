"""Activation checkpointing: what a layer's forward pass computes is computed again in the backward pass, not kept.

It is a transform of a built model: `checkpoint_layers` tells every stack how its passes keep activations. Results do not change,
bit for bit: dropout draws the same masks again. Cost: `full` keeps a layer's input only and runs each layer once more, a third of
the products of a step; `selective` also keeps the results of matrix products, attention and collectives, and computes only the
cheap operations between them again (norms, activations, dropout, residuals).

`tile_feed_forward` does the same to the feed-forward networks, a part of the tokens at a time: their wide activations, the most
of a long sequence, exist for one part at a time in both passes. Cost: every network runs once more, besides what `full` repeats,
and each part has its own gathering under ZeRO-3 and its own sum over a tensor group.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from dstrain.config_base import Checkpointing
from dstrain.nn.dropout import runs_on_parts
from dstrain.nn.feed_forward import PositionWise
from dstrain.nn.stack import LayerStack
from dstrain.ops.activation import TensorMap

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product",
    "dstrain::",
)
"""Beginnings of the names of the operations whose results `selective` keeps. Their results must not be changed in place: so not
`bmm`, whose one user, the attention of short sequences on a CPU, does that."""


def checkpoint_layers(model: nn.Module, mode: Checkpointing) -> None:
    """Choose what the layer passes of `model` keep in training. offload: as `full`, with the layers' inputs in CPU memory."""
    for module in model.modules():
        if isinstance(module, LayerStack):
            module.checkpoint = None if mode == "none" else partial(_checkpointed, mode=mode)


def tile_feed_forward(model: nn.Module, tiles: int) -> None:
    """Cut the tokens into so many parts for the feed-forward networks of `model`; 1 leaves them together.

    The number of parts is the same for any number of tokens, as ZeRO-3 requires: ranks have different ones.
    """
    for module in model.modules():
        if isinstance(module, PositionWise):
            module.tiled = partial(_tiled, tiles=tiles) if tiles > 1 else None


def _tiled(run: TensorMap, x: Tensor, *, tiles: int) -> Tensor:
    parts = zip(runs_on_parts(run, tiles), x.flatten(0, -2).tensor_split(tiles), strict=True)  # (n, D) each
    if torch.is_grad_enabled():
        return torch.cat([_checkpointed(run_on_part, part, mode="full") for run_on_part, part in parts]).view(x.shape)
    return torch.cat([run_on_part(part) for run_on_part, part in parts]).view(x.shape)


def _checkpointed(run: TensorMap, x: Tensor, *, mode: Checkpointing) -> Tensor:
    kept_on_cpu = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if mode == "offload" else nullcontext()
    with kept_on_cpu:
        contexts = _selective_contexts if mode == "selective" else noop_context_fn
        result: Tensor = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
    return result


def _selective_contexts() -> Contexts:
    """Those of the first and of the second computation."""
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call, no-any-return]


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    is_kept = operation.name().startswith(_KEPT)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
