"""The training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dstrain.config_base import ChunkTokens, Config, Precision

Rate = Annotated[float, Field(gt=0, le=1)]


class OnPolicyConfig(Config):
    """On-policy distillation: on some steps the student learns from the teacher's distributions on its own samples.

    After Agarwal et al., ICLR 2024, "On-Policy Distillation of Language Models". A sample has at most ratio x source length +
    offset tokens (source with its EOS), and never more than the models and batching.max_tokens allow; a longer one is cut,
    without an EOS.
    """

    fraction: Rate = Field(default=0.5, description="Probability that a whole optimizer step is on-policy (the paper's lambda).")
    temperature: PositiveFloat = Field(default=1.0, description="Divides the student's logits when it samples.")
    top_k: PositiveInt | None = Field(default=None, description="Sample from the k most probable tokens; null = all.")
    top_p: Rate | None = Field(default=None, description="Sample from the smallest set with more than this mass; null = all.")
    max_length_ratio: NonNegativeFloat = Field(default=1.2, description="Ratio of the length limit.")
    max_length_offset: PositiveInt = Field(default=10, description="Offset of the length limit, in tokens.")


class Requirement(NamedTuple):
    """use: an objective's key, and its use of something that a recipe may lack. remedy: the change if it is lacking."""

    use: str
    remedy: str


class TeacherNeeds(NamedTuple):
    """precision: of an online teacher, None for the student's. renormalize: change dumped logits of method topk."""

    precision: Precision | None
    renormalize: bool


@dataclass(frozen=True)
class Needs:
    """The needs of an objective besides a model and labels; recipe and build provide it, or refuse the recipe.

    samples: steps whose targets the student samples. source, dropout: keys that have no effect without them. passes: of the model
    over a micro-batch in training. chunk_tokens: positions whose logits exist at one time.
    """

    teacher: TeacherNeeds | None = None
    samples: OnPolicyConfig | None = None
    source: tuple[Requirement, ...] = ()
    dropout: tuple[Requirement, ...] = ()
    passes: int = 1
    chunk_tokens: ChunkTokens = "auto"


class RDropConfig(Config):
    """R-Drop: each training sentence runs twice with different dropout, and the two distributions of a token are kept together.

    The loss is half of (both cross-entropies + alpha times their symmetric divergence). Time and memory of a micro-batch double;
    validation runs once, without it.
    """

    alpha: PositiveFloat = Field(default=1.0, description="Factor of the divergence; the paper has 5 for translation.")


class CrossEntropyConfig(Config):
    """Label-smoothed cross-entropy over target tokens."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="Probability mass spread over the vocabulary.")
    average: Literal["tokens", "sentences"] = Field(
        default="tokens",
        description="Mean over tokens, or over sentences of the mean of their tokens: short ones count as much as long ones.",
    )
    r_drop: RDropConfig | None = Field(default=None, description="R-Drop regularization; null = none.")
    chunk_tokens: ChunkTokens = Field(
        default="auto",
        description="Positions whose logits exist at one time; memory is chunk_tokens x vocabulary. auto = by device "
        "and vocabulary. Moves no result.",
    )

    @property
    def needs(self) -> Needs:
        """Dropout, if there is R-Drop."""
        if self.r_drop is None:
            return Needs(chunk_tokens=self.chunk_tokens)
        dropout = Requirement(f"objective.r_drop.alpha = {self.r_drop.alpha}", "remove objective.r_drop")
        return Needs(dropout=(dropout,), passes=2, chunk_tokens=self.chunk_tokens)

    @property
    def validation(self) -> CrossEntropyConfig:
        """The objective of validation."""
        return self.model_copy(update={"r_drop": None})
