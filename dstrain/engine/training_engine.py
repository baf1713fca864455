"""The training engine: micro-batches in, one optimizer step out, whatever the ZeRO stage and the number of ranks.

Losses arrive as sums. Each is multiplied by replicas / denominator before its backward pass, and DeepSpeed averages over the
ranks: that is the one division. The plan knows how much a whole step holds, the objective which part of that is its denominator.
Gradient norm and clipping are global under every stage. A loss or gradient that is not finite stops training on all ranks alike,
before any weight has changed; under fp16 the step is skipped and the loss scale halved instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dstrain.batch import Batch, Size
from dstrain.engine.config import EmaConfig, EngineConfig, OptimizerConfig, ScheduleConfig
from dstrain.engine.construction import COMPUTE_DTYPES, ParameterValues, fill, partition, size_of, take_fp32_gradients
from dstrain.engine.ds_config import resolve_ds_config
from dstrain.engine.ema import MovingAverage
from dstrain.engine.launch import accept_optimizer, load_deepspeed, partitioning_optimizer, require_precision
from dstrain.engine.loss_totals import LossReducer, LossTotals, StepReport, Total
from dstrain.engine.master_weights import (
    MOMENTS,
    Block,
    Layout,
    Masters,
    OptimizerScalars,
    is_tensor_sharded,
    mark_tensor_sharded,
)
from dstrain.engine.optimizer import build_optimizer
from dstrain.engine.replica import empty_copy, filled_copy
from dstrain.engine.schedule import learning_rate
from dstrain.engine.stable_adamw import StableAdamW
from dstrain.engine.step_reading import StepReading, norms_read_by
from dstrain.errors import CheckpointError, TrainingError
from dstrain.fragment import DimensionSlice, Fragment, StoredState
from dstrain.models.weights import Layouts, ParameterLayout, TensorSlice, parameter_layouts
from dstrain.nn.checkpointing import checkpoint_layers, tile_feed_forward
from dstrain.nn.compiling import compile_layers
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.allocator import balance_freed_memory, keep_freed_memory, return_freed_memory
from dstrain.parallel.mesh import Mesh
from dstrain.protocols import Generative, WeightSource
from dstrain.seeding import seed_everything
from dstrain.storage.document import Count, DocumentFormat


class EngineScalars(OptimizerScalars):
    """The engine's part of a manifest. step: completed optimizer steps. base: see `TrainEngine`."""

    step: Count
    base: str | None


_SCALARS = DocumentFormat(
    EngineScalars,
    "state of an engine",
    CheckpointError,
    "resume with the version that wrote it, or start a new run from its last bundle",
)


class TrainEngine:
    """Owns the model, the optimizer and the moving average; implements `protocols.Resumable`.

    module: `TrainModule`, called with a `Batch`, built identically on every rank; parameters without `requires_grad` stay as they
    are, and neither checkpoints nor gathered weights hold them. weights: the source of the model's parameters if it is on the
    meta device, None if they have values already. base: fingerprint of the weights that training began from, None for random
    ones; a checkpoint continues only on the same base. step: completed optimizer steps.
    """

    def __init__(
        self,
        module: TrainModule,
        *,
        optimizer: OptimizerConfig,
        schedule: ScheduleConfig,
        engine: EngineConfig,
        ema: EmaConfig | None,
        seed: int,
        mesh: Mesh,
        weights: WeightSource | None = None,
        base: str | None = None,
    ) -> None:
        config = resolve_ds_config(engine, replicas=mesh.replicas.size, size=size_of(module))
        return_freed_memory()  # until the first step has made the last tensors that stay, the optimizer's moments
        self._first_step = True
        self.mesh = mesh
        self.module, self.step = module, 0
        self.stage: int = config["zero_optimization"]["stage"]
        self._peak, self._schedule, self._precision, self._seed = optimizer.learning_rate, schedule, engine.precision, seed
        self._base = base
        self._deepspeed_name = engine.deepspeed
        self._model = cast("nn.Module", module.model)
        self._trained = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        self._layouts = {name: layout for name, layout in parameter_layouts(self._model).items() if name in self._trained}
        self._blocks = _checkpoint_blocks(module, self._layouts)
        self._shape = empty_copy(self._model) if self.stage == 3 else None
        checkpoint_layers(self._model, engine.activation_checkpointing)
        tile_feed_forward(self._model, engine.feed_forward_tiles)
        compile_layers(self._model, engine.compile)
        self._comms_logger: bool = config.get("comms_logger", {}).get("enabled", False)
        self._deepspeed = load_deepspeed(mesh, talkative=_profiles(config))
        require_precision(self._deepspeed, engine.precision, mesh)
        built = build_optimizer(module, optimizer)  # before ZeRO-3 flattens parameters: it groups them by their dimensions
        accept_optimizer(self._deepspeed, built)
        values, dtype = ParameterValues(module, self._model, weights), COMPUTE_DTYPES[engine.precision]
        if self.stage == 3:
            partition(self._deepspeed, module, values, config, mpu=mesh.mpu, device=mesh.device, dtype=dtype)
        else:
            fill(module, values, device=mesh.device, dtype=dtype)
        for layout_name, layout in self._layouts.items():
            if layout.is_sharded:
                mark_tensor_sharded(self._trained[layout_name])
        with partitioning_optimizer(self._deepspeed) if self.stage == 1 else nullcontext():
            self._engine: Any = self._deepspeed.initialize(
                model=module, optimizer=built, config=config, mpu=mesh.mpu, dist_init_required=False
            )[0]
        self._masters = Masters(self._deepspeed, self._engine, self.stage, mesh)
        if isinstance(built, StableAdamW) and (self.stage > 0 or mesh.tensor.size > 1):
            built.partition(self._masters.layouts(), self._add_up)
        if engine.precision != "fp32":
            self._masters.load_fp32([parameter for parameter in module.parameters() if parameter.requires_grad], values)
        take_fp32_gradients(self._engine.optimizer, module)
        self._average = None if ema is None else MovingAverage(self._masters.tensors, ema)
        self._reduce = LossReducer(mesh.replicas)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.mesh.device

    def train_step(self, batches: Sequence[Batch], size: Size) -> StepReport:
        """One optimizer step. Collective.

        batches: this rank's micro-batches, the same number on every rank, the same ones in a sequence group. size: of all batches
        of all data ranks together.
        Raises TrainingError, on every rank, if the loss or a gradient is not finite.
        """
        rate = learning_rate(self._schedule, self._peak, self.step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._seed_dropout()
        self.module.train()
        selected = self._select(batches)
        denominator = self.module.objective.denominator(size)
        totals = self._accumulate(batches, selected, self.mesh.replicas.size / denominator)
        reading = StepReading(totals, self._reduce, partial(self._require_finite, denominator=denominator))
        norm = self._update(reading)
        total = reading.total
        report = StepReport(
            step=self.step + 1,
            loss=total.loss_sum / denominator,
            num_targets=size.num_targets,
            denominator=denominator,
            grad_norm=norm,
            learning_rate=rate,
            skipped=not math.isfinite(norm),
            metrics=total.metrics,
        )
        if not report.skipped:
            self.step += 1
            if self._average is not None:
                self._average.update(self.step)
        if self._first_step:
            self._first_step = False
            if self.device.type == "cpu":
                keep_freed_memory()
            else:
                balance_freed_memory()
        return report

    @torch.no_grad()
    def _select(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """The tokens of each micro-batch that the objective selects, None for all. Collective.

        Scans the step under the dropout that training will draw again. A step of samples has no labels to select by.
        """
        selection = self.module.objective.selection
        if selection is None or any(batch.sampled for batch in batches):
            return [None] * len(batches)
        own: list[Tensor] = [self._engine(self._own(batch), selection.scan) for batch in batches]
        self._seed_dropout()
        return list(selection.select(own, self.mesh.replicas.gather_rows(torch.cat(own))))

    def _own(self, batch: Batch) -> Batch:
        """This rank's share, on its device."""
        return batch.share(self.mesh.sequence.rank, self.mesh.sequence.size).to(self.device)

    def _accumulate(self, batches: Sequence[Batch], selected: Sequence[Tensor | None], scale: float) -> LossTotals:
        """Gradients of all micro-batches, `scale` times; loss and metrics of this rank."""
        totals = LossTotals()
        for index, (batch, chosen) in enumerate(zip(batches, selected, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = partial(self.module.objective, selected=chosen)
            output: LossOutput = self._engine(self._own(batch), loss)
            self._engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
            totals.add(output)
        return totals

    def _require_finite(self, total: Total, *, denominator: int) -> None:
        loss = total.loss_sum / denominator
        if self._precision != "fp16" and not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss}; {_REMEDY}")

    def _update(self, reading: StepReading) -> float:
        """Read the step, clip, update; returns the gradient norm before clipping, infinite if fp16 scaling made the step skip."""
        norm = float(reading(self._grad_norm())) if self.stage == 0 else math.inf
        if self.stage == 0 and not math.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm}; {_REMEDY}")
        try:
            with norms_read_by(self._engine.optimizer, self.stage, reading):
                self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise TrainingError(f"the fp16 loss scale has reached its minimum; {_REMEDY}") from error
            raise
        if not self._engine.was_step_applied():
            if self._precision != "fp16":
                raise TrainingError(f"a gradient is not finite; {_REMEDY}")
            return math.inf
        return norm if self.stage == 0 else float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossOutput:
        """The loss of one batch in evaluation mode, of this rank's share. Collective if ranks share a model or a batch."""
        self.module.eval()
        output: LossOutput = self._engine(self._own(batch))
        self.module.train()
        return output

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model computes with the moving average inside the context. Collective on both ends.

        An error inside puts the masters back, but ends without the collective: the other ranks may be elsewhere.
        """
        average = self._required_average()
        average.swap()
        try:
            self._masters.sync_to_model()
            yield
        finally:
            average.swap()
        self._masters.sync_to_model()

    def gather_weights(self, *, averaged: bool) -> dict[str, Tensor] | None:
        """The trained fp32 weights by canonical name on rank 0's CPU, None elsewhere. Collective.

        averaged: the moving average instead.
        """
        if averaged:
            self._required_average().swap()
        gathered: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            layout = self._layouts[name]
            for canonical, value in layout.gather(self._masters.full(parameter), self.mesh.tensor).items():
                if self.mesh.world.rank == 0:
                    gathered[canonical] = value.to("cpu", copy=True)
        if averaged:
            self._required_average().swap()
        return gathered if self.mesh.world.rank == 0 else None

    @contextmanager
    def generation_model(self, averaged: bool) -> Iterator[Generative]:
        """The whole model in evaluation mode, for any number of calls on each rank. Collective on both ends."""
        with self.averaged_weights() if averaged else nullcontext():
            if self._shape is not None:
                yield cast("Generative", filled_copy(self._shape, self._masters.gather_model(self._model)))
            else:
                self.module.eval()
                try:
                    yield cast("Generative", self._model)
                finally:
                    self.module.train()

    def close(self) -> None:
        """Print DeepSpeed's communication log, if the JSON enables it; release objective and engine."""
        if self._comms_logger:
            self._deepspeed.comm.log_summary()
        self.module.objective.close()
        self._engine.destroy()
        self._deepspeed.utils.groups.mpu = None  # DeepSpeed keeps it for the process, also for later engines without one

    @property
    def layout(self) -> str:
        """How this run is laid out, for people: `2 ranks zero1 fp32`."""
        ranks = "1 rank" if self.mesh.world.size == 1 else f"{self.mesh.world.size} ranks"
        groups = {"tensor": self.mesh.tensor, "sequence": self.mesh.sequence}
        shape = "".join(f" {name} {group.size}" for name, group in groups.items() if group.size > 1)
        return f"{ranks}{shape} {self._deepspeed_name} {self._precision}"

    def fragments(self) -> list[Fragment]:
        """This rank's share of masters, moments, moving average and the objective's state: views. No communication."""
        average = None if self._average is None else self._average.tensors
        fragments = list(self._masters.fragments(self._blocks, average, owned=True))
        if self.mesh.world.rank == 0 and (selection := self.module.objective.selection) is not None:
            state = selection.state()
            fragments += [Fragment(f"objective/{name}", tuple(value.shape), 0, value.view(-1)) for name, value in state.items()]
        return fragments

    def scalars(self) -> dict[str, Any]:
        """State of the next step besides tensors; JSON, the same on every rank."""
        return EngineScalars(step=self.step, base=self._base, **dict(self._masters.scalars())).model_dump()

    @torch.no_grad()
    def load(self, stored: StoredState) -> None:
        """Take over a checkpoint of any number of ranks, ZeRO stage and precision. No communication; `sync` comes next.

        Raises CheckpointError if it is of another model, optimizer or base.
        """
        scalars = _SCALARS.validate(dict(stored.scalars), stored.path)
        if scalars.base != self._base:
            raise CheckpointError(
                f"the checkpoint was saved with base = {scalars.base}, but this run has base = {self._base}; resume "
                "with the settings it was saved with, or start a new run from its last bundle"
            )
        average = None if self._average is None else self._average.tensors
        kinds = ["master", *MOMENTS, *([] if average is None else ["ema"])]
        blocks = [block for blocks in self._blocks.values() for block in blocks]
        stored.require({f"{kind}/{block.name}": block.shape for kind in kinds for block in blocks}, optional="objective")
        stored.fill(self._masters.fragments(self._blocks, average, owned=False))
        self._masters.load_scalars(scalars)
        if (selection := self.module.objective.selection) is not None:
            selection.load_state(stored.whole("objective"))
        self.step = scalars.step

    def sync(self) -> None:
        """Compute with what `load` has read. Collective."""
        self._masters.sync_to_model()

    def _seed_dropout(self) -> None:
        """Masks of this step, on all ranks; torch's generator is for what has no counted masks, by rank."""
        seed_masks(self._seed, self.step)
        seed_everything(self._seed, "dropout", self.step, self.mesh.replicas.rank)

    def _grad_norm(self) -> Tensor:
        """(), of unpartitioned gradients, each counted once however many tensor ranks have it."""
        gradients: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                gradients[is_tensor_sharded(parameter)].append(parameter.grad)
        norm, cut = torch.nn.utils.get_total_norm(gradients[False]), gradients[True]
        if self.mesh.tensor.size > 1:
            squares = self.mesh.tensor.all_reduce(torch.nn.utils.get_total_norm(cut).to(self.device).square())
            norm = (norm.to(self.device).square() + squares).sqrt()
        return norm

    def _add_up(self, sums: Tensor, layout: Layout) -> Tensor:
        """Numbers of parameters, summed over the ranks that hold pieces of each."""
        total = sums.to(self.mesh.device)
        if self.stage > 0:
            total = self.mesh.replicas.all_reduce(total)
        if self.mesh.tensor.size > 1:
            is_cut = layout.is_cut.to(total.device)
            total = total + self.mesh.tensor.all_reduce(total * is_cut) - total * is_cut
        return total.to(sums.device)

    def _required_average(self) -> MovingAverage:
        if self._average is None:
            raise ValueError("there is no moving average; give TrainEngine an EmaConfig")
        return self._average


_REMEDY = "lower the learning rate, warm up longer, or set engine.clip_norm"


def _checkpoint_blocks(module: TrainModule, layouts: Layouts) -> dict[nn.Parameter, list[Block]]:
    """The tensors of a checkpoint that each trained parameter is made of: canonical ones, and those of the objective."""
    blocks: dict[nn.Parameter, list[Block]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layout = layouts.get(name.removeprefix("model.")) if name.startswith("model.") else None
        layout = layout or ParameterLayout(parameter.shape, (TensorSlice(name, None),))
        row = math.prod(layout.shape[1:])
        blocks[parameter] = [
            Block(
                part.name,
                layout.shape_of(part),
                0 if part.rows is None else part.rows.start * row,
                math.prod(layout.local_shape_of(part)),
                None if part.shard is None else DimensionSlice(*part.shard[:3]),
            )
            for part in layout.slices
        ]
    return blocks


def _profiles(config: dict[str, Any]) -> bool:
    sections = (config.get("comms_logger", {}), config.get("flops_profiler", {}))
    return any(section.get("enabled", False) for section in sections) or config.get("wall_clock_breakdown", False)
