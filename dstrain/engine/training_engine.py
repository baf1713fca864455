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
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dstrain.batch import Batch, Size
from dstrain.engine.config import EmaConfig, EngineConfig, OptimizerConfig, ScheduleConfig
from dstrain.engine.ds_config import resolve_ds_config
from dstrain.engine.ema import MovingAverage
from dstrain.engine.launch import load_deepspeed, require_precision
from dstrain.engine.master_weights import Masters
from dstrain.engine.optimizer import build_optimizer
from dstrain.engine.replica import empty_copy, filled_copy
from dstrain.engine.schedule import learning_rate
from dstrain.engine.shard_file import read_shard, write_shard
from dstrain.engine.stable_adamw import StableAdamW
from dstrain.engine.step_report import StepReport
from dstrain.errors import CheckpointError, TrainingError
from dstrain.models.weights import parameter_layouts, split_parameters
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh
from dstrain.protocols import Generative
from dstrain.seeding import seed_everything

SETTING = "setting.pt"
"""File of a checkpoint that says how its shards are cut."""


class TrainEngine:
    """Owns the model, the optimizer and the moving average; implements `protocols.Shardable`.

    module: `TrainModule`, called with a `Batch`, built identically on every rank; parameters without `requires_grad` stay as they
    are, and neither checkpoints nor gathered weights hold them. base: fingerprint of the weights that training began from, None
    for random ones; a checkpoint continues on the same base alone. step: completed optimizer steps.
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
        base: str | None = None,
    ) -> None:
        config = resolve_ds_config(engine, world_size=mesh.replicas.size)
        self.mesh = mesh
        self.module = module
        self.step = 0
        self.stage: int = config["zero_optimization"]["stage"]
        self._peak, self._schedule, self._precision, self._seed = optimizer.learning_rate, schedule, engine.precision, seed
        self._base = base
        self._model = cast("nn.Module", module.model)
        self._trained = {name: parameter for name, parameter in self._model.named_parameters() if parameter.requires_grad}
        self._layouts = {name: layout for name, layout in parameter_layouts(self._model).items() if name in self._trained}
        self._shape = empty_copy(self._model) if self.stage == 3 else None
        self._comms_logger: bool = config.get("comms_logger", {}).get("enabled", False)
        self._deepspeed = load_deepspeed(mesh, talkative=_profiles(config))
        require_precision(self._deepspeed, engine.precision, mesh)
        module.to(mesh.device)
        rounded = engine.precision != "fp32"
        originals = {parameter: parameter.data for parameter in module.parameters() if parameter.requires_grad and rounded}
        built = build_optimizer(module, optimizer)
        self._engine: Any = self._deepspeed.initialize(
            model=module, optimizer=built, config=config, mpu=mesh.mpu, dist_init_required=False
        )[0]
        self._masters = Masters(self._deepspeed, self._engine, self.stage, mesh.replicas)
        if isinstance(built, StableAdamW) and self.stage > 0:
            built.partition(self._masters.layouts(), lambda sums: mesh.replicas.all_reduce(sums.to(mesh.device)).to(sums.device))
        self._masters.load_fp32(originals)
        self._average = None if ema is None else MovingAverage(self._masters.tensors, ema)

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.mesh.device

    def train_step(self, batches: Sequence[Batch], size: Size) -> StepReport:
        """One optimizer step. Collective.

        batches: this rank's micro-batches, the same number on every rank. size: of all batches of all ranks together.
        Raises TrainingError, on every rank, where the loss or a gradient is not finite.
        """
        rate = learning_rate(self._schedule, self._peak, self.step)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        seed_everything(self._seed, "dropout", self.step, self.mesh.replicas.rank)
        self.module.train()
        selected = self._select(batches)
        denominator = self.module.objective.denominator(size)
        sums = self._accumulate(batches, selected, self.mesh.replicas.size / denominator)
        loss = sums.pop("loss") / denominator
        if self._precision != "fp16" and not math.isfinite(loss):
            raise TrainingError(f"step {self.step + 1}: the loss is {loss}; {_REMEDY}")
        norm = self._update()
        report = StepReport(
            step=self.step + 1,
            loss=loss,
            num_targets=size.num_targets,
            denominator=denominator,
            grad_norm=norm,
            learning_rate=rate,
            skipped=not math.isfinite(norm),
            sums={name: total / size.num_targets for name, total in sums.items()},
        )
        if not report.skipped:
            self.step += 1
            if self._average is not None:
                self._average.update(self.step)
        return report

    @torch.no_grad()
    def _select(self, batches: Sequence[Batch]) -> list[Tensor | None]:
        """The tokens of each micro-batch that the objective selects, None for all. Collective.

        Scans the step under the dropout that training will draw again. A step of samples has no labels to select by.
        """
        selection = self.module.objective.selection
        if selection is None or any(batch.sampled for batch in batches):
            return [None] * len(batches)
        own: list[Tensor] = [self._engine(batch.to(self.device), selection.scan) for batch in batches]
        seed_everything(self._seed, "dropout", self.step, self.mesh.replicas.rank)
        return list(selection.select(own, self.mesh.replicas.gather_rows(torch.cat(own))))

    def _accumulate(self, batches: Sequence[Batch], selected: Sequence[Tensor | None], scale: float) -> dict[str, float]:
        """Gradients of all micro-batches, `scale` times; the sums of the loss and of what is reported, over all ranks."""
        totals, names = torch.zeros((), dtype=torch.float64, device=self.device), ["loss"]
        for index, (batch, chosen) in enumerate(zip(batches, selected, strict=True)):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            loss = partial(self.module.objective, selected=chosen)
            output: LossOutput = self._engine(batch.to(self.device), loss)
            self._engine.backward(output.loss_sum * scale, scale_wrt_gas=False)
            names = ["loss", *output.sums]
            totals = totals + torch.stack([output.loss_sum.detach(), *output.sums.values()]).double()
        return dict(zip(names, self.mesh.replicas.all_reduce(totals).tolist(), strict=True))

    def _update(self) -> float:
        """Clip and update; returns the gradient norm before clipping, infinite if fp16 scaling made the step skip."""
        norm = math.inf
        if self.stage == 0:
            gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        if self.stage == 0 and not math.isfinite(norm):
            raise TrainingError(f"step {self.step + 1}: the gradient norm is {norm}; {_REMEDY}")
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise TrainingError(f"step {self.step + 1}: the fp16 loss scale has reached its minimum; {_REMEDY}") from error
            raise
        if not self._engine.was_step_applied():
            if self._precision != "fp16":
                raise TrainingError(f"step {self.step + 1}: a gradient is not finite; {_REMEDY}")
            return math.inf
        return norm if self.stage == 0 else float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> LossOutput:
        """The loss of one batch in evaluation mode. Collective under ZeRO-3: every rank calls it equally often."""
        self.module.eval()
        output: LossOutput = self._engine(batch.to(self.device))
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

        averaged: the moving average in their place.
        """
        if averaged:
            self._required_average().swap()
        gathered = {}
        for name, parameter in self._trained.items():
            full = self._masters.full(parameter)
            if self.mesh.world.rank == 0:
                gathered[name] = full.to("cpu", copy=True)
        if averaged:
            self._required_average().swap()
        return split_parameters(self._layouts, gathered) if self.mesh.world.rank == 0 else None

    @contextmanager
    def generation_model(self, averaged: bool) -> Iterator[Generative]:
        """The whole model in evaluation mode, for any number of calls on each rank. Collective on both ends."""
        with self.averaged_weights() if averaged else nullcontext():
            if self._shape is not None:
                whole = {
                    name: self._masters.gather_compute_weights(parameter) for name, parameter in self._model.named_parameters()
                }
                yield cast("Generative", filled_copy(self._shape, whole))
            else:
                self.module.eval()
                try:
                    yield cast("Generative", self._model)
                finally:
                    self.module.train()

    def close(self) -> None:
        """Print what DeepSpeed's communication log has counted, if the JSON asks for it; release objective and engine."""
        if self._comms_logger:
            self._deepspeed.comm.log_summary()
        self.module.objective.close()
        self._engine.destroy()

    def save_shards(self, directory: Path) -> None:
        """Write this rank's part of everything that a bit-exact resume needs; no rank waits for another.

        Raises CheckpointError where the disk refuses.
        """
        if self.stage > 0 or self.mesh.world.rank == 0:
            average = [] if self._average is None else self._average.tensors
            selection = self.module.objective.selection
            objective = {} if selection is None else selection.state()
            content = {"step": self.step, "average": average, "objective": objective, **self._masters.state()}
            write_shard(self._shard(directory), content)
        if self.mesh.world.rank == 0:
            write_shard(directory / SETTING, self._setting())

    def load_shards(self, directory: Path) -> None:
        """Read it back, bit for bit. Collective.

        Raises CheckpointError, on every rank, where a file is damaged or another setting has written it.
        """
        problem, shard = "", {}
        try:
            self._compare(directory, read_shard(directory / SETTING))
            shard = read_shard(self._shard(directory))
        except CheckpointError as error:
            problem = str(error)
        problems = [found for found in self.mesh.world.gather_objects(problem) if found]
        if problems:
            raise CheckpointError(problems[0])
        self._masters.load_state(shard)
        if self._average is not None:
            self._average.load(shard["average"])
        if (selection := self.module.objective.selection) is not None:
            selection.load_state(shard["objective"])
        self.step = shard["step"]

    def _shard(self, directory: Path) -> Path:
        """Without partitions all ranks are equal, so one file serves them."""
        return directory / f"shard_{self.mesh.world.rank if self.stage > 0 else 0:05d}.pt"

    def _setting(self) -> dict[str, object]:
        """What must be equal for shards to fit. Stages 1 and 2 partition alike."""
        return {
            "world_size": self.mesh.world.size,
            "partitions": {0: "none", 1: "optimizer", 2: "optimizer", 3: "parameters"}[self.stage],
            "precision": self._precision,
            "moving_average": self._average is not None,
            "base": self._base,
        }

    def _compare(self, directory: Path, saved: dict[str, object]) -> None:
        running = self._setting()
        different = [name for name in running if saved.get(name) != running[name]]
        if different:
            then, now = (", ".join(f"{name} = {facts.get(name)}" for name in different) for facts in (saved, running))
            raise CheckpointError(
                f"{directory} was saved with {then}, but this run has {now}; resume with what it was saved with, or start a new "
                "run from its last bundle"
            )

    def _required_average(self) -> MovingAverage:
        if self._average is None:
            raise ValueError("there is no moving average; give TrainEngine an EmaConfig")
        return self._average


_REMEDY = "lower the learning rate, warm up longer, or set engine.clip_norm"


def _profiles(config: dict[str, Any]) -> bool:
    sections = (config.get("comms_logger", {}), config.get("flops_profiler", {}))
    return any(section.get("enabled", False) for section in sections) or config.get("wall_clock_breakdown", False)
