"""How a stack fills a `model_output.ActivationCapture`: hidden states between its layers, attention probabilities within them.

Counted are passes, not stored layers: a layer that runs at several depths counts at each. A pass that LayerDrop skips shows its
input as its output, and its attention as computed. Probabilities are computed only if they are requested; the attention that the
model computes with is not touched.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from dstrain.model_output import ActivationCapture, Tap
from dstrain.nn.attention import AttentionHook


class LayerHooks(NamedTuple):
    """Hooks of the attentions of one layer pass, to itself and to the source; None for no hook."""

    own: AttentionHook | None = None
    cross: AttentionHook | None = None


NO_HOOKS = LayerHooks()


class StackCapture:
    """The captures of one stack; empty without an `ActivationCapture`."""

    def __init__(self, capture: ActivationCapture | None, side: Literal["encoder", "decoder"]) -> None:
        self.capture = capture
        self.side = side

    def hidden_states(self, layer: int, x: Tensor) -> None:
        """After `layer` passes it is x, (B, T, D)."""
        if self.capture is not None:
            self.capture.store(Tap("hidden_states", self.side, layer), x)

    def layer(self, depth: int) -> LayerHooks:
        """Of the pass at `depth`, from 0."""
        if self.capture is None:
            return NO_HOOKS
        return LayerHooks(self._attention(self.side, depth), self._attention("cross", depth))

    def _attention(self, side: Literal["encoder", "decoder", "cross"], depth: int) -> AttentionHook | None:
        tap = Tap("attention", side, depth + 1)
        return partial(self.capture.store, tap) if self.capture is not None and tap in self.capture.requested else None
