"""Kernels of the package Liger (Hsu et al. 2024, "Liger Kernel: Efficient Triton kernels for LLM training") with our signatures.

Those that compute what the op's reference does: both norms, and cross-entropy of logits with the whole vocabulary. Its rotation
takes queries and keys at once, its gate writes gradients over its inputs, and its divergence starts from features: none of them
fits the op. Its cross-entropy waits for the GPU in every chunk, as it counts the labels.
"""

import torch
from torch import Tensor

from dstrain.extras import import_extra
from dstrain.ops.chunked_projection import TokenLosses
from dstrain.ops.dropout import CountedMask
from dstrain.ops.kernels import sum_with_residual
from dstrain.ops.norm import NormedSum, NormWeights, plain_norm
from dstrain.ops.token_loss.smoothing import LabelSmoothing
from dstrain.ops.vocabulary import VocabularySlice

_NO_LABEL = -100
"""No token has it: tokens without a label never reach a loss."""


def liger_norm(x: Tensor, norm: NormWeights, residual: Tensor | None = None, mask: CountedMask | None = None) -> NormedSum:
    """See `composed_norm`; the sum is the table's."""
    total = sum_with_residual(x, residual, mask)
    if not total.numel():
        return NormedSum(total, plain_norm(total, norm))
    if norm.centered:
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        module = import_extra("liger_kernel.ops.layer_norm", extra="liger", purpose="engine.kernels.norm: liger")
        return NormedSum(total, module.LigerLayerNormFunction.apply(total, norm.weight, bias, norm.eps))
    # "gemma" computes in float32 throughout, as torch does. In place it would write over a gradient that others may read.
    module = import_extra("liger_kernel.ops.rms_norm", extra="liger", purpose="engine.kernels.norm: liger")
    return NormedSum(total, module.LigerRMSNormFunction.apply(total, norm.weight, norm.eps, 0.0, "gemma", False))


def liger_cross_entropy(
    logits: Tensor,
    logit_sums: Tensor,
    labels: Tensor,
    smoothing: LabelSmoothing,
    vocabulary: VocabularySlice,
    *,
    weights: Tensor | None,
) -> TokenLosses:
    """(c, V), (c, 1), (c, 1); see `TokenCrossEntropy`. The whole vocabulary only: the recipe refuses slices.

    Liger smooths over all V entries: its smoothing a is V eps', and its loss (1 - a) nll + a lse - eps' sum_v z(v), of which
    nll + z(y) is lse.
    """
    assert vocabulary.group is None, "a slice of the vocabulary"
    smoothing_sum = smoothing.per_token * smoothing.vocab_size
    label_logits = logits.gather(1, labels)
    own = logits.detach().requires_grad_()  # the same memory, which gets the gradient if there shall be one
    module = import_extra("liger_kernel.ops.cross_entropy", extra="liger", purpose="engine.kernels.cross_entropy: liger")
    loss, _, _, _, logits_grad = module.cross_entropy_forward(
        own, labels.squeeze(1), None, _NO_LABEL, 0.0, smoothing_sum, "none", None, return_z_loss=False
    )
    loss = loss.unsqueeze(1)
    nll = loss - smoothing_sum * label_logits + smoothing.per_token * logit_sums
    return TokenLosses(loss, (nll,), logits_grad.detach())
