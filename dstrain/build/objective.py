"""From a recipe's objective to the objective, by its kind.

A kind plans first: it checks that recipe, data and teachers fit together, without loading anything. The plan builds the objective
once the run is open. A new kind is one planner and one entry of `PLANNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstrain.build.distillation import plan_distillation
from dstrain.build.objective_plan import ObjectivePlan
from dstrain.build.teachers import TeacherOptions
from dstrain.build.training_data import TrainingData
from dstrain.errors import RecipeError
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.recipe import ObjectiveConfig, Recipe


def plan_cross_entropy(config: CrossEntropyConfig, recipe: Recipe, teachers: TeacherOptions, data: TrainingData) -> ObjectivePlan:
    """A loss on labels has nothing to load."""
    return ObjectivePlan(build=lambda mesh: build_cross_entropy(config))


Planner = Callable[[Any, Recipe, TeacherOptions, TrainingData], ObjectivePlan]
PLANNERS: Mapping[str, Planner] = {"cross_entropy": plan_cross_entropy, "distillation": plan_distillation}


def plan_objective(recipe: Recipe, teachers: TeacherOptions, data: TrainingData) -> ObjectivePlan:
    """Check everything that the recipe's objective needs. Raises a DstrainError if something does not fit together."""
    return PLANNERS[recipe.objective.kind](recipe.objective, recipe, teachers, data)


def check_teacher_options(config: ObjectiveConfig, options: TeacherOptions) -> None:
    """Raise RecipeError unless an objective with a teacher has either bundles or dumped logits, and another one neither.

    Keys and options that have no use beside the other source are refused.
    """
    if not options.bundles and (options.placement or options.vocabulary_map):
        raise RecipeError(
            "--teacher-placement and --vocabulary-map say how a teacher works: add --teacher BUNDLE, or leave them out"
        )
    needs, at_work, stored = config.needs.teacher, bool(options.bundles), options.logits is not None
    if needs is None:
        if at_work or stored:
            raise RecipeError(
                f"objective.kind = {config.kind} has no use for a teacher: leave {'--teacher' if at_work else '--logits'} out, "
                "or choose objective: {kind: distillation}"
            )
        return
    if at_work and stored:
        raise RecipeError("--teacher and --logits are two sources of the same signal: leave one of them out")
    if not (at_work or stored):
        raise RecipeError(
            f"objective.kind = {config.kind} needs a teacher: add --teacher BUNDLE, or --logits LOGITS for what `dstrain "
            "dump-logits` wrote, or choose objective: {kind: cross_entropy}"
        )
    if stored and needs.precision is not None:
        raise RecipeError(
            f"objective.teacher_precision = {needs.precision} is the precision of an online teacher, dumped logits are as they "
            "are: leave it out beside --logits"
        )
    if at_work and needs.renormalize:
        raise RecipeError(
            "objective.renormalize is for dumped logits of method topk; an online teacher gives its whole distribution: leave "
            "it out beside --teacher"
        )
