"""How a stack shows its insides to a `protocols.Record`: hidden states between its passes, attention probabilities within them.

Counted are passes, not stored layers: a layer that runs at several depths is seen at each. A pass that LayerDrop skips shows its
input as its output, and its attention as computed. Probabilities exist where they are wanted alone; the attention that the model
computes with is not touched.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor

from dstrain.nn.attention import Watch
from dstrain.protocols import Place, Record


class LayerWatch(NamedTuple):
    """Who watches the attentions of one layer pass, to itself and to the source; None for nobody."""

    own: Watch | None = None
    cross: Watch | None = None


UNWATCHED = LayerWatch()


class StackWatch:
    """One stack as a record sees it; without a record nobody watches."""

    def __init__(self, record: Record | None, side: Literal["encoder", "decoder"]) -> None:
        self.record = record
        self.side = side

    def hidden_states(self, layer: int, x: Tensor) -> None:
        """After `layer` passes it is x, (B, T, D)."""
        if self.record is not None:
            self.record.show(Place("hidden_states", self.side, layer), x)

    def layer(self, depth: int) -> LayerWatch:
        """Of the pass at `depth`, from 0."""
        if self.record is None:
            return UNWATCHED
        return LayerWatch(self._attention(self.side, depth), self._attention("cross", depth))

    def _attention(self, side: Literal["encoder", "decoder", "cross"], depth: int) -> Watch | None:
        place = Place("attention", side, depth + 1)
        return partial(self.record.show, place) if self.record is not None and place in self.record.wanted else None
