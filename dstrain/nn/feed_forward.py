"""The position-wise network of a layer, plain or gated."""

from collections.abc import Callable

from torch import Tensor, nn

from dstrain.nn.dropout import Dropout
from dstrain.nn.linear import BlockLinear


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


class GatedFeedForward(nn.Module):
    """down(dropout(activation(gate(x)) * up(x))) (GLU and its kin, Shazeer 2020). up_gate: blocks up_proj, gate_proj."""

    def __init__(
        self, *, up_gate: BlockLinear, down_proj: nn.Module, activation: Callable[[Tensor], Tensor], dropout: Dropout
    ) -> None:
        super().__init__()
        self.up_gate = up_gate
        self.down_proj = down_proj
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        up, gate = self.up_gate(x)
        result: Tensor = self.down_proj(self.dropout(self.activation(gate) * up))
        return result
