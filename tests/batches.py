"""Batches of lists of ids, by the collator that training uses."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstrain.batch import Batch, ModelKind, Sequences
from dstrain.data.batching.collate import Collator
from dstrain.data.ragged import Ragged
from dstrain.model_output import ActivationCapture

PAD, EOS = 1, 2

IGNORE_INDEX = -100
"""The label of a position that no loss counts, as `torch.nn.functional.cross_entropy` has it."""


def collate(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    kind: ModelKind = "encoder_decoder",
    ids: Sequence[int] | None = None,
    **options: Any,
) -> Batch:
    """Pairs of source and target, each ending in EOS; none make the empty micro-batch. ids: lines of the data set, 0, 1, ...

    options: of the `Collator`.
    """
    collator = Collator(kind, pad_id=PAD, eos_id=EOS, **options)
    examples = [(np.array(source), np.array(target)) for source, target in pairs]
    numbers = np.array(range(len(pairs)) if ids is None else ids, np.int64)
    return collator(examples, numbers)


def labels_of(batch: Batch) -> Tensor:
    """The label of each position of the decoder, (B, T); `IGNORE_INDEX` where nothing is scored."""
    labels = torch.full_like(batch.target.tokens, IGNORE_INDEX)
    labels.view(-1)[batch.targets.index] = batch.targets.labels
    return labels


def recorded(source: Sequences, inputs: Sequences, labels: Tensor) -> Batch:
    """The batch of padded tensors that were computed elsewhere. labels: (B, T), `PAD` where nothing is scored."""
    sources = [row[:length].tolist() for row, length in zip(source.tokens, source.lengths, strict=True)]
    batch = collate(list(zip(sources, [row[row != PAD].tolist() for row in labels], strict=True)))
    assert batch.source is not None
    assert torch.equal(batch.source.tokens, source.tokens)
    assert torch.equal(batch.target.tokens, inputs.tokens)
    return batch


def rows_of(sequences: Sequences) -> Ragged:
    """The real tokens of each row."""
    return Ragged.of([row[:length].tolist() for row, length in zip(sequences.tokens, sequences.lengths, strict=True)])


def decoder_hidden(model: Any, source: Sequences, target: Sequences, capture: ActivationCapture | None = None) -> Tensor:
    """(B, T, D) after the tokens of padded sequences, 0 after padding, as a model of either kind reads them.

    A source ends in EOS, whatever its last id is.
    """
    collator = Collator(model.kind, pad_id=PAD, eos_id=EOS)
    reading = collator.read(rows_of(source), rows_of(target))
    hidden = model(reading.source, reading.target, capture).hidden.flatten(0, 1)
    real = torch.arange(target.tokens.shape[1]) < target.lengths[:, None]
    return hidden.new_zeros(*target.tokens.shape, hidden.shape[1]).masked_scatter(
        real[..., None], hidden[torch.from_numpy(reading.target_index)]
    )
