"""Linear maps of weights that stay as they are, for few rows: products with a copy of the weight, which takes as much memory.

torch's own product packs the weight at each call, which with few rows costs more than the product. A copy of a large weight that
oneDNN has packed needs none: of 5 rows and 8,000 x 128 it takes 0.12 ms against 0.36, of 160 rows 3.6 ms against 4.5. Packing
costs about one call of torch's. A torch that was built without oneDNN multiplies by the weight itself.

A call of oneDNN's product costs 14 microseconds by itself. Below `SMALLEST` elements the copy is the transposed weight, whose
rows torch reads as they lie: of 5 rows and 384 x 128 that takes 6.1 microseconds against 8.5, and 19 by oneDNN; of 160 rows 94
against 102 and 108 (Intel Xeon with AVX512).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 1 << 19
"""Elements of a weight that is worth packing."""


def packed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """weight: (O, I), bias: (O,) -> the map (N, I) -> (N, O) of their present values, not recorded by autograd."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    fixed_bias = None if bias is None else bias.detach()
    product = torch.ops.mkldnn._linear_pointwise

    def run(x: Tensor) -> Tensor:
        result: Tensor = product(x, packed, fixed_bias, "none", [], "")
        return result

    return run


def transposed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """weight: (O, I), bias: (O,) -> the map (N, I) -> (N, O) of their present values, not recorded by autograd."""
    transposed = weight.detach().t().clone(memory_format=torch.contiguous_format)
    if bias is None:
        return lambda x: torch.mm(x, transposed)
    fixed_bias = bias.detach()
    return lambda x: torch.addmm(fixed_bias, x, transposed)
