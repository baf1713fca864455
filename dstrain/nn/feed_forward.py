"""The position-wise network of a layer."""

from collections.abc import Callable

from torch import Tensor, nn

from dstrain.nn.dropout import Dropout


class FeedForward(nn.Module):
    """down(dropout(activation(up(x))))"""

    def __init__(
        self, *, up_proj: nn.Module, down_proj: nn.Module, activation: Callable[[Tensor], Tensor], dropout: Dropout
    ) -> None:
        super().__init__()
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        result: Tensor = self.down_proj(self.dropout(self.activation(self.up_proj(x))))
        return result
