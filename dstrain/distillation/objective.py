"""Distillation: a student learns from labels and from a teacher's distribution of the same target tokens.

The formula is in `ops/token_loss/distillation.py`, the choice of tokens in `selection.py`. All sums are over scored target
tokens, never padding, and are divided once by the step's number of them, selected or not, as is every reported figure:

    nll        the student's negative log-likelihood of the labels, without smoothing: perplexity is made of it
    hard, kd   the two losses before their weights
    agreement  how often student and teacher find the same token most probable
    selected   how many tokens learn from the teacher
    feature_*  losses of the teacher's activations, if there are any; `features.py`
    on_policy  how many tokens the student has sampled itself

On a step of the student's own samples the loss is the divergence of every token, and that of the features: there is no label to
learn, to smooth or to select by. Such steps report under names of their own (on_policy_nll, on_policy_kd, on_policy_agreement):
the log-likelihood of the model's own samples is no perplexity.

Whether the signal comes from online teachers or from a store is open here. It is for training; validation
is plain cross-entropy.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dstrain.batch import Batch, Metrics, Size
from dstrain.distillation.config import DistillationConfig, DivergenceConfig, JensenShannon, SkewKl
from dstrain.distillation.features import FeatureLosses
from dstrain.distillation.selection import Selection
from dstrain.distillation.signals import SignalRequest, SignalSource
from dstrain.model_output import ActivationCapture
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.objectives.objective import LossOutput
from dstrain.ops.divergence import Divergence, kind_of
from dstrain.ops.token_loss.distillation import DistillationSums, DistillationTerms, linear_distillation
from dstrain.protocols import TeacherForced


class Distillation(nn.Module):
    """Implements `objectives.objective.Objective`.

    selection: which tokens learn from the teacher, None for all. features: those of `config`, None if it has none. A module,
    for features may have weights of their own.
    """

    def __init__(
        self,
        config: DistillationConfig,
        signals: SignalSource,
        *,
        selection: Selection | None = None,
        features: FeatureLosses | None = None,
    ) -> None:
        super().__init__()
        if bool(config.features) != (features is not None):
            raise ValueError(
                "config.features and features must both be present or both absent; build the latter from the plan of the former"
            )
        signals.require(signal_request(config))
        self.config = config
        self.signals = signals
        self.selection = selection
        self.features = features
        self.terms = DistillationTerms(
            divergence=divergence_of(config.divergence),
            temperature=config.temperature,
            hard_weight=config.hard_weight,
            kd_weight=config.kd_weight,
            label_smoothing=config.label_smoothing,
        )
        self.terms_on_policy = self.terms._replace(hard_weight=0.0, label_smoothing=0.0)

    def forward(self, model: TeacherForced, batch: Batch, selected: Tensor | None = None) -> LossOutput:
        """The sum of losses over the batch's targets; metrics: those of the head of this file.

        selected: (n,) bool, which of the targets learn from the teacher's distribution; None for all.
        """
        inside, features = None, self.features
        if features is not None:
            inside = ActivationCapture(features.student_taps), ActivationCapture(features.teacher_taps)
        student, teacher = inside or (None, None)
        hidden = target_hidden(model, batch, student)
        with self.signals.open(batch, teacher) as signal:
            loss = partial(
                linear_distillation,
                labels=batch.targets.labels,
                signal=signal,
                terms=self.terms_on_policy if batch.sampled else self.terms,
                chunk_tokens=self.config.chunk_tokens,
                selected=selected,
            )
            sums = model.reduce_projection(hidden, loss)
        metrics = self._metrics(batch, sums)
        if features is None or inside is None:
            return LossOutput(sums.loss, batch.size, metrics)
        feature_loss, feature_sums = features(batch, *inside)
        return LossOutput(sums.loss + feature_loss, batch.size, metrics.also(batch.num_targets, feature_sums))

    def denominator(self, size: Size) -> int:
        """Targets."""
        return size.num_targets

    def close(self) -> None:
        """Release the teachers."""
        self.signals.close()

    def _metrics(self, batch: Batch, sums: DistillationSums) -> Metrics[Tensor]:
        """The reported sums by name."""
        if batch.sampled:
            own = {"on_policy_nll": sums.nll.sum(), "on_policy_kd": sums.kd, "on_policy_agreement": sums.agreement}
            return Metrics.over(batch.num_targets, {**own, "on_policy": sums.selected})
        planned = {name: getattr(sums, name) for name in ("hard", "kd", "agreement", "selected")}
        if self.config.on_policy is not None:
            planned["on_policy"] = torch.zeros_like(sums.selected)
        return batch.nll_metrics(sums.nll).also(batch.num_targets, planned)


def signal_request(config: DistillationConfig) -> SignalRequest:
    """The requirements on the source of signals."""
    kind, on_policy = kind_of(divergence_of(config.divergence)), config.on_policy is not None
    return SignalRequest(kind, config.temperature, on_policy=on_policy, features=bool(config.features))


def divergence_of(config: DivergenceConfig) -> Divergence:
    """The op's own description of a divergence."""
    match config:
        case JensenShannon():
            return Divergence(config.kind, config.beta)
        case SkewKl():
            return Divergence(config.kind, config.alpha)
        case _:
            return Divergence(config.kind)
