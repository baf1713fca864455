"""The position-wise network of a layer, plain or gated."""

from collections.abc import Callable

from torch import Tensor, nn

from dstrain.nn.dropout import Dropout
from dstrain.nn.linear import BlockLinear
from dstrain.ops.activation import TensorMap
from dstrain.ops.kernels import GATE


class PositionWise(nn.Module):
    """What both kinds share. tiled: runs the network on parts of the tokens, see `nn/checkpointing.py`; None for all at once."""

    def __init__(self, *, activation: TensorMap, dropout: Dropout) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = dropout
        self.tiled: Callable[[TensorMap, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.compute(x) if self.tiled is None else self.tiled(self.compute, x)

    def compute(self, x: Tensor) -> Tensor:
        """The network itself. (..., D) -> (..., D)"""
        raise NotImplementedError


class FeedForward(PositionWise):
    """down(dropout(activation(up(x))))"""

    def __init__(self, *, up_proj: nn.Module, down_proj: nn.Module, activation: TensorMap, dropout: Dropout) -> None:
        super().__init__(activation=activation, dropout=dropout)
        self.up_proj = up_proj
        self.down_proj = down_proj

    def compute(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        result: Tensor = self.down_proj(self.dropout(self.activation(self.up_proj(x))))
        return result


class GatedFeedForward(PositionWise):
    """down(dropout(activation(gate(x)) * up(x))) (GLU and its kin, Shazeer 2020). up_gate: blocks up_proj, gate_proj."""

    def __init__(self, *, up_gate: BlockLinear, down_proj: nn.Module, activation: TensorMap, dropout: Dropout) -> None:
        super().__init__(activation=activation, dropout=dropout)
        self.up_gate = up_gate
        self.down_proj = down_proj

    def compute(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        up, gate = self.up_gate(x)
        gated = GATE.choose(up.device, up.dtype)(gate, up, self.activation)
        result: Tensor = self.down_proj(self.dropout(gated))
        return result
