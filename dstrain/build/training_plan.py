"""The checks that come before a training: everything is opened and compared with the recipe, and no model is built."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dstrain import __version__
from dstrain.build.base import find_base
from dstrain.build.objective import plan_objective
from dstrain.build.objective_plan import ObjectivePlan
from dstrain.build.training_data import TrainingData
from dstrain.build.training_options import TrainOptions, check_training
from dstrain.checkpoint.bundle import StoredBundle
from dstrain.data.batching.plan import StepPlan
from dstrain.engine.ds_config import read_ds_config
from dstrain.errors import RecipeError
from dstrain.evaluation.metrics.rouge import build_rouge
from dstrain.evaluation.metrics.tokenization import check_tokenization
from dstrain.recipe import Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.training.horizons import Horizons


@dataclass(frozen=True)
class TrainingPlan:
    """All that a training reads before a model is built.

    deepspeed: what the file that engine.deepspeed names says. horizons: the planned length of the run.
    """

    recipe: Recipe
    data: TrainingData
    base: StoredBundle | None
    steps: StepPlan
    objective: ObjectivePlan
    deepspeed: dict[str, Any]
    horizons: Horizons

    def decisive(self, options: TrainOptions) -> dict[str, Any]:
        """The values that must be equal on every rank, by their keys in messages."""
        return {
            **recipe_tree(self.recipe),
            "DeepSpeed file": self.deepspeed,
            "--data": self.data.manifest.content,
            "--base": self.base and self.base.fingerprint,
            "--teacher or --logits": list(self.objective.teachers),
            "--teacher-placement": options.teachers.placement,
            "--output": str(options.output),
            "version": {"dstrain": __version__, **{name: version(name) for name in ("torch", "deepspeed")}},
        }


def plan_training(recipe: Recipe, options: TrainOptions, *, replicas: int | None = None) -> TrainingPlan:
    """Check everything that needs no model. replicas: of the parameters, None if not known yet.

    Raises a DstrainError if something does not fit the recipe.
    """
    if recipe.validation.generation is not None:
        check_tokenization(recipe.validation.tokenize)
    if recipe.validation.rouge is not None:
        build_rouge(recipe.validation.rouge)
    check_training(recipe, options)
    data = TrainingData(options.data, recipe)
    base = (
        None if options.base is None else find_base(options.base, recipe.model, data.manifest, adapted=recipe.adapter is not None)
    )
    steps = data.plan_steps(recipe)
    horizons = Horizons(recipe, steps.steps_per_epoch())
    for error in horizons.errors():
        raise RecipeError(error)
    objective = plan_objective(recipe, options.teachers, data)
    deepspeed = read_ds_config(recipe.engine, replicas=replicas).model_dump(mode="json", exclude_unset=True)
    return TrainingPlan(recipe, data, base, steps, objective, deepspeed, horizons)
