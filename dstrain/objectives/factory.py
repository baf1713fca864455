"""From an objective's configuration to the objective."""

from dstrain.errors import RecipeError
from dstrain.objectives.config import (
    BatchSelection,
    CrossEntropyConfig,
    DistillationConfig,
    GlobalByLanguageSelection,
    GlobalSelection,
    ObjectiveConfig,
)
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.distillation import Distillation, SelectiveDistillation
from dstrain.protocols import Objective, SignalSource


def build_objective(config: ObjectiveConfig, signals: SignalSource | None = None) -> Objective:
    """The objective of `config`. signals: the teacher of a distillation; RecipeError where it is missing or not wanted."""
    if isinstance(config, DistillationConfig):
        if signals is None:
            raise RecipeError(
                "objective.kind = distillation needs a teacher: add --teacher BUNDLE, or choose objective: {kind: cross_entropy}"
            )
        selection = config.selection
        if isinstance(selection, BatchSelection | GlobalSelection | GlobalByLanguageSelection):
            return SelectiveDistillation(config, signals, selection)
        return Distillation(config, signals)
    if signals is not None:
        raise RecipeError(
            f"objective.kind = {config.kind} has no use for a teacher: leave --teacher out, or choose objective: "
            "{kind: distillation}"
        )
    return CrossEntropy(config)


def validation_objective(config: ObjectiveConfig) -> Objective:
    """What is validated: the student's own loss on the labels, which needs no teacher."""
    if isinstance(config, DistillationConfig):
        return CrossEntropy(CrossEntropyConfig(label_smoothing=config.label_smoothing, chunk_tokens=config.chunk_tokens))
    return build_objective(config)
