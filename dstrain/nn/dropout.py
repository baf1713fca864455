"""Dropout as a part of a layer: active in training only."""

from torch import Tensor, nn

from dstrain.ops.dropout import dropout, dropout_add


class Dropout(nn.Module):
    """Inverted dropout with probability `p`."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)"""
        return dropout(x, self.p) if self.training else x

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + forward(x)"""
        return dropout_add(residual, x, self.p if self.training else 0.0)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"
