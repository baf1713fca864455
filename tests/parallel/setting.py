"""A tiny translation task: the model, its batches and an engine, the same on any number of ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dstrain.batch import Batch, ModelKind, Sequences, Size
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.data.batching.collate import PackedSize
from dstrain.engine.config import AdamConfig, ConstantSchedule, EmaConfig, EngineConfig
from dstrain.engine.training_engine import TrainEngine
from dstrain.models.config import (
    DecoderStackConfig,
    EmbeddingConfig,
    EncoderDecoderConfig,
    PlainEmbedding,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import build_model
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh
from tests.batches import collate

VOCABULARY = VocabularySizes(source=37, target=37)
EOS = VOCABULARY.eos_id
SENTENCES = 12


TIED = PlainEmbedding(tie="all")


def build_module(dropout: float = 0.0, embedding: EmbeddingConfig = TIED, **objective: Any) -> TrainModule:
    """The same weights on every call. objective: what differs from plain cross-entropy."""
    stack: dict[str, Any] = {"depth": 1, "num_heads": 2, "ffn_dim": 48}
    config = EncoderDecoderConfig(
        model_dim=24,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order="pre",
        dropout=dropout,
        embedding=embedding,
    )
    return TrainModule(
        build_model(config, VOCABULARY, seed=1), build_cross_entropy(CrossEntropyConfig(**{"chunk_tokens": 16, **objective}))
    )


def build_engine(mesh: Mesh, module: TrainModule, **options: Any) -> TrainEngine:
    """options: deepspeed, precision, clip_norm, ema, optimizer (the latter two are dicts); Adam without any."""
    names = {name: options[name] for name in ("deepspeed", "precision", "clip_norm") if name in options}
    return TrainEngine(
        module,
        optimizer=AdamConfig(**{"learning_rate": 0.005, "kind": "adam", **options.get("optimizer", {})}),
        schedule=ConstantSchedule(warmup_steps=4),
        engine=EngineConfig(**names),
        ema=EmaConfig(**options["ema"]) if "ema" in options else None,
        seed=7,
        mesh=mesh,
    )


def save(engine: TrainEngine, directory: Path, *, keep: int = 1) -> Path:
    """Write a checkpoint of the engine, as training does. Collective."""
    return manager_of(engine, directory, keep=keep).save(engine.step, engine, {})


def load(engine: TrainEngine, directory: Path) -> None:
    """Read the newest checkpoint back. Collective."""
    assert manager_of(engine, directory).load_latest(engine) is not None


def manager_of(engine: TrainEngine, directory: Path, *, keep: int = 1) -> CheckpointManager:
    """What writes and reads checkpoints of the engine."""
    return CheckpointManager(directory / "checkpoints", engine.mesh.world, keep=keep, run_id="run")


def sentences(step: int) -> list[tuple[list[int], list[int]]]:
    """The sentence pairs of a step, of unequal lengths: the target is the source with every token raised by one."""
    generator = torch.Generator().manual_seed(1000 + step)
    pairs = []
    for _ in range(SENTENCES):
        length = int(torch.randint(1, 11, (), generator=generator))
        source = torch.randint(4, 36, (length,), generator=generator).tolist()
        pairs.append(([*source, EOS], [*(token + 1 for token in source), EOS]))
    return pairs


def padded(rows: Sequence[list[int]], value: int) -> Sequences:
    """Right-padded rows."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return Sequences(tokens, lengths)


def packed_on(mesh: Mesh) -> PackedSize | None:
    """For the batches of a mesh: with padding that only the last sequence ranks have; None for padded ones."""
    return None if mesh.sequence.size == 1 else PackedSize(multiple=8 * mesh.sequence.size)


def num_targets(pairs: Sequence[tuple[list[int], list[int]]]) -> int:
    """Target tokens of the pairs."""
    return sum(len(target) for _, target in pairs)


def size_of(batches: Sequence[Batch]) -> Size:
    """What the batches hold together."""
    return Size(sum(batch.num_targets for batch in batches), sum(batch.size.num_sentences for batch in batches))


def share(step: int, mesh: Mesh, parts: int, kind: ModelKind = "encoder_decoder") -> tuple[list[Batch], Size]:
    """This rank's micro-batches where the step's sentences are cut into `parts` in all, and the step's size."""
    pairs = sentences(step)
    cut = [collate(pairs[index::parts], kind=kind, ids=range(len(pairs))[index::parts]) for index in range(parts)]
    return cut[mesh.data.rank :: mesh.data.size], Size(num_targets(pairs), len(pairs))
