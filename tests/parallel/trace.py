"""Repeat the predecessor's recorded training runs with dstrain's engine."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstrain.batch import Batch, Sequences
from dstrain.engine.config import AdamConfig, EngineConfig, ScheduleConfig
from dstrain.engine.training_engine import TrainEngine
from dstrain.interop.fairseq.checkpoint import convert, read_fairseq_checkpoint
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, load_canonical
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh
from tests.batches import PAD, collate, recorded
from tests.parallel.setting import size_of


def recorded_batches(golden: Path) -> list[Batch]:
    """The three batches of the recorded runs, right-padded."""
    with np.load(golden / "ref" / "kd" / "io.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    return [
        recorded_batch({key: arrays[f"b{number}.{key}"] for key in ("src_tokens", "prev_output_tokens", "target")})
        for number in range(3)
    ]


def recorded_batch(arrays: dict[str, Tensor]) -> Batch:
    """fairseq pads the source on the left."""
    rows = [row[row != PAD] for row in arrays["src_tokens"]]
    source = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    inputs = Sequences(arrays["prev_output_tokens"], (arrays["target"] != PAD).sum(1))
    return recorded(Sequences(source, (source != PAD).sum(1)), inputs, arrays["target"])


def repeat(
    mesh: Mesh,
    golden: Path,
    *,
    deepspeed: str,
    optimizer: dict[str, Any],
    schedule: ScheduleConfig,
    clip_norm: float = 0.0,
    accumulate: int = 1,
) -> dict[str, Any]:
    """Twelve updates from the recorded start: their reports, and the weights at the end.

    The micro-batches of an update go to the ranks in turn; ranks without one get an empty one.
    """
    config, vocabulary, weights = convert(read_fairseq_checkpoint(golden / "ref" / "a_base" / "checkpoint.pt"))
    model = build_model(config.model_copy(update={"dropout": 0.0}), vocabulary, seed=None)
    load_canonical(model, TensorSource(weights))
    engine = TrainEngine(
        TrainModule(model, CrossEntropy(CrossEntropyConfig(label_smoothing=0.1))),
        optimizer=AdamConfig(betas=(0.9, 0.98), decay="all", kind="adamw", **optimizer),
        schedule=schedule,
        engine=EngineConfig(deepspeed=deepspeed, clip_norm=clip_norm),
        ema=None,
        seed=1,
        mesh=mesh,
    )
    batches, steps = recorded_batches(golden), []
    for update in range(12):
        micro = [batches[(update * accumulate + index) % 3] for index in range(accumulate)]
        mine = micro[mesh.data.rank :: mesh.data.size]
        empty = -(-len(micro) // mesh.world.size) - len(mine)
        report = engine.train_step([*mine, *[collate([])] * empty], size_of(micro))
        steps.append(asdict(report))
    final = engine.gather_weights(averaged=False)
    return {"steps": steps, "weights": {name: tensor.tolist() for name, tensor in (final or {}).items()}}
