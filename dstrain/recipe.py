"""The recipe: all configurations in one tree, read from YAML, checked whole before anything heavy is imported."""

from __future__ import annotations

from pydantic import Field

from dstrain.data.config import BatchingConfig, DataConfig
from dstrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dstrain.generation.config import BeamSearchConfig, GenerationConfig
from dstrain.models.config import ModelConfig
from dstrain.objectives.config import CrossEntropyConfig, ObjectiveConfig
from dstrain.strict import Config
from dstrain.training.config import CheckpointConfig, ReportingConfig, TrainingConfig, ValidationConfig


class Recipe(Config):
    """One training run, from text to bundle."""

    version: int = 1
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
