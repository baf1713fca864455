"""Distillation: divergences, token selection, features and on-policy samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dstrain.config_base import ChunkTokens, Config, Precision
from dstrain.objectives.config import CrossEntropyConfig, Needs, OnPolicyConfig, Rate, Requirement, TeacherNeeds


class ForwardKl(Config):
    """KL(teacher || student): the student must cover all that the teacher predicts. Stores of sampled tokens give only this."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKl(Config):
    """KL(student || teacher): the student must predict nothing that the teacher does not."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(Config):
    """Generalized Jensen-Shannon divergence, between forward and reverse KL."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(default=0.5, ge=0, le=1, description="As in GKD: 0 is forward_kl, 1 is reverse_kl.")


class TotalVariation(Config):
    """Half the sum of absolute differences."""

    kind: Literal["total_variation"] = "total_variation"


class SkewKl(Config):
    """KL(teacher || alpha teacher + (1 - alpha) student), as in DistiLLM."""

    kind: Literal["skew_kl"] = "skew_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1, description="Share of the teacher in the mixture.")


DivergenceConfig = Annotated[
    ForwardKl | ReverseKl | JensenShannon | TotalVariation | SkewKl,
    Field(discriminator="kind"),
]


class WordSelection(Config):
    """All tokens, only from the teacher: the labels are not used, so hard_weight and label_smoothing are 0."""

    kind: Literal["word"] = "word"


class WordAndSequenceSelection(Config):
    """All tokens, from the teacher beside the labels."""

    kind: Literal["word_and_sequence"] = "word_and_sequence"


class BatchSelection(Config):
    """The tokens of each optimizer step with the largest loss of the student."""

    kind: Literal["batch"] = "batch"
    rate: Rate = Field(default=0.5, description="Share of the step's tokens.")


class GlobalSelection(Config):
    """Tokens of a step whose loss reaches that of the hardest share `rate` of the last `queue_size` tokens, its own included."""

    kind: Literal["global"] = "global"
    rate: Rate = Field(default=0.5, description="Share of the queue's tokens.")
    queue_size: PositiveInt = Field(default=30_000, description="Tokens in the queue.")


class GlobalByLanguageSelection(Config):
    """As `global`, with a queue per language."""

    kind: Literal["global_by_language"] = "global_by_language"
    rate: Rate = Field(default=0.5, description="Share of the queue's tokens.")
    queue_size: PositiveInt = Field(default=30_000, description="Tokens in each queue.")
    tags: list[str] = Field(
        min_length=1, description="Language symbols: every source begins with one of them, and each begins some source."
    )


SelectionConfig = Annotated[
    WordSelection | WordAndSequenceSelection | BatchSelection | GlobalSelection | GlobalByLanguageSelection,
    Field(discriminator="kind"),
]


class HiddenStatesFeature(Config):
    """Hidden states of the student follow the teacher's; see `distillation/features.py`.

    If the models differ in width, the student's states are projected first, by one learned matrix.
    """

    kind: Literal["hidden_states"] = "hidden_states"
    side: Literal["encoder", "decoder"] = Field(
        description="encoder = states of all source tokens; decoder = states of all target tokens."
    )
    loss: Literal["mse", "cosine"] = Field(default="mse", description="mse = mean squared difference; cosine = 1 - cosine.")
    weight: PositiveFloat = Field(default=1.0, description="Factor of this loss.")
    layers: dict[NonNegativeInt, NonNegativeInt] | None = Field(
        default=None,
        min_length=1,
        description="Student layer -> teacher layer, from 1; 0 = input of the first; null = spread evenly.",
    )


class AttentionFeature(Config):
    """Attention probabilities of the student, averaged over heads, follow the teacher's; see `distillation/features.py`."""

    kind: Literal["attention"] = "attention"
    side: Literal["encoder", "decoder", "cross"] = Field(
        description="Self-attention of encoder or decoder, or the decoder's cross-attention to the source."
    )
    loss: Literal["squared_error", "kl", "cosine"] = Field(
        default="kl", description="squared_error and kl, KL(teacher || student), are sums over the keys; cosine = 1 - cosine."
    )
    weight: PositiveFloat = Field(default=1.0, description="Factor of this loss.")
    layers: dict[PositiveInt, PositiveInt] | None = Field(
        default=None, min_length=1, description="Student layer -> teacher layer, in passes from 1; null = spread evenly."
    )


FeatureConfig = Annotated[HiddenStatesFeature | AttentionFeature, Field(discriminator="kind")]


class DistillationConfig(Config):
    """hard_weight x label-smoothed cross-entropy + kd_weight x temperature^2 x divergence from the teacher on selected tokens.

    On-policy steps have no labels: no hard loss, and every token learns from the teacher for any `selection`, whose queues
    stay as they are. Features need an online teacher and count on all tokens, selected or not.
    """

    kind: Literal["distillation"] = "distillation"
    divergence: DivergenceConfig = Field(default_factory=ForwardKl, description="Distance of the student from the teacher.")
    temperature: PositiveFloat = Field(default=1.0, description="Divides the logits of both models in the divergence.")
    kd_weight: PositiveFloat = Field(default=1.0, description="Factor of the divergence.")
    hard_weight: NonNegativeFloat = Field(
        default=1.0, description="Factor of the cross-entropy; 0 if selection is word and nothing is given."
    )
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="Of the cross-entropy; 0 if hard_weight is 0 and nothing is given."
    )
    selection: SelectionConfig = Field(
        default_factory=WordAndSequenceSelection, description="Which tokens learn from the teacher."
    )
    features: tuple[FeatureConfig, ...] = Field(default=(), description="Inner values of the teacher that are matched too.")
    teacher_precision: Precision | None = Field(
        default=None, description="Precision of an online teacher; null = engine.precision."
    )
    renormalize: bool = Field(
        default=False, description="Give the mass outside the stored top-k tokens to the stored ones, which is biased."
    )
    on_policy: OnPolicyConfig | None = Field(default=None, description="Steps on the student's own samples; null = none.")
    chunk_tokens: ChunkTokens = Field(
        default="auto",
        description="Positions whose logits exist at one time; memory is a few times chunk_tokens x vocabulary. auto = by device "
        "and vocabulary. Moves no result.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_labels(cls, data: Any) -> Any:
        """Defaults that follow from `word` and from hard_weight = 0."""
        if not isinstance(data, Mapping):
            return data
        selection = data.get("selection")
        kind = selection.get("kind") if isinstance(selection, Mapping) else getattr(selection, "kind", None)
        data = {"hard_weight": 0.0, **data} if kind == "word" else data
        return {"label_smoothing": 0.0, **data} if data.get("hard_weight") == 0 else data

    @model_validator(mode="after")
    def _every_key_acts(self) -> DistillationConfig:
        if self.selection.kind == "word" and self.hard_weight:
            raise ValueError(
                f"selection.kind = word learns from the teacher only, but hard_weight = {self.hard_weight}; leave hard_weight "
                "out, or choose selection: {kind: word_and_sequence}"
            )
        if self.selection.kind == "word_and_sequence" and not self.hard_weight:
            raise ValueError(
                "selection.kind = word_and_sequence learns from the labels too, but hard_weight = 0; choose selection: "
                "{kind: word}, or raise hard_weight"
            )
        if self.label_smoothing and not self.hard_weight:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing} smooths the hard loss, but hard_weight = 0; leave it out or at 0"
            )
        if self.on_policy is not None and self.on_policy.fraction == 1 and self.selection.kind != "word":
            raise ValueError(
                f"on_policy.fraction = 1 leaves no step with labels, which selection.kind = {self.selection.kind} needs; choose "
                "selection: {kind: word}, or a smaller fraction"
            )
        return self

    @model_validator(mode="after")
    def _features_differ(self) -> DistillationConfig:
        seen: dict[tuple[str, str, str], int] = {}
        for number, feature in enumerate(self.features):
            first = seen.setdefault((feature.kind, feature.side, feature.loss), number)
            if first != number:
                raise ValueError(
                    f"features.{first} and features.{number} are both {feature.kind} of side {feature.side} by {feature.loss}, "
                    "and would be reported as one; put their layers into one map"
                )
        return self

    @property
    def needs(self) -> Needs:
        """A teacher, and a source if samples or language tags need one."""
        source = []
        if self.on_policy is not None:
            source.append(Requirement("objective.on_policy samples a target for each source", "remove it"))
        if self.selection.kind == "global_by_language":
            use = "objective.selection.kind = global_by_language reads the language from the source"
            source.append(Requirement(use, "choose selection: {kind: global}"))
        return Needs(
            TeacherNeeds(self.teacher_precision, self.renormalize),
            samples=self.on_policy,
            source=tuple(source),
            chunk_tokens=self.chunk_tokens,
        )

    @property
    def validation(self) -> CrossEntropyConfig:
        """The objective of validation: the student's own loss on the labels, which needs no teacher."""
        return CrossEntropyConfig(label_smoothing=self.label_smoothing, chunk_tokens=self.chunk_tokens)
