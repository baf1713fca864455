"""The data of models, losses and reports: `Sequences`, `Targets`, `Batch`, `Metrics`. A batch is never a dict.

Sequences are padded, one a row, (B, T), or packed, one after another without rows, (N,). Layers compute on the last dimension
and do not know which; attention does. The `Collator` makes every batch, on the CPU, with all counts: models and objectives never
join, shift or recount. Shapes: B rows, S source, T target, N packed tokens, b sequences or examples, n scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from dstrain.wire import PinnedTensors, sent

ModelKind = Literal["encoder_decoder", "decoder_only"]
"""How a model reads an example: source and target in a stack each, or both as one sequence."""

Number = TypeVar("Number", Tensor, float)
Move = Callable[[Tensor], Tensor]


class Size(NamedTuple):
    """How much a batch, a step or a split holds: its scored target tokens, and the sentences that they make up.

    A loss is a mean over one of the two; `Objective.denominator` says over which.
    """

    num_targets: int
    num_sentences: int


class RowIndex(NamedTuple):
    """Where packed tokens stand in padded rows of `width` cells each, and the other way round.

    cells: (m,) the cell of each real token, of b * width. tokens: (b * width,) the token at each cell, any one at padding.
    padding: the cells without a token.
    """

    cells: Tensor
    tokens: Tensor
    padding: Tensor
    width: int


@dataclass(frozen=True)
class Packing:
    """How N packed tokens are cut into b sequences. After the last sequence there may be padding, which no token sees.

    positions: (N,) int64, 0, 1, 2, ... in each sequence, 0 at padding. segments: (N,) int64, the number of each token's
    sequence, b at padding. starts: (b + 1,) int32, where each sequence starts, and where the last one ends. longest: tokens of
    the longest. num_tokens: without padding. first: the token that `Sequences.tokens` begin with, if they are a share.
    """

    positions: Tensor
    segments: Tensor
    starts: Tensor
    longest: int
    num_tokens: int
    first: int = 0

    @cached_property
    def rows(self) -> RowIndex:
        """The same sequences as padded rows."""
        real = slice(self.num_tokens)
        tokens = self.starts[:-1, None].long() + torch.arange(self.longest, device=self.starts.device)  # (b, width)
        is_padding, count = tokens >= self.starts[1:, None], tokens.numel() - self.num_tokens
        return RowIndex(
            cells=self.segments[real] * self.longest + self.positions[real],
            tokens=tokens.clamp(max=self.num_tokens - 1).flatten(),
            padding=torch.nonzero_static(is_padding.flatten(), size=count)[:, 0],  # without waiting for a GPU
            width=self.longest,
        )

    @property
    def token_lengths(self) -> Tensor:
        """(N,) tokens of the sequence of each token; of the last one at padding."""
        return self.starts.diff().long()[self.segments.clamp(max=len(self.starts) - 2)]


@dataclass(frozen=True)
class Sequences:
    """Token sequences, each in a right-padded row, or packed.

    tokens: (B, S) int64, the tokenizer's pad id after `lengths`; packed (N,), with the pad id at the end, or a share of them.
    lengths: (B,) int64, real tokens of each sequence; 0 for a row of padding only.
    packing: None for rows.
    keys: of the shape of all tokens, int64, a number for each token of the data set, by which dropout is counted; None for none.
    """

    tokens: Tensor
    lengths: Tensor
    packing: Packing | None = None
    keys: Tensor | None = None

    @property
    def positions(self) -> int | Tensor:
        """Of the tokens: 0 for rows, whose columns count from there; (N,) if packed."""
        return 0 if self.packing is None else self.packing.positions[self.own]

    @property
    def own(self) -> slice:
        """Which of all tokens these are."""
        return slice(None) if self.packing is None else slice(self.packing.first, self.packing.first + len(self.tokens))

    @property
    def is_share(self) -> bool:
        """Whether other ranks have the other tokens."""
        return self.packing is not None and len(self.tokens) < len(self.packing.positions)

    @property
    def end_position(self) -> int:
        """All positions are below it."""
        return self.tokens.shape[1] if self.packing is None else self.packing.longest

    def to(self, device: torch.device) -> Sequences:
        """The same sequences on `device`."""
        return self.moved(partial(sent, device=device))

    def moved(self, move: Move) -> Sequences:
        """The same sequences in other memory."""
        packing = None if self.packing is None else replace(self.packing, **_moved(self.packing, move))
        return replace(self, packing=packing, **_moved(self, move))

    def share(self, rank: int, size: int) -> Sequences:
        """The tokens of one of `size` ranks, as many for each; lengths, packing and keys stay those of all."""
        if self.packing is None or len(self.tokens) % size:
            raise ValueError(f"{tuple(self.tokens.shape)} tokens cannot be shared by {size} ranks; pack them in a multiple of it")
        count = len(self.tokens) // size
        packing = replace(self.packing, first=rank * count)
        return replace(self, tokens=self.tokens[rank * count :][:count], packing=packing)


def _moved(value: Sequences | Packing, move: Move) -> dict[str, Any]:
    return {name: move(tensor) for name, tensor in vars(value).items() if isinstance(tensor, Tensor)}


@dataclass(frozen=True)
class Targets:
    """The scored tokens of a batch: example by example, in the order of their positions.

    index: (n,) int64, the index of its prediction in the decoder's outputs, (B * T) flattened or (N).
    labels: (n,) int64, the tokens to predict.
    weight: (n,) float32, 1 / (scored tokens of its example): by it a mean over sentences counts a token.
    example_id: (n,) int64, line of the data set, or number of a block. position: (n,) int64, number in the target from 0.
    segment: (n,) int64, number of its example in the batch. These three stay on the CPU, for lookups by example.
    """

    index: Tensor
    labels: Tensor
    weight: Tensor
    example_id: Tensor
    position: Tensor
    segment: Tensor

    def __getitem__(self, targets: slice) -> Targets:
        """Some of them."""
        return Targets(**{name: value[targets] for name, value in vars(self).items()})

    def moved(self, move: Move) -> Targets:
        """The same targets, with `index`, `labels` and `weight` in other memory."""
        return replace(self, index=move(self.index), labels=move(self.labels), weight=move(self.weight))


@dataclass(frozen=True)
class ExampleSpans:
    """The b examples of a batch, in the order of its sequences; (b,) int64 each, always on the CPU.

    ids: lines of the data set, or numbers of blocks, of which each may be several sequences. source_start: the first source
    token in the flattened tokens of `Batch.reading`. source_length, target_length: tokens, the final EOS included.
    """

    ids: Tensor
    source_start: Tensor
    source_length: Tensor
    target_length: Tensor


@dataclass(frozen=True)
class CorpusTargets:
    """From which corpus the n scored tokens of a batch come.

    names: of all corpora of the split. index: (n,) int64, into `names`. counts: tokens of each name.
    """

    names: tuple[str, ...]
    index: Tensor
    counts: tuple[int, ...]

    def part(self, start: int, stop: int) -> CorpusTargets:
        """Of some neighboring tokens; on the CPU."""
        index = self.index[start:stop]
        return CorpusTargets(self.names, index, tuple(torch.bincount(index, minlength=len(self.names)).tolist()))

    def metrics(self, name: str, values: Tensor) -> Metrics[Tensor]:
        """`name/CORPUS`: the sum of values (n,) over the tokens of each corpus."""
        sums = values.new_zeros(len(self.names)).index_add(0, self.index, values)
        keys = [f"{name}/{corpus}" for corpus in self.names]
        return Metrics(dict(zip(keys, sums.unbind(), strict=True)), dict(zip(keys, self.counts, strict=True)))


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    source: the encoder's input, each source ending in EOS; None for a decoder-only model.
    target: the decoder's input. For an encoder-decoder the start token, mostly EOS, then the target without its final EOS; for a
    decoder-only model the source without its EOS before that.
    targets: empty in an empty micro-batch, whose one sequence is a lone EOS and adds exactly zero.
    sampled: whether the targets are samples of the model that is trained, not those of the data; alike in a whole step. One that
    was cut has no EOS at its end.
    other: the same examples as a model of the other kind reads them, for a teacher that is one; never shared.
    whole: the batch of all sequence ranks, if this is the share of one; on the CPU. A share has all `examples`, whose tokens are
    counted in the whole batch. first_target: the number of its first target there.
    corpora: of the targets, if the split has several; None if there is nothing to tell apart.
    """

    source: Sequences | None
    target: Sequences
    targets: Targets
    examples: ExampleSpans
    sampled: bool = False
    other: Batch | None = None
    whole: Batch | None = None
    first_target: int = 0
    corpora: CorpusTargets | None = None
    _copy: PinnedTensors | None = field(default=None, init=False, repr=False, compare=False)
    """Of its tensors. Not of `init`: `dataclasses.replace` drops it, so that no changed batch has the copy of another one."""
    _share: tuple[int, int, Batch] | None = field(default=None, init=False, repr=False, compare=False)
    """rank, size and the share of it that has such a copy."""

    @property
    def kind(self) -> ModelKind:
        """Of the models that read it."""
        return "decoder_only" if self.source is None else "encoder_decoder"

    @property
    def reading(self) -> Sequences:
        """The sequences that hold the sources."""
        return self.target if self.source is None else self.source

    @property
    def num_targets(self) -> int:
        """Scored tokens; 0 in an empty micro-batch. Known without waiting for a GPU."""
        return len(self.targets.labels)

    @property
    def size(self) -> Size:
        """Its scored tokens, and the sentences of whose targets it has the first."""
        return Size(self.num_targets, int((self.targets.position == 0).sum()))

    def for_kind(self, kind: ModelKind) -> Batch:
        """As a model of `kind` reads it. ValueError if the collator has no such model."""
        if kind == self.kind:
            return self
        if self.other is None:
            raise ValueError(f"this batch was made for {self.kind} models only; name the kind {kind} to its Collator")
        return self.other

    def share(self, rank: int, size: int) -> Batch:
        """What one of `size` sequence ranks computes: its part of the packed tokens, and the targets that they predict."""
        if size == 1:
            return self
        if self._share is not None and self._share[:2] == (rank, size):
            return self._share[2]
        target, other = self.target.share(rank, size), self.other
        count = len(target.tokens)
        bounds = torch.tensor([rank, rank + 1]) * count
        start, stop = torch.searchsorted(self.targets.index, bounds).tolist()
        targets = self.targets[start:stop]
        return replace(
            self,
            source=None if self.source is None else self.source.share(rank, size),
            target=target,
            targets=replace(targets, index=targets.index - rank * count),
            other=None if other is None else replace(other, targets=other.targets[start:stop]),
            whole=self,
            first_target=start,
            corpora=None if self.corpora is None else self.corpora.part(start, stop),
        )

    def nll_metrics(self, nll: Tensor) -> Metrics[Tensor]:
        """`nll`, the sum of negative log-likelihoods (n,) of the targets, and `nll/CORPUS` if there are several corpora."""
        metrics = Metrics.over(self.num_targets, {"nll": nll.sum()})
        if self.corpora is None:
            return metrics
        by_corpus = self.corpora.metrics("nll", nll)
        return Metrics({**metrics.sums, **by_corpus.sums}, {**metrics.counts, **by_corpus.counts})

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, except for tensors that are read on the CPU. To a GPU it is one copy."""
        if device.type != "cuda" or self.target.tokens.device.type != "cpu":
            return self.moved(partial(sent, device=device))
        arrived = iter((self._copy or self._pinned_tensors()).to(device))
        return self.moved(lambda _: next(arrived))

    def pinned(self, rank: int = 0, size: int = 1) -> Batch:
        """The same batch with a copy, of its `share`, from which `to` a GPU is launched at once. It may wait for the GPU."""
        batch = replace(self)
        own = batch if size == 1 else self.share(rank, size)  # of self: no cycle holds the memory
        object.__setattr__(own, "_copy", own._pinned_tensors())
        if size > 1:
            object.__setattr__(batch, "_share", (rank, size, own))
        return batch

    def _pinned_tensors(self) -> PinnedTensors:
        tensors: list[Tensor] = []

        def noted(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        self.moved(noted)  # visits them in the order of every other move
        return PinnedTensors.of(tensors)

    def moved(self, move: Move) -> Batch:
        """The same batch in other memory, except for tensors that are read on the CPU."""
        return replace(
            self,
            source=None if self.source is None else self.source.moved(move),
            target=self.target.moved(move),
            targets=self.targets.moved(move),
            other=None if self.other is None else self.other.moved(move),
            corpora=None if self.corpora is None else replace(self.corpora, index=move(self.corpora.index)),
        )


@dataclass(frozen=True)
class Metrics(Generic[Number]):
    """Named sums, each over its own number of items: a mean is taken once, after all sums and counts are added up by name.

    sums: () tensors without gradient in a micro-batch, floats in a report. counts: by the same names.
    """

    sums: Mapping[str, Number] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def over(cls, count: int, sums: Mapping[str, Number]) -> Self:
        """Sums over the same items."""
        return cls(sums, dict.fromkeys(sums, count))

    def also(self, count: int, sums: Mapping[str, Number]) -> Metrics[Number]:
        """With sums of other names, over the same items."""
        return Metrics({**self.sums, **sums}, {**self.counts, **dict.fromkeys(sums, count)})

    def __add__(self: Metrics[float], other: Metrics[float]) -> Metrics[float]:
        """Joined by name: what only one of both has stays as it is."""
        names = dict.fromkeys([*self.sums, *other.sums])
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return Metrics(sums, {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in names})

    def means(self: Metrics[float]) -> dict[str, float]:
        """Each sum by its count; a name without items has none."""
        return {name: value / self.counts[name] for name, value in self.sums.items() if self.counts[name]}
