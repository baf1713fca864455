"""From an objective's configuration to the objective."""

from collections.abc import Sequence

from dstrain.distillation.config import (
    BatchSelection,
    DistillationConfig,
    GlobalByLanguageSelection,
    GlobalSelection,
    ObjectiveConfig,
)
from dstrain.distillation.feature_plan import PlannedFeature
from dstrain.distillation.features import FeatureLosses
from dstrain.distillation.objective import Distillation
from dstrain.distillation.selection import Selection
from dstrain.distillation.signals import SignalSource
from dstrain.errors import RecipeError
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.objective import Objective
from dstrain.objectives.r_drop import RDrop


def build_objective(
    config: ObjectiveConfig,
    signals: SignalSource | None = None,
    *,
    tag_position: int = 0,
    features: Sequence[PlannedFeature] = (),
    seed: int = 0,
) -> Objective:
    """The objective of `config`. signals: the teacher signals of a distillation, None for other objectives.

    tag_position: of the language tag in a source, for a selection by language. features: those of `config`, planned; seed: of
    the initial values of their projections.
    """
    if not isinstance(config, DistillationConfig) or signals is None:
        assert isinstance(config, CrossEntropyConfig)
        return CrossEntropy(config) if config.r_drop is None else RDrop(config, config.r_drop)
    chosen = config.selection
    selection = None
    if isinstance(chosen, BatchSelection | GlobalSelection | GlobalByLanguageSelection):
        selection = Selection(chosen, chunk_tokens=config.chunk_tokens, tag_position=tag_position)
    inside = FeatureLosses(features, seed=seed) if features else None
    return Distillation(config, signals, selection=selection, features=inside)


def require_teacher_source(config: ObjectiveConfig, *, teacher: bool, logits: bool) -> None:
    """Raise RecipeError unless a distillation has either teachers or dumped logits, and another objective neither.

    Keys that only one of both has a use for are refused beside the other.
    """
    if not isinstance(config, DistillationConfig):
        if teacher or logits:
            raise RecipeError(
                f"objective.kind = {config.kind} has no use for a teacher: leave {'--teacher' if teacher else '--logits'} out, "
                "or choose objective: {kind: distillation}"
            )
        return
    if teacher and logits:
        raise RecipeError("--teacher and --logits are two ways to the same lesson: leave one of them out")
    if not (teacher or logits):
        raise RecipeError(
            "objective.kind = distillation needs a teacher: add --teacher BUNDLE, or --logits LOGITS for what `dstrain "
            "dump-logits` wrote, or choose objective: {kind: cross_entropy}"
        )
    if logits and config.teacher_precision is not None:
        raise RecipeError(
            f"objective.teacher_precision = {config.teacher_precision} is what a teacher at work computes in, dumped logits are "
            "as they are: leave it out beside --logits"
        )
    if teacher and config.renormalize:
        raise RecipeError(
            "objective.renormalize is for dumped logits of method topk; a teacher at work gives its whole distribution: leave "
            "it out beside --teacher"
        )


def validation_objective(config: ObjectiveConfig) -> Objective:
    """What is validated: the student's own loss on the labels, which needs no teacher."""
    if isinstance(config, DistillationConfig):
        return CrossEntropy(CrossEntropyConfig(label_smoothing=config.label_smoothing, chunk_tokens=config.chunk_tokens))
    return build_objective(config)
