"""Stand-ins for the layers below the trainer: an engine of one number per rank, a plan of seven steps an epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstrain.batch import Batch, Metrics, Size
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.data.batching.plan import PlannedStep
from dstrain.engine.loss_totals import StepReport
from dstrain.fragment import Fragment, StoredState
from dstrain.parallel.group import Group
from dstrain.parallel.mesh import Mesh
from dstrain.training.bundles import BundleStore
from dstrain.training.config import CheckpointConfig, ReportingConfig, TrainingConfig, ValidationConfig
from dstrain.training.events import EventFile, read_events
from dstrain.training.preemption import StopSignals
from dstrain.training.reporting import Reporter
from dstrain.training.trainer import Trainer
from dstrain.training.watchdog import Watchdog

ONE_PROCESS = Group.single(torch.device("cpu"))
ONE_RANK = Mesh(ONE_PROCESS, data=ONE_PROCESS, sequence=ONE_PROCESS, tensor=ONE_PROCESS, replicas=ONE_PROCESS, local_rank=0)
STEPS_PER_EPOCH = 7


class FakeEngine:
    """Its weight moves chaotically, so that any repeated, lost or reordered step changes all later losses."""

    def __init__(self) -> None:
        self.weight = 0.3
        self.steps = 0
        self.before_step: Callable[[int], None] = lambda step: None
        self.loss_of: Callable[[int, float], float] = lambda step, loss: loss
        self.skipped: Callable[[int], bool] = lambda step: False

    def train_step(self, batches: Sequence[Batch], size: Size) -> StepReport:
        self.steps += 1
        self.before_step(self.steps)
        self.weight = 3.9 * self.weight * (1 - self.weight) + 1e-3 * size.num_targets / 1000
        loss = self.loss_of(self.steps, self.weight)
        return StepReport(
            step=self.steps,
            loss=loss,
            num_targets=size.num_targets,
            denominator=size.num_targets,
            grad_norm=1.0 + loss,
            learning_rate=0.001 * self.steps,
            skipped=self.skipped(self.steps),
            metrics=Metrics.over(size.num_targets, {"nll": loss / 2 * size.num_targets, "other": loss / 4 * size.num_targets}),
        )

    layout = "1 rank zero0 fp32"
    rank = 0

    def fragments(self) -> list[Fragment]:
        values = torch.tensor([self.weight], dtype=torch.float64)
        return [Fragment("master/weight", (1,), 0, values)] if self.rank == 0 else []

    def scalars(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load(self, stored: StoredState) -> None:
        self.weight, self.steps = float(stored.whole("master")["weight"]), stored.scalars["steps"]

    def sync(self) -> None:
        pass


def steps_from(epoch: int, index: int) -> Generator[tuple[PlannedStep, list[Batch]], None, None]:
    """Every epoch in an order of its own; num_targets tells the place."""
    while True:
        for number in range(index, STEPS_PER_EPOCH):
            examples = np.array([epoch * 100 + number])
            yield PlannedStep(epoch, number, examples, 10 * epoch + number, number == STEPS_PER_EPOCH - 1), []
        epoch, index = epoch + 1, 0


def save_bundle(directory: Path, weights: Mapping[str, torch.Tensor], notes: Mapping[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "weight.json").write_text(json.dumps({"weight": weights["w"].item(), **notes}))


class Setup:
    """One run directory; `trainer` builds what one process would build."""

    def __init__(self, directory: Path, **limits: Any) -> None:
        self.directory = directory
        self.training = TrainingConfig(**{"max_steps": 20, **limits})
        self.validation = ValidationConfig(unit="steps", every=5, generation=None)
        self.checkpoint = CheckpointConfig(unit="steps", every=5)
        self.log_every = 1
        self.engine = FakeEngine()
        self.validated: list[int] = []
        self.scores: Callable[[int, float], float] = lambda step, weight: weight

    def validate(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        if interrupted():
            return None
        self.validated.append(self.engine.steps)
        return {"loss": self.scores(self.engine.steps, self.engine.weight)}

    def trainer(self) -> Trainer:
        self.engine = self.engine if self.engine.steps == 0 else FakeEngine()
        weights = lambda: {"w": torch.tensor(self.engine.weight, dtype=torch.float64)}  # noqa: E731
        return Trainer(
            training=self.training,
            validation=self.validation,
            checkpoint=self.checkpoint,
            reporting=ReportingConfig(log_every=self.log_every),
            ranks=ONE_PROCESS,
            engine=self.engine,
            steps=steps_from,
            validate=self.validate,
            checkpoints=CheckpointManager(
                self.directory / "checkpoints", ONE_PROCESS, keep=self.checkpoint.keep_checkpoints, run_id="test"
            ),
            bundles=BundleStore(
                self.directory / "bundles", ONE_PROCESS, gather=weights, save=save_bundle, keep=self.checkpoint.keep_bundles
            ),
            reporter=Reporter(EventFile(self.directory / "events.jsonl")),
            signals=StopSignals(),
            watchdog=Watchdog(0),
            header={"run_id": "test"},
        )

    def run(self) -> int:
        return self.trainer().run()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.directory / "events.jsonl") if event["kind"] == kind]

    def losses(self) -> list[tuple[int, float]]:
        return [(event["step"], event["loss"]) for event in self.events("train")]
