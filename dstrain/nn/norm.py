"""Norms, whose kernels are chosen by the table: of an input, or of its sum with a residual, then both at once."""

from typing import overload

from torch import Tensor, nn

from dstrain.nn.dropout import Dropout
from dstrain.ops.dropout import CountedMask
from dstrain.ops.kernels import NORM
from dstrain.ops.norm import NormedSum, NormWeights


class LayerNorm(nn.LayerNorm):
    """(..., D) -> (..., D)"""

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor, mask: CountedMask | None) -> NormedSum: ...

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: CountedMask | None = None) -> Tensor | NormedSum:
        """The norm of x; or residual + x, of which `mask` drops elements, and its norm."""
        return _run(NormWeights(self.weight, self.bias, self.eps, True), x, residual, mask)


class RMSNorm(nn.RMSNorm):
    """(..., D) -> (..., D), without bias."""

    eps: float

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor, mask: CountedMask | None) -> NormedSum: ...

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: CountedMask | None = None) -> Tensor | NormedSum:
        """The norm of x; or residual + x, of which `mask` drops elements, and its norm."""
        return _run(NormWeights(self.weight, None, self.eps, False), x, residual, mask)


def _run(norm: NormWeights, x: Tensor, residual: Tensor | None, mask: CountedMask | None) -> Tensor | NormedSum:
    result = NORM.choose(x.device, x.dtype)(x, norm, residual, mask)
    return result.normed if residual is None else result


def norm_of_sum(norm: nn.Module, residual: Tensor, x: Tensor, dropout: Dropout) -> NormedSum:
    """residual + dropout(x) and its norm, in one call if the norm takes the sum: a call of the module, as ZeRO-3 needs it."""
    if isinstance(norm, LayerNorm | RMSNorm):
        x, mask = dropout.split(x)
        result: NormedSum = norm(x, residual, mask)
        return result
    total = dropout.add(residual, x)
    return NormedSum(total, norm(total))
