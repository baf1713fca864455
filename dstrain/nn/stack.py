"""A stack: layer passes in a schedule, then a final norm.

The schedule names, for each depth, which of the unique layers runs there, so that a layer may run at several depths while its
weights exist once. LayerDrop skips whole passes in training. A skipped pass is computed and then set aside: every parameter
keeps a gradient and every rank runs the same modules, which sharded training needs; nothing is saved in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from dstrain.nn.capture import StackCapture
from dstrain.nn.dropout import NO_MASKS, MaskKeys

_L = TypeVar("_L", bound=nn.Module)
_T = TypeVar("_T")


class LayerStack(nn.Module, Generic[_L]):
    """layers: the unique ones. schedule: index of the layer at each depth. final_norm: `nn.Identity` for none."""

    def __init__(self, *, layers: Sequence[_L], schedule: Sequence[int], layer_drop: float, final_norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.schedule = tuple(schedule)
        self.checkpoint: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None  # set by checkpoint_layers
        self.layer_drop = layer_drop
        self.final_norm = final_norm

    def forward(
        self,
        x: Tensor,
        run: Callable[[int, _L, Tensor], Tensor],
        hooks: StackCapture | None = None,
        masks: MaskKeys = NO_MASKS,
    ) -> Tensor:
        """Pass x through `run(depth, layer, x)` at each depth. (..., D) -> (..., D).

        hooks: see x between the passes. masks: what the tokens draw dropout by.
        """
        for depth, index in enumerate(self.schedule):
            if hooks is not None:
                hooks.hidden_states(depth, x)
            layer_pass = partial(self._pass, run, depth, index, masks)
            passed = layer_pass(x) if self.checkpoint is None or not torch.is_grad_enabled() else self.checkpoint(layer_pass, x)
            if self.training and self.layer_drop > 0:
                dropped = masks.uniform(depth, x.device) < self.layer_drop
                passed = torch.where(dropped, x, passed)
            x = passed
        result: Tensor = self.final_norm(x)
        if hooks is not None:
            hooks.hidden_states(len(self.schedule), result)
        return result

    def _pass(self, run: Callable[[int, _L, Tensor], Tensor], depth: int, index: int, masks: MaskKeys, x: Tensor) -> Tensor:
        """One pass, again with the same masks if it is computed again."""
        with masks.at(depth):
            return run(depth, cast("_L", self.layers[index]), x)

    def passes(self, make: Callable[[_L], _T]) -> list[_T]:
        """What `make` gives for the layer at each depth, made once a layer."""
        made = [make(cast("_L", layer)) for layer in self.layers]
        return [made[index] for index in self.schedule]
