"""A tiny translation task: the model, its batches and an engine, the same on any number of ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dstrain.batch import IGNORE_INDEX, Batch, Sequences
from dstrain.engine.config import AdamConfig, ConstantSchedule, EmaConfig, EngineConfig
from dstrain.engine.deepspeed_engine import TrainEngine
from dstrain.models.config import EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.parallel.topology import World

PAD, EOS = 1, 2
SENTENCES = 12


class TrainModule(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        from dstrain.ops.linear_cross_entropy import linear_cross_entropy
        from dstrain.protocols import LossOutput

        out = self.model(batch.source, batch.target)
        h = out.hidden.flatten(0, 1)
        l, n = self.model.reduce_projection(
            h, lambda f, w: linear_cross_entropy(f, w, batch.labels.flatten(), label_smoothing=0.1, chunk_tokens=64)
        )
        return LossOutput(l, batch.num_targets, {"nll": n.detach()})


def build_module(dropout: float = 0.0) -> TrainModule:
    stack = StackConfig(depth=2, num_heads=2, ffn_dim=48)
    config = EncoderDecoderConfig(
        model_dim=24, encoder=stack, decoder=stack, norm_order="pre", dropout=dropout, embedding=PlainEmbedding(tie="all")
    )
    return TrainModule(build_model(config, VocabularySizes(source=37, target=37), seed=1))


def build_engine(world: World, module: nn.Module, **options: Any) -> TrainEngine:
    """options: deepspeed, precision, clip_norm, ema, optimizer (a dict)."""
    return TrainEngine(
        module,
        optimizer=AdamConfig(**{"learning_rate": 1e-3, **options.get("optimizer", {})}),
        schedule=ConstantSchedule(warmup_steps=4),
        engine=EngineConfig(
            deepspeed=options.get("deepspeed", "zero1"),
            precision=options.get("precision", "fp32"),
            clip_norm=options.get("clip_norm", 0.0),
        ),
        ema=EmaConfig(**options["ema"]) if options.get("ema") else None,
        seed=7,
        world=world,
    )


def sentences(step: int) -> list[tuple[list[int], list[int]]]:
    """The sentence pairs of a step, of unequal lengths: the target repeats the source, shifted by one token."""
    generator = torch.Generator().manual_seed(1000 + step)
    pairs = []
    for _ in range(SENTENCES):
        length = int(torch.randint(1, 11, (), generator=generator))
        source = torch.randint(4, 36, (length,), generator=generator).tolist()
        pairs.append(([*source, EOS], [*(token + 1 for token in source), EOS]))
    return pairs


def collate(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Padded sentences; none at all make an empty micro-batch, which adds nothing."""
    num_targets = sum(len(target) for _, target in pairs)
    rows = pairs or [([EOS], [])]
    return Batch(
        source=padded([source for source, _ in rows]),
        target=padded([[EOS, *target[:-1]] for _, target in rows]),
        labels=padded([target or [IGNORE_INDEX] for _, target in rows], IGNORE_INDEX).tokens,
        num_targets=num_targets,
        example_ids=torch.arange(len(rows)),
    )


def padded(rows: Sequence[list[int]], value: int = PAD) -> Sequences:
    """Right-padded rows."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), value)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return Sequences(tokens, lengths)


def share(step: int, world: World, parts: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches where the step's sentences are cut into `parts` in all, and the step's target tokens."""
    pairs = sentences(step)
    cut = [pairs[index::parts] for index in range(parts)]
    return [collate(part) for part in cut[world.rank :: world.world_size]], sum(len(target) for _, target in pairs)
