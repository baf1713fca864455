"""A model that is ready to generate: its stacks prepared once, from weights that stay as they are."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

from dstrain.batch import Sequences
from dstrain.protocols import DecodingState

_P = TypeVar("_P")
_P_contra = TypeVar("_P_contra", contravariant=True)


class Planned(Protocol[_P_contra]):
    """A model whose start and steps may follow a plan."""

    def start(
        self,
        source: Sequences | None,
        *,
        num_sentences: int,
        rows_per_sentence: int,
        max_length: int,
        plan: _P_contra | None = None,
    ) -> DecodingState:
        """As `Generative.start`. plan: what steps of one token run by; None = the modules."""
        ...

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """As `Generative.step`."""
        ...


class PreparedModel(Generic[_P]):
    """Implements `protocols.Generative`."""

    def __init__(self, model: Planned[_P], plan: _P) -> None:
        self._model = model
        self._plan = plan

    def prepared(self) -> PreparedModel[_P]:
        """Itself."""
        return self

    def start(self, source: Sequences | None, *, num_sentences: int, rows_per_sentence: int, max_length: int) -> DecodingState:
        """Encode the source once per sentence and allocate a cache of `max_length` decoder inputs."""
        return self._model.start(
            source, num_sentences=num_sentences, rows_per_sentence=rows_per_sentence, max_length=max_length, plan=self._plan
        )

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Feed the next inputs. tokens: (N, t) -> logits after each, (N, t, V)."""
        return self._model.step(tokens, state)
