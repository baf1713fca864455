"""Scenarios of training adapters; `tests/parallel/scenarios.py` makes them known to the workers."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.checkpoint.manifest import read_manifest
from dstrain.checkpoint.reader import StoredCheckpoint
from dstrain.engine.config import AdamConfig, ConstantSchedule, EmaConfig, EngineConfig
from dstrain.engine.training_engine import TrainEngine
from dstrain.errors import CheckpointError
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, FactorizedEmbedding, PlainEmbedding, StackConfig
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh
from tests.batches import collate
from tests.parallel.setting import VOCABULARY, load, padded, save, sentences, share

BASE = "f" * 64
PLAIN, FACTORIZED = PlainEmbedding(tie="all"), FactorizedEmbedding(tie="all", dim=12, activation="gelu")
STACK: dict[str, Any] = {"depth": 2, "unique_layers": 1, "num_heads": 2, "ffn_dim": 48}


def adapted_module(*, factorized: bool, dropout: float = 0.0, **adapter: Any) -> TrainModule:
    """A tied model with a stacked layer, the same on every call, with adapters everywhere."""
    config = EncoderDecoderConfig(
        model_dim=24,
        encoder=StackConfig(**STACK),
        decoder=DecoderStackConfig(**STACK),
        norm_order="pre",
        dropout=dropout,
        embedding=FACTORIZED if factorized else PLAIN,
    )
    model = build_model(config, VOCABULARY, projections="separate", seed=1)
    settings = LoraConfig(**{"rank": 3, "alpha": 6, "dropout": dropout, "targets": ["*"], **adapter})
    load_canonical(model, inject(model, settings, TensorSource(to_canonical(model)), seed=5))
    freeze(model, settings)
    return TrainModule(model, CrossEntropy(CrossEntropyConfig(chunk_tokens=16)))


def adapting_engine(mesh: Mesh, module: TrainModule, *, base: str = BASE, ema: bool = False, **names: Any) -> TrainEngine:
    """An engine over an adapted module. names: deepspeed and precision."""
    return TrainEngine(
        module,
        optimizer=AdamConfig(learning_rate=0.01, kind="adamw", weight_decay=0.1),
        schedule=ConstantSchedule(warmup_steps=2),
        engine=EngineConfig(clip_norm=1.0, **names),
        ema=EmaConfig(decay=0.7) if ema else None,
        seed=7,
        mesh=mesh,
        base=base,
    )


def adapted_curves(mesh: Mesh, *, runs: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Each run's reports, whether the base stayed, what was gathered, and generation by the engine's whole model."""
    found = []
    for run in runs:
        module = adapted_module(**run["model"])
        before = {name: value.clone() for name, value in to_canonical(module.model).items()}
        engine = adapting_engine(mesh, module, deepspeed=run["deepspeed"])
        reports = [asdict(engine.train_step(*share(step, mesh, 4))) for step in range(steps)]
        gathered = mesh.world.broadcast_object(engine.gather_weights(averaged=False))
        source = padded([source for source, _ in sentences(5)[:3]], 1)
        with engine.generation_model(averaged=False) as model, torch.no_grad():
            state = model.start(source, num_sentences=3, rows_per_sentence=1, max_length=4)
            logits = model.step(torch.full((3, 1), 7), state)
            after = to_canonical(model)
        found.append(
            {
                "reports": reports,
                "names": sorted(gathered),
                "kept": all(torch.equal(after[name], before[name]) for name in before if name not in gathered),
                "moved": all(not torch.equal(gathered[name], before[name]) for name in gathered),
                "logits": logits.flatten()[:50].tolist(),
                "evaluated": float(engine.evaluate(collate(sentences(99))).loss_sum),
            }
        )
        engine.close()
    return found


def adapted_resume(mesh: Mesh, *, shards: str, deepspeed: str) -> dict[str, Any]:
    """Four steps at once, and two saved and continued by another engine; dropout and averaging are on."""

    def engine() -> TrainEngine:
        module = adapted_module(factorized=False, dropout=0.3, dora=True, bias="all")
        return adapting_engine(mesh, module, deepspeed=deepspeed, ema=True)

    straight, writer = engine(), engine()
    expected = [asdict(straight.train_step(*share(step, mesh, 4))) for step in range(4)]
    found = [asdict(writer.train_step(*share(step, mesh, 4))) for step in range(2)]
    path = save(writer, Path(shards))
    continued = engine()
    load(continued, Path(shards))
    found += [asdict(continued.train_step(*share(step, mesh, 4))) for step in range(2, 4)]
    weights = [each.gather_weights(averaged=averaged) or {} for each in (straight, continued) for averaged in (False, True)]
    return {
        "expected": expected,
        "found": found,
        "same": all(torch.equal(weights[0][n], weights[2][n]) and torch.equal(weights[1][n], weights[3][n]) for n in weights[0]),
        "averaged_apart": any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "stored": sorted(StoredCheckpoint(path, read_manifest(path)).names("master")),
        "trained": sorted(weights[0]),
    }


def other_base(mesh: Mesh, *, shards: str) -> str:
    """What an engine on another base says about a checkpoint."""
    writer = adapting_engine(mesh, adapted_module(factorized=False), deepspeed="zero1")
    save(writer, Path(shards))
    other = adapting_engine(mesh, adapted_module(factorized=False), deepspeed="zero1", base="0" * 64)
    return message_of(lambda: load(other, Path(shards)))


def message_of(action: Callable[[], object]) -> str:
    """The message of the CheckpointError that the action raises."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""
