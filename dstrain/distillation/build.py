"""From the configuration of a distillation to the objective."""

from __future__ import annotations

from collections.abc import Sequence

from dstrain.distillation.config import BatchSelection, DistillationConfig, GlobalByLanguageSelection, GlobalSelection
from dstrain.distillation.feature_plan import PlannedFeature
from dstrain.distillation.features import FeatureLosses
from dstrain.distillation.objective import Distillation
from dstrain.distillation.selection import Selection
from dstrain.distillation.signals import SignalSource


def build_distillation(
    config: DistillationConfig,
    signals: SignalSource,
    *,
    tag_position: int = 0,
    features: Sequence[PlannedFeature] = (),
    seed: int = 0,
) -> Distillation:
    """The objective of `config`.

    tag_position: of the language tag in a source, for a selection by language. features: those of `config`, planned; seed: of
    the initial values of their projections.
    """
    selection = None
    if isinstance(config.selection, BatchSelection | GlobalSelection | GlobalByLanguageSelection):
        selection = Selection(config.selection, chunk_tokens=config.chunk_tokens, tag_position=tag_position)
    feature_losses = FeatureLosses(features, seed=seed) if features else None
    return Distillation(config, signals, selection=selection, features=feature_losses)
