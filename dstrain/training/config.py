"""When training stops, validates, saves and reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dstrain.config_base import BleuTokenization, Config, RougeWords
from dstrain.data.sampling import CorpusName
from dstrain.engine.config import EmaConfig
from dstrain.generation.config import BeamSearchConfig, GenerationConfig


class TrainingConfig(Config):
    """Training ends at the first limit reached; at least one is given."""

    seed: NonNegativeInt = Field(default=1, description="Decides order, initial weights and dropout.")
    max_steps: PositiveInt | None = Field(default=None, description="Optimizer steps; null = no limit.")
    max_epochs: PositiveInt | None = Field(default=None, description="Passes over the training data; null = no limit.")
    max_hours: PositiveFloat | None = Field(default=None, description="Hours over all resumes of a run; null = no limit.")
    ema: EmaConfig | None = Field(default=None, description="Moving average of the weights; null = none.")
    hang_seconds: NonNegativeInt = Field(
        default=600,
        description="A rank without progress for this long prints its stacks, and ends after as long again; 0 = never.",
    )

    @model_validator(mode="after")
    def _ends(self) -> TrainingConfig:
        if self.max_steps is None and self.max_epochs is None and self.max_hours is None:
            raise ValueError("training never ends: give max_steps, max_epochs or max_hours")
        return self


class ValidationConfig(Config):
    """When and how the `valid` split is scored."""

    unit: Literal["steps", "epochs"] = Field(default="epochs", description="Unit of `every`.")
    every: PositiveInt = Field(default=1, description="Interval between validations.")
    metric: Literal["loss", "bleu", "chrf", "rouge_1", "rouge_2", "rouge_l"] = Field(
        default="loss", description="Chooses the best bundle; all but loss need generation, ROUGE needs `rouge`, too."
    )
    corpus: CorpusName | None = Field(
        default=None,
        description="Corpus of `data.valid` whose score chooses the best bundle, its loss without label smoothing; null = the "
        "mean of all.",
    )
    generation: GenerationConfig | None = Field(
        default_factory=BeamSearchConfig, description="How text is generated that is scored (BLEU, chrF, ROUGE); null = none is."
    )
    tokenize: BleuTokenization = Field(
        default="auto",
        description="How BLEU cuts text into words, by sacreBLEU's name; auto = by the script of the references: zh for Chinese, "
        "char for other scripts without spaces, else 13a.",
    )
    lowercase: bool = Field(default=False, description="BLEU and chrF ignore case.")
    rouge: RougeWords | None = Field(
        default=None,
        description="Words of ROUGE-1, 2 and L: stemmed = without English endings, plain = as they are; null = no ROUGE. Needs "
        "`dstrain[rouge]`.",
    )
    patience: PositiveInt | None = Field(
        default=None, description="Validations without improvement after which training stops; null = never."
    )
    run_sanity_validation: bool = Field(default=False, description="One full validation before the first step.")

    @property
    def score_name(self) -> str:
        """The name of the score in a validation's result that chooses the best bundle."""
        if self.corpus is None:
            return self.metric
        return f"{'nll' if self.metric == 'loss' else self.metric}/{self.corpus}"

    @property
    def criterion(self) -> str:
        """What the best bundle is chosen by: the metric, and how it cuts words and reads case. Scores of one are comparable."""
        if self.metric == "loss":
            return self.score_name
        if self.metric.startswith("rouge"):
            return f"{self.score_name} {self.rouge}"
        cut = [f"tokenize={self.tokenize}"] if self.metric == "bleu" and self.tokenize != "auto" else []
        return " ".join([self.score_name, *cut, *(["lowercase"] if self.lowercase else [])])

    @model_validator(mode="after")
    def _metric_is_made(self) -> ValidationConfig:
        if self.metric != "loss" and self.generation is None:
            raise ValueError(f"metric = {self.metric} needs validation.generation; set it or choose metric: loss")
        if self.rouge is not None and self.generation is None:
            raise ValueError("rouge scores generated text, but generation = null; set generation, or leave rouge out")
        if self.metric.startswith("rouge") and self.rouge is None:
            raise ValueError(
                f"metric = {self.metric} needs validation.rouge; set it to stemmed or plain, or choose another metric"
            )
        return self


class CheckpointConfig(Config):
    """When a checkpoint (for resuming) and a bundle (the model) are written, besides at the end."""

    unit: Literal["steps", "epochs"] = Field(default="epochs", description="Unit of `every`.")
    every: PositiveInt = Field(default=1, description="Interval between checkpoints.")
    keep_checkpoints: PositiveInt = Field(default=2, description="How many of the newest checkpoints stay.")
    keep_bundles: PositiveInt = Field(default=1, description="How many of the newest bundles stay, besides the best one.")


class WandbConfig(Config):
    """Weights & Biases. What is null here follows wandb's own variables and settings (`WANDB_MODE`, `WANDB_PROJECT`, ...)."""

    project: str | None = Field(default=None, description="Its project; null = WANDB_PROJECT, or chosen there.")
    name: str | None = Field(default=None, description="Its name of the run; null = WANDB_NAME, or chosen there.")
    mode: Literal["online", "offline"] | None = Field(
        default=None, description="offline needs no account; null = WANDB_MODE, or online."
    )


class ReportingConfig(Config):
    """The logs of a run. RUN/events.jsonl holds every number; all other outputs are made from it."""

    log_every: PositiveInt = Field(default=50, description="Steps between training events.")
    tensorboard: bool = Field(default=False, description="Write TensorBoard files into RUN/tensorboard.")
    wandb: WandbConfig | None = Field(default=None, description="Report to Weights & Biases; null = not.")
