"""The fp32 weights that the optimizer updates and its state, wherever the ZeRO stage keeps them.

Stage 0: the parameters themselves. Stages 1 and 2: one flat partition per parameter group. Stage 3: one flat partition per
sub-group. Everything that changes in training is a function of these tensors, so they are what a checkpoint holds: plain
tensors, 12 bytes a parameter divided by the ranks, no pickled objects. The attributes read here are DeepSpeed's own
bookkeeping; no other file touches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dstrain.parallel.group import Group

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves in DeepSpeed's fp16 loss scaler; its constants come from the JSON file."""


class Layout(NamedTuple):
    """How a flat master is made of parameters.

    sizes: (P,) elements of each parameter, on all ranks together. pieces: (parameter, start, length) of what this rank holds,
    start and length in elements of the master; what only pads it lies in no piece.
    """

    sizes: Tensor
    pieces: list[tuple[int, int, int]]


class Masters:
    """This rank's share of the fp32 weights and optimizer state of a DeepSpeed engine."""

    def __init__(self, deepspeed: ModuleType, engine: Any, stage: int, replicas: Group) -> None:
        self._deepspeed = deepspeed
        self._replicas = replicas
        self._engine = engine
        self._stage = stage
        self.tensors = self._find()

    def _find(self) -> list[Tensor]:
        """What the optimizer writes to, in its own order; other values on each rank, the same list on all."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def layouts(self) -> dict[Tensor, Layout]:
        """The parameters in each flat master of stages 1 to 3."""
        optimizer = self._engine.optimizer
        groups, place = (optimizer.fp16_groups, self._share) if self._stage == 3 else (optimizer.bit16_groups, self._fragment)
        layouts = {}
        for master, group in zip(self.tensors, groups, strict=True):
            sizes, places = zip(*map(place, group), strict=True)
            pieces = [(number, start, length) for number, (start, length) in enumerate(places) if length > 0]
            layouts[master] = Layout(torch.tensor(sizes, dtype=master.dtype, device=master.device), pieces)
        return layouts

    def _fragment(self, parameter: Any) -> tuple[int, tuple[int, int]]:
        """Stages 1 and 2: elements of the whole parameter, and where its part lies in this rank's partition: start, length."""
        if parameter._hp_mapping is None:
            return parameter.numel(), (0, 0)
        address = parameter._hp_mapping.hp_fragment_address
        return parameter.numel(), (address.start, address.numel)

    def _share(self, parameter: Any) -> tuple[int, tuple[int, int]]:
        """Stage 3: the same. All ranks have shares of one size, of which the last ones may be padding in part or whole."""
        optimizer = self._engine.optimizer
        _, start, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        rest = parameter.ds_numel - share * self._replicas.rank
        return parameter.ds_numel, (start, min(share, max(rest, 0)))

    def load_fp32(self, originals: Mapping[nn.Parameter, Tensor]) -> None:
        """Start from whole fp32 weights, where DeepSpeed has made masters of their 16-bit roundings.

        Under ZeRO-3 a rank's share of a parameter is padded to equal size, and only the local setter knows of that.
        """
        rank, world_size = self._replicas.rank, self._replicas.size
        for parameter, weight in originals.items():
            if self._stage == 3:
                share: int = cast("Any", parameter).ds_tensor.ds_numel
                padded = nn.functional.pad(weight.flatten(), (0, share * world_size - weight.numel()))
                self._deepspeed.utils.safe_set_local_fp32_param(parameter, padded.narrow(0, share * rank, share))
            else:
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, weight)

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Make the model compute with the masters as they are now. Collective."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer.checkpoint_event_prologue()
            for index in range(len(self.tensors)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def full(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 master of one model parameter, on every rank. Collective."""
        value: Tensor | None = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self.gather_compute_weights(parameter).float() if value is None else value

    @torch.no_grad()
    def gather_compute_weights(self, parameter: nn.Parameter) -> Tensor:
        """A copy of the whole parameter as the model computes with it, on every rank. Collective."""
        with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().clone()

    def state(self) -> dict[str, Any]:
        """Masters, optimizer state and loss scale of this rank: tensors and numbers, not copied."""
        scaler = vars(self._engine.optimizer.loss_scaler) if self._stage > 0 else {}
        return {
            "masters": [master.detach() for master in self.tensors],
            "optimizer": [dict(self._engine.basic_optimizer.state.get(master, {})) for master in self.tensors],
            "loss_scaler": {name: scaler[name] for name in SCALER_STATE if name in scaler},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave, bit for bit, and publish it. Collective."""
        for master, saved, moments in zip(self.tensors, state["masters"], state["optimizer"], strict=True):
            master.copy_(saved)
            self._engine.basic_optimizer.state[master] = {name: value.to(master.device) for name, value in moments.items()}
        if self._stage > 0:
            vars(self._engine.optimizer.loss_scaler).update(state["loss_scaler"])
        self.sync_to_model()
