"""A model that is ready to generate: its decoder prepared once, from weights that stay as they are."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dstrain.batch import Sequences
from dstrain.nn.decoding import DecodingPlan
from dstrain.protocols import DecodingState


class Planned(Protocol):
    """A model whose steps may follow a plan."""

    def start(
        self,
        source: Sequences | None,
        *,
        num_sentences: int,
        rows_per_sentence: int,
        max_length: int,
        plan: DecodingPlan | None = None,
    ) -> DecodingState:
        """As `Generative.start`. plan: what steps of one token run by; None = the modules."""
        ...

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """As `Generative.step`."""
        ...


class PreparedModel:
    """Implements `protocols.Generative`."""

    def __init__(self, model: Planned, plan: DecodingPlan) -> None:
        self._model = model
        self._plan = plan

    def prepared(self) -> PreparedModel:
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
