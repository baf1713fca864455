"""From a recipe's objective to the objective, by its kind.

A kind plans first: it checks that recipe, data and teachers fit together, without loading anything. The plan builds the objective
once the run is open. A new kind is one planner and one entry of `PLANNERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dstrain.build.distillation import plan_distillation
from dstrain.build.objective_plan import ObjectivePlan
from dstrain.build.training_data import TrainingData
from dstrain.build.training_options import TeacherOptions
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.recipe import Recipe


def plan_cross_entropy(config: CrossEntropyConfig, recipe: Recipe, teachers: TeacherOptions, data: TrainingData) -> ObjectivePlan:
    """A loss on labels has nothing to load."""
    return ObjectivePlan(build=lambda mesh: build_cross_entropy(config))


Planner = Callable[[Any, Recipe, TeacherOptions, TrainingData], ObjectivePlan]
PLANNERS: Mapping[str, Planner] = {"cross_entropy": plan_cross_entropy, "distillation": plan_distillation}


def plan_objective(recipe: Recipe, teachers: TeacherOptions, data: TrainingData) -> ObjectivePlan:
    """Check everything that the recipe's objective needs. Raises a DstrainError if something does not fit together."""
    return PLANNERS[recipe.objective.kind](recipe.objective, recipe, teachers, data)
