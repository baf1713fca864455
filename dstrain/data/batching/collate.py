"""Examples -> `Batch`: one `Collator` pads or packs, joins both sides for decoder-only models and shifts labels by one.

A decoder reads a start token, mostly EOS, and then its target, one token behind the labels. A decoder-only model reads both sides
as one sequence, in which the start token stands in the place of the source's EOS; a source that is a lone EOS adds nothing.
Everything is counted here, on the CPU, so that nothing later waits for a GPU.

Choice: all source or target tokens are written at once through computed indices; no loop over examples. 264 pairs of 15 tokens
take half a millisecond.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from dstrain.batch import Batch, CorpusTargets, ExampleSpans, ModelKind, Packing, Sequences, Targets
from dstrain.data.batching.permutation import IntArray
from dstrain.data.prepared.dataset import Example
from dstrain.data.ragged import Ragged, positions_of, starts_of

Ids = npt.NDArray[np.integer[Any]]
"""(length,) token ids of one side of an example, ending in EOS."""


@dataclass(frozen=True)
class TokenBlock:
    """Documents, whole or in part, as one example of a decoder-only model.

    row: line of the data set that its first token is of. inputs: (t,) the token before each label. labels: (t,).
    sequences: (s,) tokens of the sequences that it is read as; they add up to t.
    """

    row: int
    inputs: Ids
    labels: Ids
    sequences: IntArray


ExampleIds = Sequence[Example | tuple[Ids, Ids]] | Sequence[TokenBlock]
"""Of a batch: examples, or pairs of source and target; or blocks."""


class Corpora(Protocol):
    """Which corpus a line of the data set belongs to, as `NamedCorpora` knows it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all corpora."""
        ...

    def of(self, rows: IntArray) -> IntArray:
        """Index into `names` of each line. (n,) -> (n,)"""
        ...


_KEY_BITS = 22
"""Of a token's key for side and position: longer sequences repeat keys of the next example, which does no harm."""


class PackedSize(NamedTuple):
    """How many tokens packed sequences are padded to: a multiple of this number."""

    multiple: int = 1

    def of(self, num_tokens: int) -> int:
        """For so many real tokens."""
        return -(-num_tokens // self.multiple) * self.multiple


class ModelInputs(NamedTuple):
    """The inputs of a model. source: None for a decoder-only model.

    source_start: (b,) index of each source in the flattened tokens that hold it. target_index: (n,) index of each decoder input
    of a target in the flattened decoder tokens, example by example.
    """

    source: Sequences | None
    target: Sequences
    source_start: IntArray
    target_index: IntArray


class _Sides(NamedTuple):
    """The tokens of a batch. rows: (b,) line of the data set of each example. sequences: as of `TokenBlock`; None = one each."""

    sources: Ragged
    inputs: Ragged
    labels: Ragged
    rows: IntArray
    sequences: IntArray | None = None


class Collator:
    """Makes the batches of one model.

    kind: how the model reads an example. start_id: in front of every target whose example names no other, None = eos_id.
    teacher_kinds: of the teachers that read the same batches; if one is not `kind`, a batch has it as `other`. packed: None for
    padded rows. corpora: of the examples, for losses by corpus; None if one is all there is.
    """

    def __init__(
        self,
        kind: ModelKind,
        *,
        pad_id: int,
        eos_id: int,
        start_id: int | None = None,
        teacher_kinds: Collection[ModelKind] = (),
        packed: PackedSize | None = None,
        corpora: Corpora | None = None,
    ) -> None:
        self.kind = kind
        self.packed = packed
        self.pad_id = pad_id
        self.start_id = eos_id if start_id is None else start_id
        self.kinds = dict.fromkeys((kind, *teacher_kinds))
        self.corpora = corpora

    def __call__(self, examples: ExampleIds, example_ids: IntArray, *, sampled: bool = False) -> Batch:
        """A batch of examples, of pairs of source and target, or of blocks.

        example_ids: (b,) lines of the data set, or numbers of blocks. No examples make the empty micro-batch: one sequence, a
        lone EOS on both sides, of which nothing is scored.
        """
        ids = np.array(example_ids, np.int64)  # a copy: the plan hands out views of its window
        sources, inputs, labels, rows, sequences = self._sides(examples, ids)
        one_token = Ragged.of([[self.start_id]])
        lengths = torch.from_numpy(labels.lengths)
        corpora = None if self.corpora is None else _corpus_targets(self.corpora, rows, labels.lengths)

        def batch(kind: ModelKind) -> Batch:
            reading = self._read(kind, *((sources, inputs) if examples else (one_token, one_token)), ids, sequences)
            # an empty micro-batch has a sequence, but neither an example nor a target
            start, index = reading.source_start[: len(ids)], reading.target_index[: len(labels.tokens)]
            targets = Targets(
                index=torch.from_numpy(index),
                labels=torch.from_numpy(labels.tokens),
                weight=lengths.reciprocal().repeat_interleave(lengths),
                example_id=torch.from_numpy(np.repeat(ids, labels.lengths)),
                position=torch.from_numpy(positions_of(labels.lengths)),
                segment=torch.from_numpy(np.repeat(np.arange(len(ids)), labels.lengths)),
            )
            spans = ExampleSpans(torch.from_numpy(ids), torch.from_numpy(start), torch.from_numpy(sources.lengths), lengths)
            return Batch(reading.source, reading.target, targets, spans, sampled=sampled, corpora=corpora)

        first, *others = map(batch, self.kinds)
        return replace(first, other=others[0]) if others else first

    def _start_of(self, example: Example | tuple[Ids, Ids]) -> int:
        own = example.start if isinstance(example, Example) else None
        return self.start_id if own is None else own

    def read(self, sources: Ragged, inputs: Ragged) -> ModelInputs:
        """Sources, each ending in EOS, and the decoder's inputs, each beginning with a start token, as the model reads them."""
        return self._read(self.kind, sources, inputs, np.arange(len(sources.lengths)))

    def _sides(self, examples: ExampleIds, ids: IntArray) -> _Sides:
        """All tokens of the examples. ids: (b,) of the examples."""
        blocks = [example for example in examples if isinstance(example, TokenBlock)]
        if blocks:
            return _Sides(
                sources=Ragged.of([[self.start_id]] * len(blocks)),
                inputs=Ragged.of([block.inputs for block in blocks]),
                labels=Ragged.of([block.labels for block in blocks]),
                rows=np.array([block.row for block in blocks]),
                sequences=np.concatenate([block.sequences for block in blocks]),
            )
        pairs = [example for example in examples if not isinstance(example, TokenBlock)]
        sources, labels = Ragged.of([pair[0] for pair in pairs]), Ragged.of([pair[1] for pair in pairs])
        shifted = np.roll(labels.tokens, 1)
        shifted[starts_of(labels.lengths)] = [self._start_of(pair) for pair in pairs]
        return _Sides(sources, Ragged(shifted, labels.lengths), labels, ids)

    def _read(
        self, kind: ModelKind, sources: Ragged, inputs: Ragged, ids: IntArray, sequences: IntArray | None = None
    ) -> ModelInputs:
        if kind == "encoder_decoder":
            source, source_index = self._lay_out(sources, ids, side=0)
            target, index = self._lay_out(inputs, ids, side=1)
            return ModelInputs(source, target, source_index[starts_of(sources.lengths)], index)
        before = sources.lengths - 1  # without the EOS: the start token stands there
        sequence = np.empty(before.sum() + len(inputs.tokens), np.int64)
        start = starts_of(before + inputs.lengths)  # of each example in `sequence`
        of_inputs = np.repeat(start + before, inputs.lengths) + positions_of(inputs.lengths)
        is_source = np.ones(len(sequence), np.bool_)
        is_source[of_inputs] = False
        sequence[of_inputs] = inputs.tokens
        sequence[is_source] = np.delete(sources.tokens, np.cumsum(sources.lengths) - 1)
        target, index = self._lay_out(Ragged(sequence, before + inputs.lengths), ids, side=1, sequences=sequences)
        return ModelInputs(None, target, index[start], index[of_inputs])

    def _lay_out(
        self, ragged: Ragged, ids: IntArray, *, side: int, sequences: IntArray | None = None
    ) -> tuple[Sequences, IntArray]:
        """The sequences as the model reads them, and the index of each token among their flattened tokens.

        ragged: of the examples. sequences: lengths of what they are read as, None for an example each.
        """
        keys = _keys(ids, ragged.lengths, positions_of(ragged.lengths), side)
        if sequences is not None:
            ragged = Ragged(ragged.tokens, sequences)
        lengths, positions = ragged.lengths, positions_of(ragged.lengths)
        if self.packed is not None:
            return _pack(ragged, positions, keys, self.packed.of(len(positions)), self.pad_id), np.arange(len(positions))
        shape = len(lengths), int(lengths.max())
        index = np.repeat(np.arange(len(lengths)) * shape[1], lengths) + positions

        def written(values: IntArray, fill: int) -> torch.Tensor:
            flat = np.full(shape[0] * shape[1], fill, np.int64)
            flat[index] = values
            return torch.from_numpy(flat.reshape(shape))

        return Sequences(written(ragged.tokens, self.pad_id), torch.from_numpy(lengths), keys=written(keys, 0)), index


def _keys(ids: IntArray, lengths: IntArray, positions: IntArray, side: int) -> IntArray:
    """A number for each token of the data set: of its example, its place there, and its side. An empty batch has no examples."""
    examples = np.repeat(ids, lengths) if len(ids) else np.zeros(len(positions), np.int64)
    return (examples << _KEY_BITS) + (positions << 1) + side


def _corpus_targets(corpora: Corpora, ids: IntArray, target_lengths: IntArray) -> CorpusTargets:
    index = np.repeat(corpora.of(ids), target_lengths)
    counts = np.bincount(index, minlength=len(corpora.names))
    return CorpusTargets(corpora.names, torch.from_numpy(index), tuple(counts.tolist()))


def _pack(ragged: Ragged, positions: IntArray, keys: IntArray, size: int, pad_id: int) -> Sequences:
    """The sequences one after another, padded to `size` tokens."""
    count, number, lengths = len(positions), len(ragged.lengths), ragged.lengths

    def padded(values: IntArray, fill: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([values, np.full(size - count, fill, np.int64)]))

    packing = Packing(
        positions=padded(positions, 0),
        segments=padded(np.repeat(np.arange(number), lengths), number),
        starts=torch.from_numpy(np.concatenate(([0], lengths)).cumsum(dtype=np.int32)),
        longest=int(lengths.max()),
        num_tokens=count,
    )
    return Sequences(padded(ragged.tokens, pad_id), torch.from_numpy(lengths), packing, padded(keys, 0))
