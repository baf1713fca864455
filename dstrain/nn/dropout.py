"""Dropout as a part of a layer: active in training only."""

from torch import Tensor, nn

from dstrain.ops.dropout import dropout, dropout_add
from dstrain.parallel.group import Group
from dstrain.parallel.randomness import shard_randomness


class Dropout(nn.Module):
    """Inverted dropout with probability `p`. features: the tensor group if x is this rank's part of the features."""

    def __init__(self, p: float, *, features: Group | None = None) -> None:
        super().__init__()
        self.p = p
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)"""
        if not self.training:
            return x
        with shard_randomness(self.features, active=self.p > 0):
            return dropout(x, self.p)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + forward(x)"""
        return dropout_add(residual, x, self.p if self.training else 0.0)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"
