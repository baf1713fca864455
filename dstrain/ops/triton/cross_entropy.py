"""Label-smoothed cross-entropy of a chunk of logits: two reads and one write of them instead of nine passes."""

from torch import Tensor

from dstrain.ops.chunked_projection import TokenLosses
from dstrain.ops.token_loss.smoothing import LabelSmoothing
from dstrain.ops.triton.softmax import row_weights, softmax_gradient_, softmax_statistics
from dstrain.ops.vocabulary import VocabularySlice


def triton_cross_entropy(
    logits: Tensor, logit_sums: Tensor, labels: Tensor, smoothing: LabelSmoothing, vocabulary: VocabularySlice
) -> TokenLosses:
    """(c, V), (c, 1), (c, 1); see `TokenCrossEntropy`."""
    reductions = vocabulary.reductions()
    total, pending = reductions.add(logit_sums), softmax_statistics(logits, labels, reductions)
    statistics = pending.result()
    nll = statistics.max - statistics.label_logit + statistics.log_sum  # in this order a likely label keeps its digits
    loss = smoothing.loss(nll, statistics.max + statistics.log_sum, total.result())
    softmax_gradient_(logits, statistics, weight=row_weights(1.0, logits))
    return TokenLosses(loss, (nll,), vocabulary.add_at_(logits, labels, -smoothing.confidence), smoothing.per_token)
