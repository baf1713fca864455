"""The fp32 weights that the optimizer updates and its state, wherever the ZeRO stage keeps them.

Stage 0: the parameters themselves. Stages 1 and 2: one flat partition per parameter group. Stage 3: one flat partition per
sub-group. Everything that changes in training is a function of these tensors, so a checkpoint holds them, as fragments
by name: 12 bytes a parameter divided by the ranks. The attributes read here are DeepSpeed's own bookkeeping; no other file
touches them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Annotated, Any, NamedTuple, cast

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from dstrain.config_base import Config
from dstrain.engine.construction import ParameterValues
from dstrain.fragment import DimensionSlice, Fragment
from dstrain.parallel.mesh import Mesh
from dstrain.storage.document import Count

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Optimizer state of every optimizer here, beside its step."""


def mark_tensor_sharded(parameter: nn.Parameter) -> None:
    """Tell DeepSpeed that tensor ranks hold slices of it: its norm counts unmarked ones on the first of them only."""
    vars(parameter).update(tensor_model_parallel=True, model_parallel=True)


def is_tensor_sharded(parameter: nn.Parameter) -> bool:
    """Whether it is marked."""
    return bool(vars(parameter).get("tensor_model_parallel", False))


class LossScalerState(Config):
    """The variables of DeepSpeed's fp16 loss scaler, none in other precisions; its constants are in the JSON file."""

    cur_scale: PositiveFloat | None = None
    cur_iter: Count | None = None
    last_overflow_iter: Annotated[int, Field(ge=-1)] | None = None
    cur_hysteresis: Count | None = None


class OptimizerScalars(Config):
    """optimizer_step: Adam's, the same for all parameters."""

    optimizer_step: Count
    loss_scaler: LossScalerState


class Layout(NamedTuple):
    """How a flat master is made of parameters.

    sizes: (P,) elements of each parameter, on all ranks together. is_cut: (P,) 1 for those that tensor ranks hold in slices, 0
    for those that each of them has. pieces: (parameter, start, length) of this rank's share, start and length in elements of the
    master; its padding is in no piece.
    """

    sizes: Tensor
    is_cut: Tensor
    pieces: list[tuple[int, int, int]]


class Block(NamedTuple):
    """A tensor of a checkpoint, or this rank's slice of it, inside a parameter.

    shape: of the whole tensor. start, length: elements of the flattened parameter. slice: under tensor parallelism, None for all.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    slice: DimensionSlice | None


class Partition(NamedTuple):
    """This rank's range of a parameter of `size` elements: [offset, offset + length), at `start` of the master."""

    size: int
    offset: int
    start: int
    length: int


class Masters:
    """This rank's share of the fp32 weights and optimizer state of a DeepSpeed engine."""

    def __init__(self, deepspeed: ModuleType, engine: Any, stage: int, mesh: Mesh) -> None:
        self._deepspeed = deepspeed
        self._replicas = mesh.replicas
        self._tensor = mesh.tensor
        self._engine = engine
        self._stage = stage
        self.tensors = self._find()

    def _find(self) -> list[Tensor]:
        """The optimizer's tensors, in its own order; other values on each rank, the same list on all."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        return list(optimizer.single_partition_of_fp32_groups)

    def _groups(self) -> list[list[Any]]:
        """The parameters in each master, in order."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return [[parameter] for parameter in self.tensors]
        return list(optimizer.fp16_groups if self._stage == 3 else optimizer.bit16_groups)

    def layouts(self) -> dict[Tensor, Layout]:
        """The parameters in each flat master of stages 1 to 3."""
        layouts = {}
        for master, group in zip(self.tensors, self._groups(), strict=True):
            partitions = [self._partition(parameter) for parameter in group]
            pieces = [(number, each.start, each.length) for number, each in enumerate(partitions) if each.length > 0]
            is_cut = master.new_tensor([is_tensor_sharded(parameter) for parameter in group])
            sizes = master.new_tensor([each.size for each in partitions])
            if self._tensor.size > 1:  # slices of a vocabulary may differ in size
                sizes = torch.where(is_cut > 0, self._tensor.all_reduce(sizes.clone()), sizes)
            layouts[master] = Layout(sizes, is_cut, pieces)
        return layouts

    def _partition(self, parameter: Any) -> Partition:
        """Under stage 3 all ranks have shares of one size, of which the last ones may be padding in part or in full."""
        if self._stage == 0:
            return Partition(parameter.numel(), 0, 0, parameter.numel())
        if self._stage == 3:
            optimizer = self._engine.optimizer
            _, start, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset = share * self._replicas.rank
            return Partition(parameter.ds_numel, offset, start, min(share, max(parameter.ds_numel - offset, 0)))
        if parameter._hp_mapping is None:
            return Partition(parameter.numel(), 0, 0, 0)
        in_master, in_parameter = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
        return Partition(parameter.numel(), in_parameter.start, in_master.start, in_master.numel)

    def _owned(self, parameter: Any) -> Partition:
        """This rank's own share; replicated parameters are divided by rank."""
        partition = self._partition(parameter)
        if self._stage > 0:
            return partition
        share = math.ceil(partition.size / self._replicas.size)
        start = min(share * self._replicas.rank, partition.size)
        return Partition(partition.size, start, start, min(share, partition.size - start))

    def fragments(
        self, blocks: Mapping[nn.Parameter, Sequence[Block]], average: Sequence[Tensor] | None, *, owned: bool
    ) -> Iterator[Fragment]:
        """Views of masters, moments and moving average, if there is one, by the tensors that each parameter is made of.

        owned: only this rank's own share; else all that it holds. The first tensor rank owns what is replicated over the group.
        Optimizer state that does not exist yet is created as zeros.
        """
        kinds = {"master": self.tensors, **({} if average is None else {"ema": average})}
        kinds |= {kind: [self._optimizer_state(master)[kind] for master in self.tensors] for kind in MOMENTS}
        for index, group in enumerate(self._groups()):
            for parameter in group:
                _, offset, start, length = self._owned(parameter) if owned else self._partition(parameter)
                for block in blocks[parameter]:
                    if owned and block.slice is None and self._tensor.rank > 0:
                        continue
                    low, high = max(offset, block.start), min(offset + length, block.start + block.length)
                    for kind, tensors in kinds.items() if low < high else ():
                        values = tensors[index].detach().view(-1)[start + low - offset : start + high - offset]
                        yield Fragment(f"{kind}/{block.name}", block.shape, low - block.start, values, block.slice)

    def _optimizer_state(self, master: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._engine.basic_optimizer.state[master]
        if not state:
            state |= {"step": torch.zeros((), device=master.device)}
            state |= {kind: torch.zeros_like(master.detach()) for kind in MOMENTS}
        return state

    def load_fp32(self, parameters: Iterable[nn.Parameter], values: ParameterValues) -> None:
        """Start from exact fp32 weights, read one at a time: DeepSpeed has made masters of their 16-bit roundings.

        Under ZeRO-3 a rank's share of a parameter is padded to equal size, and only the local setter knows of that.
        """
        for parameter in parameters:
            weight = values.read(parameter, device=parameter.device, dtype=torch.float32)
            if self._stage == 3:
                share: int = cast("Any", parameter).ds_tensor.ds_numel
                own = weight.flatten()[share * self._replicas.rank :][:share]
                self._deepspeed.utils.safe_set_local_fp32_param(parameter, nn.functional.pad(own, (0, share - own.numel())))
            else:
                self._deepspeed.utils.safe_set_full_fp32_param(parameter, weight)

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """Make the model compute with the masters as they are now. Collective."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            with self._released():
                for index in range(len(self.tensors)):
                    optimizer._reassign_or_swap_out_partitioned_parameters(index)

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Inside, ZeRO-3 has no parameter whole, and none on its way: after a forward pass alone, some are gathered ahead."""
        self._engine.optimizer.checkpoint_event_prologue()
        yield
        self._engine.optimizer.checkpoint_event_epilogue()

    @torch.no_grad()
    def full(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 master of one model parameter, on every rank. Collective."""
        value: Tensor | None = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return self.gather_compute_weights(parameter).float() if value is None else value

    def gather_model(self, model: nn.Module) -> dict[str, Tensor]:
        """A copy of every parameter of a model under ZeRO-3, whole, by name. Collective."""
        with self._released():
            return {name: self.gather_compute_weights(parameter) for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def gather_compute_weights(self, parameter: nn.Parameter) -> Tensor:
        """A copy of the whole parameter as the model computes with it, on every rank. Collective."""
        with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._stage == 3):
            return parameter.detach().clone()

    def scalars(self) -> OptimizerScalars:
        """State of the optimizer besides tensors."""
        scaler = self._scaler()
        (step,) = {int(self._optimizer_state(master)["step"]) for master in self.tensors}
        moving = {name: scaler[name] for name in LossScalerState.model_fields if name in scaler}
        return OptimizerScalars(optimizer_step=step, loss_scaler=LossScalerState(**moving))

    def load_scalars(self, scalars: OptimizerScalars) -> None:
        """Take over what `scalars` gave. A scaler goes on only if both runs compute in fp16."""
        for master in self.tensors:
            self._optimizer_state(master)["step"] = torch.tensor(float(scalars.optimizer_step), device=master.device)
        self._scaler().update(scalars.loss_scaler.model_dump(exclude_none=True) if self._scaler() else {})

    def _scaler(self) -> dict[str, Any]:
        """The attributes of the fp16 loss scaler; empty in other precisions."""
        return vars(self._engine.optimizer.loss_scaler) if self._stage > 0 and self._engine.fp16_enabled() else {}
