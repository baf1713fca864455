"""Norms, whose kernels are chosen by the table: of an input, or of its sum with a residual at once."""

from torch import Tensor, nn

from dstrain.nn.dropout import Dropout
from dstrain.ops.dropout import CountedMask
from dstrain.ops.kernels import NORM
from dstrain.ops.norm import NormWeights


class LayerNorm(nn.LayerNorm):
    """(..., D) -> (..., D)"""

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: CountedMask | None = None) -> Tensor:
        """The norm of x, or of residual + x, of which `mask` drops elements."""
        return NORM.choose(x.device, x.dtype)(x, NormWeights(self.weight, self.bias, self.eps, True), residual, mask)


class RMSNorm(nn.RMSNorm):
    """(..., D) -> (..., D), without bias."""

    eps: float

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: CountedMask | None = None) -> Tensor:
        """The norm of x, or of residual + x, of which `mask` drops elements."""
        return NORM.choose(x.device, x.dtype)(x, NormWeights(self.weight, None, self.eps, False), residual, mask)


def norm_of_sum(norm: nn.Module, residual: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """norm(residual + dropout(x)), in one call if the norm takes the sum. It is a call of the module, as ZeRO-3 needs it."""
    if isinstance(norm, LayerNorm | RMSNorm):
        x, mask = dropout.split(x)
        result: Tensor = norm(x, residual, mask)
    else:
        result = norm(dropout.add(residual, x))
    return result
