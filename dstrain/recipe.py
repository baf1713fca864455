"""The recipe: all configurations in one tree, checked whole before anything heavy is imported.

Reading a recipe file (names, `extends`, overrides, duplicate keys) stands in recipe_file.py; what is wrong with it is put into
words by recipe_errors.py. Torch-free: a recipe can be checked on a login node.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from dstrain.data.config import BatchingConfig, DataConfig
from dstrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dstrain.generation.config import BeamSearchConfig, GenerationConfig
from dstrain.models.config import ModelConfig
from dstrain.objectives.config import CrossEntropyConfig, ObjectiveConfig
from dstrain.strict import Config
from dstrain.training.config import CheckpointConfig, ReportingConfig, TrainingConfig, ValidationConfig

RECIPE_VERSION = 1


class Recipe(Config):
    """One training run, from text to bundle."""

    version: Literal[1]
    description: str = ""
    data: DataConfig
    batching: BatchingConfig
    model: ModelConfig
    objective: ObjectiveConfig = Field(default_factory=CrossEntropyConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    engine: EngineConfig = Field(default_factory=EngineConfig)
    training: TrainingConfig
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    reporting: ReportingConfig = Field(default_factory=ReportingConfig)
    generation: GenerationConfig = Field(default_factory=BeamSearchConfig)

    @model_validator(mode="after")
    def _schedule_covers_training(self) -> Recipe:
        total = getattr(self.schedule, "total_steps", None)
        limit = self.training.max_steps
        if total is not None and limit is not None and limit > total:
            raise ValueError(
                f"training.max_steps = {limit} goes beyond schedule.total_steps = {total}, where the learning rate has ended; "
                "raise total_steps"
            )
        return self
