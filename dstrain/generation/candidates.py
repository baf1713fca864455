"""The best continuations of each row, found without forming all log-probabilities.

Only the k best tokens of a row can matter, and they are the same for logits and log-probabilities. So the normalizer is
computed alone, the k best logits are picked, and log-probabilities are formed for those. The pick looks at the maximum of each
block of 64 columns first: the k best values stand in the k best blocks. Beside `log_softmax` and `topk` over the vocabulary
this costs two thirds of the time on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def log_normalizer(logits: Tensor) -> Tensor:
    """log sum exp of each row, through the softmax kernel, which is faster than `logsumexp`. (N, V) -> (N,)

    The greatest probability is at least 1 / V, so its logarithm is exact enough. NaN where a row holds NaN.
    """
    return logits.amax(1) - logits.softmax(1).amax(1).log()


def top_values(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns of the k greatest of each row, greatest first. (N, V) -> twice (N, min(k, V))"""
    num_rows, width = x.shape
    num_blocks = width // BLOCK
    if num_blocks <= 2 * k:
        values, columns = x.topk(min(k, width), dim=1)
        return values, columns
    blocks = x[:, : num_blocks * BLOCK].view(num_rows, num_blocks, BLOCK)
    best = blocks.amax(2).topk(k, dim=1, sorted=False).indices  # (N, k)
    rows = torch.arange(num_rows, device=x.device)[:, None]
    remainder = torch.arange(num_blocks * BLOCK, width, device=x.device)
    columns = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)  # (N, k * 64)
    columns = torch.cat([columns, remainder.expand(num_rows, -1)], 1)
    values = torch.cat([blocks[rows, best].flatten(1), x[:, num_blocks * BLOCK :]], 1)
    values, places = values.topk(k, dim=1)
    return values, columns.gather(1, places)


def best_continuations(logits: Tensor, normalizer: Tensor, totals: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best extensions of a sentence's hypotheses by one token.

    logits: (b * K, V), -inf where a token is forbidden; normalizer: (b * K,); totals: (b, K) summed log-probabilities so far,
    -inf for a dead hypothesis. Returns new totals, tokens and parents (the column of `totals` that is extended), each (b, k),
    best first. A row whose logits hold NaN is dead.
    """
    values, tokens = top_values(logits, k)
    scores = values - normalizer[:, None] + totals.flatten()[:, None]
    scores = torch.where(scores.isnan(), -torch.inf, scores).view(len(totals), -1)  # (b, K * k)
    width = values.shape[1]
    missing = k - scores.shape[1]
    if missing > 0:  # a vocabulary smaller than k
        scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
        tokens = torch.nn.functional.pad(tokens.view(len(totals), -1), (0, missing))
    best, places = scores.topk(k, dim=1)
    return best, tokens.view(len(totals), -1).gather(1, places), (places // width).clamp_max(totals.shape[1] - 1)
