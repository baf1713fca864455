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
from dstrain.objectives.r_drop import RDrop
from dstrain.objectives.selection import Selection
from dstrain.protocols import Objective, SignalSource


def build_objective(config: ObjectiveConfig, signals: SignalSource | None = None, *, tag_place: int = 0) -> Objective:
    """The objective of `config`. signals: the teacher of a distillation; RecipeError where it is missing or not wanted.

    tag_place: of the language tag in a source, for a selection by language.
    """
    require_teacher(config, given=signals is not None)
    if not isinstance(config, DistillationConfig) or signals is None:
        assert isinstance(config, CrossEntropyConfig)
        return CrossEntropy(config) if config.r_drop is None else RDrop(config, config.r_drop)
    selection = config.selection
    if isinstance(selection, BatchSelection | GlobalSelection | GlobalByLanguageSelection):
        return SelectiveDistillation(config, signals, Selection(selection, tag_place))
    return Distillation(config, signals)


def require_teacher(config: ObjectiveConfig, *, given: bool) -> None:
    """Raise RecipeError where a distillation has no teacher, or another objective has one."""
    wanted = isinstance(config, DistillationConfig)
    if wanted and not given:
        raise RecipeError(
            "objective.kind = distillation needs a teacher: add --teacher BUNDLE, or choose objective: {kind: cross_entropy}"
        )
    if given and not wanted:
        raise RecipeError(
            f"objective.kind = {config.kind} has no use for a teacher: leave --teacher out, or choose objective: "
            "{kind: distillation}"
        )


def validation_objective(config: ObjectiveConfig) -> Objective:
    """What is validated: the student's own loss on the labels, which needs no teacher."""
    if isinstance(config, DistillationConfig):
        return CrossEntropy(CrossEntropyConfig(label_smoothing=config.label_smoothing, chunk_tokens=config.chunk_tokens))
    return build_objective(config)
