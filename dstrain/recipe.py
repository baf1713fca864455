"""The recipe: all configurations in one tree, checked whole before anything heavy is imported.

Reading a recipe file (names, `extends`, overrides, duplicate keys) stands in recipe_file.py; what is wrong with it is put into
words by recipe_errors.py. Torch-free: a recipe can be checked on a login node.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from dstrain.data.config import BatchingConfig, DataConfig, TrainedSentencePiece
from dstrain.engine.config import EngineConfig, FallingSchedule, OptimizerConfig, ScheduleConfig
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
    def _parts_fit(self) -> Recipe:
        problems = [*self._schedule_problems(), *self._length_problems(), *self._vocabulary_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _schedule_problems(self) -> Iterator[str]:
        limit = self.training.max_steps
        if isinstance(self.schedule, FallingSchedule) and limit is not None and limit > self.schedule.total_steps:
            yield (
                f"training.max_steps = {limit} goes beyond schedule.total_steps = {self.schedule.total_steps}, where the "
                "learning rate has ended; raise total_steps"
            )

    def _length_problems(self) -> Iterator[str]:
        for name in ("max_source_length", "max_target_length"):
            kept, read = self.data.filter.model_dump()[name], self.model.model_dump()[name]
            if kept > read:
                yield f"data.filter.{name} = {kept} keeps sentences that the model does not read (model.{name} = {read})"

    def _vocabulary_problems(self) -> Iterator[str]:
        tokenizer = self.data.tokenizer
        if isinstance(tokenizer, TrainedSentencePiece) and tokenizer.sharing == "separate" and self.model.embedding.tie == "all":
            yield (
                "model.embedding.tie = all needs one vocabulary for both sides, but data.tokenizer.sharing = separate; "
                "choose sharing: joint or tie: decoder"
            )
