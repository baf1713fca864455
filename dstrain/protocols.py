"""What the floors above a model, an objective or an engine know about it.

Rooms that may not import one another meet here: `generation/` and `objectives/` see a model through `TeacherForced` and
`Generative`, `checkpoint/` sees an engine through `Shardable`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dstrain.batch import Batch, Sequences, Size

R = TypeVar("R")
Look = Callable[[Tensor, Tensor], None]
"""Takes features (n, E) and a projection's weight (V, E), over the student's vocabulary."""


class Memory(NamedTuple):
    """What the decoder sees of the source. hidden: (B, S, D); lengths: (B,)."""

    hidden: Tensor
    lengths: Tensor


class ModelOutput(NamedTuple):
    """hidden: (B, T, D), what the projection reads; memory: the encoder's output, None for decoder-only models."""

    hidden: Tensor
    memory: Memory | None


class Tap(NamedTuple):
    """A place inside a model.

    side: a stack, or `cross`, the decoder's attention to the encoder. layer: counted in passes of the stack, from 1; hidden
    states of layer 0 are what the stack reads, those of the last layer what it gives, its final norm included.
    """

    kind: Literal["hidden_states", "attention"]
    side: Literal["encoder", "decoder", "cross"]
    layer: int


class ActivationCapture:
    """What a model shows of one forward beside its output, at the places that are wanted; in training with gradient.

    hidden_states: (B, S or T, D). attention: (B, queries, keys) float32, the probabilities before dropout, averaged over the
    heads. Keys are the tokens that the stack reads; of a decoder-only model these are source and target in one, its queries and
    hidden states those of the target alone.
    """

    def __init__(self, requested: Iterable[Tap]) -> None:
        self.requested = frozenset(requested)
        self.captured: dict[Tap, Tensor] = {}

    def store(self, tap: Tap, value: Tensor) -> None:
        """Keep what a place holds, if it is wanted."""
        if tap in self.requested:
            self.captured[tap] = value

    def narrow(self, take: Callable[[Tensor], Tensor]) -> None:
        """Keep `take` of everything that is shown: of (B, L, ...) the positions that count."""
        self.captured = {tap: take(value) for tap, value in self.captured.items()}


class LossOutput(NamedTuple):
    """Sums over one micro-batch, and how much it holds.

    loss_sum: () with gradient, to be divided by the objective's `denominator`. sums: further () sums over its scored tokens to
    report, detached; `nll` is one of them.
    """

    loss_sum: Tensor
    size: Size
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same on every rank.

    step: number of the step, from 1. loss: nats, the step's loss_sum divided by `denominator`, which is num_targets where the
    loss is a mean over tokens. sums: each reported sum divided by num_targets. grad_norm: global L2 norm before clipping.
    learning_rate: the one this step used. skipped: the update was not applied (fp16 overflow).
    """

    step: int
    loss: float
    num_targets: int
    denominator: int
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hypothesis:
    """One generated sequence.

    tokens: target ids with the final EOS. score: sum of log-probabilities (nats), divided by length**length_penalty unless
    unnormalized. token_scores: log-probability of each token, EOS included.
    """

    tokens: list[int]
    score: float
    token_scores: list[float]


class TeacherForced(Protocol):
    """A model as an objective sees it."""

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        ...

    def __call__(self, source: Sequences | None, target: Sequences, capture: ActivationCapture | None = None) -> ModelOutput:
        """All target positions at once. record: takes what it wants of the way there."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """Logits. (..., D) -> (..., V)"""
        ...

    def reduce_projection(self, hidden: Tensor, reduce: Callable[[Tensor, Tensor], R]) -> R:
        """Call `reduce(features, weight)` where the vocabulary projection is `features @ weight.T`.

        hidden: (N, D); features: (N, E); weight: (V, E). The call happens inside the projection's own forward, so that ZeRO-3
        has gathered the weight; `reduce` returns a tensor or a tuple of tensors and never keeps the weight.
        """
        ...


class DecodingState(Protocol):
    """What a decoder remembers between steps for `sentences x rows_per_sentence` rows, sentence-major."""

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row `rows[i]` was; rows: (n,), sentence-major, each within its own sentence, equally many of each.

        Their number may change: after the first step one row of a sentence becomes as many as there are beams.
        """
        ...

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but these; sentences: (b,) ascending indices of the present ones."""
        ...


class Generative(Protocol):
    """A model as generation sees it."""

    def start(self, source: Sequences | None, *, num_sentences: int, rows_per_sentence: int, max_length: int) -> DecodingState:
        """Encode the source once per sentence and make room for `max_length` decoder inputs."""
        ...

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Feed the next inputs. tokens: (N, t), t = 1 but for a prefix -> logits after each, (N, t, V), the caller's own."""
        ...


@dataclass(frozen=True)
class SparseSignal:
    """What a teacher says of n scored tokens, as far as it was kept: up to k types each, at the objective's temperature.

    A sampled store has counts / draws in `probs` and no tail; the best types of a token leave the rest of its mass in `tail`.
    Where `ids` hold every type there is, `tail` is 0. A row's `probs` and `tail` add up to 1.
    """

    ids: Tensor  # (n, k) int64, -1 where unused
    probs: Tensor  # (n, k) float32, teacher probability mass of each id, 0 where unused
    tail: Tensor  # (n,) float32, mass of all other types together, 0 where nothing is said of them
    with_tail: bool = True  # False where nothing is said of other types: then the signal teaches forward_kl alone

    def part(self, rows: slice | Tensor) -> SparseSignal:
        """Of some of the tokens, by place or by a mask."""
        return replace(self, ids=self.ids[rows], probs=self.probs[rows], tail=self.tail[rows])


@dataclass(frozen=True)
class DenseSignal:
    """What teachers say of n scored tokens, before their projections, one entry a teacher; their probabilities are averaged.

    Valid only while the projections of the teachers run: under ZeRO-3 the weights are whole no longer than that.
    """

    features: Sequence[Tensor]  # (n, E) each
    weights: Sequence[Tensor]  # (V, E) each

    def part(self, rows: slice | Tensor) -> DenseSignal:
        """Of some of the tokens, by place or by a mask."""
        return replace(self, features=[features[rows] for features in self.features])


@dataclass(frozen=True)
class LogProbsSignal:
    """All that a teacher said of n scored tokens, as it is kept: in pieces that may be parts of mapped files, hence of numpy.

    It becomes the teacher's distribution at any temperature a few rows at a time, for all of them would take n x V numbers.
    """

    log_probs: Sequence[npt.NDArray[np.floating[Any]]]  # (rows of a piece, V) each, pieces one after another; finite
    temperature: float  # what the teacher's logits were divided by

    def part(self, rows: slice | Tensor) -> LogProbsSignal:
        """Of some of the tokens, by place, where nothing is copied, or by a mask."""
        if isinstance(rows, Tensor):
            return replace(self, log_probs=[np.concatenate(self.log_probs)[rows.numpy()]])
        found, start = [], 0
        for piece in self.log_probs:
            if start < rows.stop and start + len(piece) > rows.start:
                found.append(piece[max(rows.start - start, 0) : rows.stop - start])
            start += len(piece)
        return replace(self, log_probs=found)


KeptSignal = SparseSignal | LogProbsSignal
Signal = DenseSignal | KeptSignal


class Wanted(NamedTuple):
    """What a distillation asks of its signals.

    on_policy: signals of targets that are not in the data, too. features: what is inside a teacher, too.
    """

    divergence: str
    temperature: float
    on_policy: bool = False
    features: bool = False


class SignalSource(Protocol):
    """Teachers as a distillation objective sees them: at work beside the student, or kept on disk."""

    def require(self, requested: Wanted) -> None:
        """Raise a DstrainError where the signals cannot give it."""
        ...

    def reduce_signal(
        self, batch: Batch, rows: Tensor, reduce: Callable[[Signal], R], capture: ActivationCapture | None = None
    ) -> R:
        """Call `reduce` with the signal for the batch's scored tokens and return what it returns; the signal is not to be kept.

        rows: (n,) places of the scored tokens in the flattened (B * T) labels. record: filled by the teacher's forward, where
        `require` allows features. Under a sharded teacher collective, and then called equally often on every rank.
        """
        ...


class Objective(Protocol):
    """Turns hidden states and labels into a sum of losses."""

    def __call__(self, model: TeacherForced, batch: Batch) -> LossOutput:
        """The sum of losses over the batch's scored labels, with gradient."""
        ...

    def denominator(self, size: Size) -> int:
        """What the loss sums of a step or a split of this size are divided by, once and together."""
        ...


@runtime_checkable
class Surveying(Protocol):
    """An objective that weighs each token of a step against all others, so that it must see them before the first loss.

    `objectives.distillation.SelectiveDistillation` says what the engine owes it.
    """

    def survey(self, gather: Callable[[Tensor], Tensor], /) -> AbstractContextManager[None]:
        """Calls inside are looks at the micro-batches of a step; collective at its end."""
        ...

    def state(self) -> dict[int, Tensor]:
        """What the next step needs of those before, the same on every rank."""
        ...

    def load_state(self, state: Mapping[int, Tensor], /) -> None:
        """Take over what `state` gave."""
        ...


class Ranks(Protocol):
    """The processes of one run (`parallel.topology.World`). Every method is collective: all ranks call it."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        ...

    def barrier(self) -> None:
        """Wait for all."""
        ...

    def all_true(self, flag: bool, /) -> bool:
        """Whether it holds on every rank."""
        ...

    def all_reduce_sums(self, values: Sequence[float], /) -> list[float]:
        """Each number summed over the ranks."""
        ...

    def broadcast_object(self, value: R, /) -> R:
        """Rank 0's value, on every rank."""
        ...

    def gather_objects(self, value: R, /) -> list[R]:
        """Every rank's value in the order of ranks, on every rank."""
        ...


class Shardable(Protocol):
    """An engine as the checkpoint manager sees it. Both calls are collective: every rank makes them."""

    def save_shards(self, directory: Path) -> None:
        """Write this rank's part of the training state under `directory` (same path on every rank)."""
        ...

    def load_shards(self, directory: Path) -> None:
        """Read it back, bit for bit."""
        ...


class TextTokenizer(Protocol):
    """Text to ids and back; ids never hold specials that the text did not ask for. EOS is not added here."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, without EOS."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each id sequence, special ids left out."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces that the ids stand for."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides text -> ids."""
        ...
