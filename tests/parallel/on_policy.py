"""What the ranks do with steps on the student's own samples; each scenario returns JSON, which the tests assert in the parent."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import PlannedStep
from dstrain.distillation.config import OnPolicyConfig
from dstrain.distillation.on_policy import OnPolicySteps, OwnSamples
from dstrain.engine.training_engine import TrainEngine
from dstrain.generation.constraints import SpecialIds
from dstrain.parallel.mesh import Mesh
from tests.batches import EOS, PAD, collate
from tests.parallel.distilling import queues, student
from tests.parallel.setting import load, num_targets, packed_on, save, sentences

Report = dict[str, Any]
KEYS: dict[str, Any] = {"fraction": 0.5, "max_length_ratio": 1.0, "max_length_offset": 6}
OBJECTIVE: dict[str, Any] = {"on_policy": KEYS, "selection": {"kind": "global", "rate": 0.5, "queue_size": 150}}


class Steps:
    """Steps `first` to `last`; the last of two ranks holds one sentence and an empty micro-batch, the first all others."""

    def __init__(self, mesh: Mesh, first: int, last: int) -> None:
        self.mesh, self.range = mesh, range(first, last)

    def __iter__(self) -> Iterator[tuple[PlannedStep, Sequence[Batch]]]:
        for step in self.range:
            pairs = sentences(step)
            rows = list(range(len(pairs)))
            held = [[rows[0:6], rows[6:]]] if self.mesh.data.size == 1 else [[rows[0:6], rows[6:-1]], [rows[-1:], []]]
            batches = [
                collate([pairs[row] for row in part], ids=[row + 100 * step for row in part], packed=packed_on(self.mesh))
                for part in held[self.mesh.data.rank]
            ]
            yield PlannedStep(1, step, np.arange(len(pairs)), num_targets(pairs), last_of_epoch=False), batches

    def close(self) -> None:
        """Nothing is held."""


def train(mesh: Mesh, engine: TrainEngine, first: int, last: int) -> list[Report]:
    """Reports of the steps, each with whether it was on samples, this rank's micro-batches, and its samples by example."""
    own_samples = OwnSamples(
        config=OnPolicyConfig(**KEYS),
        student=lambda: engine.generation_model(averaged=False),
        ranks=mesh.data,
        sequence=mesh.sequence,
        ids=SpecialIds(pad=PAD, eos=EOS, unk=3),
        max_length=30,
        collator=Collator("encoder_decoder", pad_id=PAD, eos_id=EOS, packed=packed_on(mesh)),
        max_tokens=40,
        seed=11,
        device=mesh.device,
        beat=lambda phase: None,
    )
    found = []
    for planned, batches in OnPolicySteps(Steps(mesh, first, last), own_samples):
        report = asdict(engine.train_step(batches, planned.size))
        samples = {
            str(number): batch.targets.labels[batch.targets.example_id == number].tolist()
            for batch in batches
            if batch.sampled
            for number in batch.examples.ids.tolist()
        }
        found.append({**report, "micro_batches": len(batches), "sampled": batches[0].sampled, "samples": samples})
    return found


def on_policy(mesh: Mesh, *, shards: str, deepspeed: str, placement: str) -> Report:
    """Four steps at once, and two saved and continued by another engine; a step on samples is in each half."""
    options = {"objective": OBJECTIVE, "deepspeed": deepspeed, "placement": placement, "ema": {"decay": 0.7}}
    straight, writer = student(mesh, **options), student(mesh, **options)
    curve, found = train(mesh, straight, 1, 5), train(mesh, writer, 1, 3)
    save(writer, Path(shards))
    continued = student(mesh, **options)
    load(continued, Path(shards))
    found += train(mesh, continued, 3, 5)
    return {"curve": curve, "queue": queues(straight)["0"], "resumed": found, "resumed_queue": queues(continued)["0"]}
