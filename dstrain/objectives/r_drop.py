"""R-Drop: cross-entropy of two passes with different dropout, and the divergence between them.

The two passes are two calls of the model, not one call with twice the rows: matrix products of one shape round alike, so that
without dropout the passes are equal to the last bit and their divergence is exactly zero. (A tied factorized embedding maps both
to its width in one product, and leaves some 1e-12.) Activations of both are held until the backward pass, so a micro-batch needs
twice the memory and twice the time; under ZeRO-3 the weights are gathered twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dstrain.batch import Batch, Size
from dstrain.nn.dropout import mask_pass
from dstrain.objectives.config import CrossEntropyConfig, RDropConfig
from dstrain.objectives.cross_entropy import CrossEntropy, loss_weight, target_hidden
from dstrain.objectives.objective import LossOutput
from dstrain.ops.token_loss.r_drop import RDropSums, linear_r_drop
from dstrain.ops.vocabulary import VocabularySlice
from dstrain.protocols import TeacherForced


class RDrop:
    """Implements `objective.Objective`; the formula is in `ops/token_loss/r_drop.py`."""

    selection = None

    def __init__(self, config: CrossEntropyConfig, r_drop: RDropConfig) -> None:
        self.config = config
        self.r_drop = r_drop
        self._single = CrossEntropy(config)

    def __call__(self, model: TeacherForced, batch: Batch, selected: Tensor | None = None) -> LossOutput:
        """In training the loss of two passes; metrics: `nll`, the mean of both, and `kl`. In evaluation plain cross-entropy."""
        if not model.training:
            return self._single(model, batch)
        passes = [target_hidden(model, batch)]
        with mask_pass(1):
            passes.append(target_hidden(model, batch))
        reduce = partial(
            linear_r_drop,
            labels=batch.targets.labels,
            alpha=self.r_drop.alpha,
            label_smoothing=self.config.label_smoothing,
            chunk_tokens=self.config.chunk_tokens,
            token_weights=loss_weight(batch, self.config),
        )

        def reduce_passes(features: Tensor, weight: Tensor, *, vocabulary: VocabularySlice | None) -> RDropSums:
            return reduce(features.view(2, batch.num_targets, features.shape[1]), weight, vocabulary=vocabulary)

        sums = model.reduce_projection(torch.cat(passes), reduce_passes)
        return LossOutput(sums.loss, batch.size, batch.nll_metrics(sums.nll).also(batch.num_targets, {"kl": sums.kl}))

    def denominator(self, size: Size) -> int:
        """As without R-Drop: a sentence that runs twice is one sentence."""
        return self._single.denominator(size)

    def close(self) -> None:
        """Nothing is open."""
