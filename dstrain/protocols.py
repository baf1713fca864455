"""How packages that may not import one another see each other: protocols only.

`generation/` and `objectives/` see a model through `TeacherForced` and `Generative`, `checkpoint/` sees an engine through
`Resumable`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from dstrain.batch import ModelKind, Sequences
from dstrain.fragment import Fragment, StoredState
from dstrain.model_output import ActivationCapture, ModelOutput

_R = TypeVar("_R")


class VocabularyProjection(Protocol):
    """The last layer of a model as a teacher's engine sees it."""

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, E) and weight (V, E), whose product is the logits. Under ZeRO-3 only while `parameters` are gathered."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """All that `operands` reads."""
        ...


class TeacherForced(Protocol):
    """A model as an objective sees it."""

    @property
    def kind(self) -> ModelKind:
        """How it reads an example."""
        ...

    @property
    def projection(self) -> VocabularyProjection:
        """Hidden states to the vocabulary."""
        ...

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        ...

    def __call__(self, source: Sequences | None, target: Sequences, capture: ActivationCapture | None = None) -> ModelOutput:
        """All decoder positions at once, of sequences that a `Collator` made. capture: the activations to store."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """Logits. (..., D) -> (..., V)"""
        ...

    def reduce_projection(self, hidden: Tensor, reduce: Callable[..., _R]) -> _R:
        """Call `reduce(features, weight, vocabulary=...)`, where the vocabulary projection is `features @ weight.T`.

        hidden: (N, D); features: (N, E); weight: (V, E); vocabulary: the `ops.vocabulary.VocabularySlice` of the weight's rows,
        None for all entries. The call happens inside the projection's own forward, so that ZeRO-3 has gathered the weight;
        `reduce` returns a tensor or a tuple of tensors and never keeps the weight.
        """
        ...


class DecodingState(Protocol):
    """The state of a decoder between steps for `sentences x rows_per_sentence` rows, sentence-major."""

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row `rows[i]` was. rows: (n,), sentence-major, each within its own sentence, equally many of each.
        Their number may change: after the first step one row of a sentence becomes as many as there are beams.
        """

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but these; sentences: (b,) ascending indices of the present ones."""
        ...


class Generative(Protocol):
    """A model as generation sees it."""

    def prepared(self) -> Generative:
        """The same model for many steps: what they read of the weights is prepared once, and later changes do not count."""

    def start(self, source: Sequences | None, *, num_sentences: int, rows_per_sentence: int, max_length: int) -> DecodingState:
        """Encode the source once per sentence and allocate a cache of `max_length` decoder inputs."""
        ...

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Feed the next inputs. tokens: (N, t), t = 1 but for a prefix -> logits after each, (N, t, V), the caller's own."""
        ...


class Ranks(Protocol):
    """A group of ranks (`parallel.group.Group`). Every method is collective: all ranks call it."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def all_true(self, flag: bool, /) -> bool:
        """Whether it holds on every rank."""
        ...

    def all_reduce_sums(self, values: Sequence[float], /) -> list[float]:
        """Each number summed over the ranks."""
        ...

    def broadcast_object(self, value: _R, /) -> _R:
        """Rank 0's value, on every rank."""
        ...

    def gather_objects(self, value: _R, /) -> list[_R]:
        """Every rank's value in the order of ranks, on every rank."""
        ...


class Resumable(Protocol):
    """An engine as the checkpoint manager sees it."""

    @property
    def layout(self) -> str:
        """How this run is laid out, for people: `2 ranks zero1 fp32`."""
        ...

    def fragments(self) -> list[Fragment]:
        """The fragments that this rank writes: views, each element of the training state on one rank. No communication."""
        ...

    def scalars(self) -> dict[str, Any]:
        """State of the next step besides tensors; JSON, the same on every rank. No communication."""
        ...

    def load(self, stored: StoredState) -> None:
        """Take over a checkpoint, whatever the layout of the run that wrote it. No communication."""
        ...

    def sync(self) -> None:
        """Compute with what `load` has read. Collective."""
        ...


class TextTokenizer(Protocol):
    """Text to ids and back; ids never hold specials that are not in the text. EOS is not added here.

    start_id: what a decoder reads in front of a target.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    start_id: int

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of each line, without EOS."""
        ...

    def encode_prefixes(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of the beginnings of targets, which may be forced on a search."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Text of each id sequence, special ids left out."""
        ...

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of the ids."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides text -> ids."""
        ...


class WeightSource(Protocol):
    """Tensors by canonical name. Values are the same on every rank and at every read."""

    def names(self) -> Collection[str]:
        """Of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor, without reading its values."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. It may share memory with the source, so the caller copies it before changing it."""
        ...
