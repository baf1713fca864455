"""When training stops, validates, saves and reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dstrain.config_base import Config
from dstrain.engine.config import EmaConfig
from dstrain.generation.config import BeamSearchConfig, GenerationConfig


class TrainingConfig(Config):
    """seed decides order, initial weights and dropout. Training ends at the first limit reached; at least one is given.

    max_hours: over all resumes of a run. hang_seconds: a rank without progress for so long prints where it hangs, and ends
    after as long again; 0 = never.
    """

    seed: NonNegativeInt = 1
    max_steps: PositiveInt | None = None
    max_epochs: PositiveInt | None = None
    max_hours: PositiveFloat | None = None
    ema: EmaConfig | None = None
    hang_seconds: NonNegativeInt = 600

    @model_validator(mode="after")
    def _ends(self) -> TrainingConfig:
        if self.max_steps is None and self.max_epochs is None and self.max_hours is None:
            raise ValueError("training never ends: give max_steps, max_epochs or max_hours")
        return self


class ValidationConfig(Config):
    """When and how the `valid` split is scored.

    every: how many steps or epochs. metric: what chooses the best bundle; `bleu` and `chrf` need `generation`. patience: stop
    after so many validations without improvement. run_sanity_validation: one full validation before the first step.
    """

    unit: Literal["steps", "epochs"] = "epochs"
    every: PositiveInt = 1
    metric: Literal["loss", "bleu", "chrf"] = "loss"
    generation: GenerationConfig | None = Field(default_factory=BeamSearchConfig)
    patience: PositiveInt | None = None
    run_sanity_validation: bool = False

    @model_validator(mode="after")
    def _metric_is_made(self) -> ValidationConfig:
        if self.metric != "loss" and self.generation is None:
            raise ValueError(f"metric = {self.metric} needs validation.generation; set it or choose metric: loss")
        return self


class CheckpointConfig(Config):
    """A checkpoint (for resuming) and a bundle (weights alone) are written every so many steps or epochs, and at the end.

    keep_checkpoints, keep_bundles: how many of the newest stay; the best bundle always stays.
    """

    unit: Literal["steps", "epochs"] = "epochs"
    every: PositiveInt = 1
    keep_checkpoints: PositiveInt = 2
    keep_bundles: PositiveInt = 1


class WandbConfig(Config):
    """Weights & Biases; `offline` needs no account."""

    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class ReportingConfig(Config):
    """log_every: steps between training events in RUN/events.jsonl, from which all other outputs are made."""

    log_every: PositiveInt = 50
    tensorboard: bool = False
    wandb: WandbConfig | None = None
