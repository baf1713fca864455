"""Label-smoothed cross-entropy of a chunk of logits: two reads and one write of them instead of nine passes."""

from torch import Tensor

from dstrain.ops.chunked_projection import TokenLosses
from dstrain.ops.token_loss.smoothing import LabelSmoothing
from dstrain.ops.triton.softmax import row_weights, softmax_gradient_, softmax_statistics
from dstrain.ops.vocabulary import VocabularySlice


def triton_cross_entropy(
    logits: Tensor,
    logit_sums: Tensor,
    labels: Tensor,
    smoothing: LabelSmoothing,
    vocabulary: VocabularySlice,
    *,
    weights: Tensor | None,
) -> TokenLosses:
    """(c, V), (c, 1), (c, 1); see `TokenCrossEntropy`. The weights are factors of what the gradient's pass writes."""
    reductions = vocabulary.reductions()
    total, pending = reductions.add(logit_sums), softmax_statistics(logits, labels, reductions)
    statistics = pending.result()
    nll = statistics.max - statistics.label_logit + statistics.log_sum  # in this order a likely label keeps its digits
    loss = smoothing.loss(nll, statistics.max + statistics.log_sum, total.result())
    softmax_gradient_(logits, statistics, weight=row_weights(1.0 if weights is None else weights, logits))
    of_label = -smoothing.confidence if weights is None else weights * -smoothing.confidence
    return TokenLosses(loss, (nll,), vocabulary.add_at_(logits, labels, of_label), smoothing.per_token, weights is not None)
