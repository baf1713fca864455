"""The fp32 weights that the optimizer updates, wherever the ZeRO stage keeps them.

Stage 0: the parameters themselves. Stages 1 and 2: one flat partition per parameter group. Stage 3: one flat partition per
sub-group. The attributes read here are DeepSpeed's own bookkeeping; no other file touches them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


class Masters:
    """This rank's share of the fp32 weights of a DeepSpeed engine."""

    def __init__(self, deepspeed: ModuleType, engine: Any, stage: int) -> None:
        self._deepspeed = deepspeed
        self._engine = engine
        self._stage = stage

    @property
    def tensors(self) -> list[Tensor]:
        """What the optimizer writes to, in its own order; each rank has other values, all ranks the same list."""
        if self._stage == 0:
            return [parameter for group in self._engine.optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    @torch.no_grad()
    def publish(self) -> None:
        """Make the model compute with the masters as they are now. Collective."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer.checkpoint_event_prologue()
            for index in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def full(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 master of one model parameter, on every rank. Collective."""
        value: Tensor | None = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self.computed(parameter).float() if value is None else value

    @torch.no_grad()
    def computed(self, parameter: nn.Parameter) -> Tensor:
        """A copy of the whole parameter as the model computes with it, on every rank. Collective."""
        with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().clone()
