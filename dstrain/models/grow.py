"""Models of a larger vocabulary: every token table and projection gets a row for each new entry; all other weights stay.

A new row is the mean of the old ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"): a new
entry then has the mean logit, so that it takes little from the old ones, whose rows and logits stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import canonical_shapes, parameter_layouts
from dstrain.protocols import WeightSource

EntryRows = Sequence[int | None]
"""For each new entry the old one that it is, None if it is none."""


def grown_weights(
    config: ModelConfig, vocabulary: VocabularySizes, weights: WeightSource, *, source: EntryRows, target: EntryRows
) -> dict[str, Tensor]:
    """The weights of the larger model by canonical name, in the dtypes of `weights`.

    vocabulary: after growth. source, target: of the entries of each side; alike if both share their embeddings.
    """
    needed = canonical_shapes(parameter_layouts(build_model(config, vocabulary, seed=None)))
    grown = {}
    for name in weights.names():
        tensor = weights.read(name)
        if needed.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            tensor = _with_rows(tensor, source if name.startswith("source_embedding.") else target)
        grown[name] = tensor
    return grown


def _with_rows(table: Tensor, rows: EntryRows) -> Tensor:
    """(V, E) -> (len(rows), E)"""
    grown = table.float().mean(0).to(table.dtype).repeat(len(rows), 1)
    kept = [row for row, old in enumerate(rows) if old is not None]
    grown[kept] = table[torch.tensor([old for old in rows if old is not None])]
    return grown
