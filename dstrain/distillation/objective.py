"""Distillation: a student learns from labels and from what a teacher says of the same target tokens.

The formula stands in `ops/linear_distillation.py`, the choice of tokens in `selection.py`. All sums are over scored target
tokens, never padding, and are divided once by the step's number of them, selected or not, as is every reported figure:

    nll        the student's negative log-likelihood of the labels, without smoothing: perplexity is made of it
    hard, kd   the two losses before their weights
    agreement  how often student and teacher find the same type best
    selected   how many tokens learn from the teacher
    feature_*  what is learned from inside the teacher, if anything; `features.py`
    on_policy  how many tokens the student has written itself

On a step of the student's own samples the loss is the divergence alone, of every token, and that of the features: there is no
label to learn, to smooth or to select by. What such steps report besides is named apart (on_policy_nll, on_policy_kd,
on_policy_agreement): the log-likelihood of one's own samples says nothing about perplexity.

Where the signal comes from, teachers at work or a store, this objective does not know. It is for training; what is validated is
plain cross-entropy (`factory.validation_objective`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dstrain.batch import Batch, Size
from dstrain.distillation.config import DistillationConfig, DivergenceConfig, JensenShannon, SkewKl
from dstrain.distillation.features import FeatureLosses
from dstrain.distillation.selection import Selection
from dstrain.distillation.signals import SignalSource, Wanted
from dstrain.model_output import ActivationCapture
from dstrain.objectives.objective import LossOutput
from dstrain.ops.divergence import Divergence, kind_of
from dstrain.ops.linear_cross_entropy import scored_rows
from dstrain.ops.linear_distillation import DistillationSums, DistillationTerms, linear_distillation
from dstrain.ops.linear_nll import linear_nll
from dstrain.ops.teacher_signal import Signal
from dstrain.protocols import TeacherForced


class Scored(NamedTuple):
    """hidden: (n, D), what the projection reads; rows: (n,) places in the flattened (B * T) labels; labels: (n,)."""

    hidden: Tensor
    rows: Tensor
    labels: Tensor


class Distillation(nn.Module):
    """Implements `objectives.objective.Objective`: every token learns from the teacher.

    features: those of `config`, None where it has none. A module, for features may have weights of their own.
    """

    def __init__(self, config: DistillationConfig, signals: SignalSource, features: FeatureLosses | None = None) -> None:
        super().__init__()
        if bool(config.features) != (features is not None):
            raise ValueError("the features of the configuration and those given must be the same; build them from its plan")
        signals.require(wanted_by(config))
        self.config = config
        self.signals = signals
        self.features = features
        self.terms = DistillationTerms(
            divergence=divergence_of(config.divergence),
            temperature=config.temperature,
            hard_weight=config.hard_weight,
            kd_weight=config.kd_weight,
            label_smoothing=config.label_smoothing,
        )
        self.terms_on_policy = self.terms._replace(hard_weight=0.0, label_smoothing=0.0)

    def forward(self, model: TeacherForced, batch: Batch) -> LossOutput:
        """The sum of losses over the batch's scored labels; sums: those of the head of this file."""
        return self.loss(model, batch, None)

    def denominator(self, size: Size) -> int:
        """Targets."""
        return size.num_targets

    def loss(self, model: TeacherForced, batch: Batch, selected: Tensor | None) -> LossOutput:
        """The losses of the scored tokens, of which the `selected` (n,) learn from the teacher's distribution."""
        own = taught = None
        if self.features is not None:
            own, taught = ActivationCapture(self.features.student_taps), ActivationCapture(self.features.teacher_taps)
        scored = scored_tokens(model, batch, own)

        def reduce(features: Tensor, weight: Tensor) -> DistillationSums:
            def learn(signal: Signal) -> DistillationSums:
                return linear_distillation(
                    features,
                    weight,
                    scored.labels,
                    signal,
                    terms=self.terms_on_policy if batch.sampled else self.terms,
                    chunk_tokens=self.config.chunk_tokens,
                    selected=selected,
                )

            return self.signals.reduce_signal(batch, scored.rows, learn, taught)

        sums = model.reduce_projection(scored.hidden, reduce)
        named = self._named(sums, sampled=batch.sampled)
        if self.features is None or own is None or taught is None:
            return LossOutput(sums.loss, batch.size, named)
        inside, features = self.features(batch, scored.rows, own, taught)
        return LossOutput(sums.loss + inside, batch.size, {**named, **features})

    def _named(self, sums: DistillationSums, *, sampled: bool) -> dict[str, Tensor]:
        """What is reported, by name."""
        if sampled:
            own = {f"on_policy_{name}": getattr(sums, name) for name in ("nll", "kd", "agreement")}
            return {**own, "on_policy": sums.selected}
        given = {name: getattr(sums, name) for name in ("nll", "hard", "kd", "agreement", "selected")}
        return given if self.config.on_policy is None else {**given, "on_policy": torch.zeros_like(sums.selected)}


class SelectiveDistillation(Distillation):
    """Implements `objectives.objective.Surveying`: tokens that the student finds hard learn from the teacher."""

    def __init__(
        self,
        config: DistillationConfig,
        signals: SignalSource,
        selection: Selection,
        features: FeatureLosses | None = None,
    ) -> None:
        super().__init__(config, signals, features)
        self.selection = selection
        self._surveyed: list[Tensor] | None = None
        self._selected: deque[Tensor] = deque()

    def forward(self, model: TeacherForced, batch: Batch) -> LossOutput:
        """Within `survey` a look at the batch; afterwards the losses of the same batches in the same order.

        A step of samples is not surveyed.
        """
        if batch.sampled:
            return self.loss(model, batch, None)
        if self._surveyed is None:
            return self.loss(model, batch, self._selected.popleft())
        scored = scored_tokens(model, batch)
        reduce = partial(linear_nll, labels=scored.labels, chunk_tokens=self.config.chunk_tokens)
        nll = model.reduce_projection(scored.hidden, reduce)
        self._surveyed.append(self.selection.statistics(batch, scored.rows, nll))
        return LossOutput(nll.sum(), batch.size, {})

    @contextmanager
    def survey(self, gather: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """What is called inside are looks at this rank's micro-batches of a step; at the end the step's tokens are selected.

        gather: collective; (n, ...) of each rank -> (N, ...) of all.
        """
        self._surveyed, self._selected = [], deque()
        try:
            yield
            self.selection.update_queue(gather(torch.cat(self._surveyed)))
            self._selected.extend(self.selection.selected(statistics) for statistics in self._surveyed)
        finally:
            self._surveyed = None

    def state(self) -> dict[int, Tensor]:
        """What the next step needs of those before: the queues."""
        return self.selection.state()

    def load_state(self, state: Mapping[int, Tensor]) -> None:
        """Take over what `state` gave."""
        self.selection.load_state(state)


def wanted_by(config: DistillationConfig) -> Wanted:
    """What the source of signals must be able to give."""
    kind, on_policy = kind_of(divergence_of(config.divergence)), config.on_policy is not None
    return Wanted(kind, config.temperature, on_policy=on_policy, features=bool(config.features))


def scored_tokens(model: TeacherForced, batch: Batch, capture: ActivationCapture | None = None) -> Scored:
    """The batch's scored tokens as the model sees them. capture: the activations to store."""
    hidden, labels = model(batch.source, batch.target, capture).hidden.flatten(0, 1), batch.labels.flatten()
    rows = scored_rows(labels, batch.num_targets)
    return Scored(hidden.index_select(0, rows), rows, labels.index_select(0, rows))


def divergence_of(config: DivergenceConfig) -> Divergence:
    """The op's own description of a divergence."""
    match config:
        case JensenShannon():
            return Divergence(config.kind, config.beta)
        case SkewKl():
            return Divergence(config.kind, config.alpha)
        case _:
            return Divergence(config.kind)
