"""What beam search and sampling take from a step's logits."""

from __future__ import annotations

from torch import Tensor

from dstrain.ops.kernels import CONTINUATIONS, LOG_PROBS


def to_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """(N, V) -> log_softmax(logits / temperature) in float32; float32 logits may be overwritten."""
    logits = logits.float()
    if temperature != 1:
        logits /= temperature
    return LOG_PROBS.choose(logits.device, logits.dtype)(logits)


def best_continuations(log_probs: Tensor, totals: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best extensions of each sentence's hypotheses by one token.

    log_probs: (b * K, V), -inf for a forbidden token; totals: (b, K) summed log-probabilities so far, -inf for a dead
    hypothesis. Returns new totals, tokens and parents (the column of `totals` that is extended), each (b, k), best first; -inf
    if there are fewer than k. A hypothesis whose log-probabilities are NaN is dead.
    """
    return CONTINUATIONS.choose(log_probs.device, log_probs.dtype)(log_probs, totals, k)
