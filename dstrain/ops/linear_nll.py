"""Vocabulary projection and the negative log-likelihood of each row, in chunks; for looking, so without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from dstrain.ops.mixed_precision import accumulator, autocast, product


@torch.no_grad()
def linear_nll(features: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
    """In nats. features: (n, E), weight: (V, E), labels: (n,) in [0, V) -> (n,) fp32 (fp64 for fp64 inputs)

    Precision as in `linear_cross_entropy`. chunk_tokens: rows whose logits exist at one time.
    """
    features, weight = autocast(features), autocast(weight)
    wide = accumulator(features.dtype)
    logits = features.new_empty(min(chunk_tokens, len(features)), len(weight), dtype=wide)
    nll = features.new_empty(len(features), dtype=wide)
    with torch.autocast(features.device.type, enabled=False):
        for start in range(0, len(features), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = product(features[rows], weight.t(), out=logits[: len(nll[rows])])
            nll[rows] = chunk.logsumexp(1) - chunk.gather(1, labels[rows].unsqueeze(1)).squeeze(1)
    return nll
