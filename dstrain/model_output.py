"""The outputs of a model: its last hidden states, and the activations that a caller has requested."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import Tensor


class Memory(NamedTuple):
    """The source for the decoder. hidden: (B, S, D) or (N, D); lengths: (B,)."""

    hidden: Tensor
    lengths: Tensor


class ModelOutput(NamedTuple):
    """hidden: (B, T, D) or (N, D), the projection's input; memory: the encoder's output, None for decoder-only models."""

    hidden: Tensor
    memory: Memory | None


class Tap(NamedTuple):
    """A point inside a model where an activation can be read.

    side: a stack, or `cross`, the decoder's attention to the encoder. layer: counted in passes of the stack, from 1; hidden
    states of layer 0 are the stack's input, those of the last layer its output, after its final norm.
    """

    kind: Literal["hidden_states", "attention"]
    side: Literal["encoder", "decoder", "cross"]
    layer: int


class ActivationCapture:
    """The activations of one forward at the requested taps; in training with gradient.

    hidden_states: (B, S or T, D). attention: (B, queries, keys) float32, the probabilities before dropout, averaged over the
    heads. Of packed sequences both have N for the first two; keys are then counted in their sequence, up to the longest.
    `Targets.index` says which of the decoder's positions predict a target.
    """

    def __init__(self, requested: Iterable[Tap]) -> None:
        self.requested = frozenset(requested)
        self.captured: dict[Tap, Tensor] = {}

    def store(self, tap: Tap, value: Tensor) -> None:
        """Keep an activation if it is requested."""
        if tap in self.requested:
            self.captured[tap] = value
