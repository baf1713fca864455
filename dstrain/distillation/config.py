"""What a student learns from a teacher, and on which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dstrain.config_base import Config, Precision
from dstrain.objectives.config import CrossEntropyConfig


class ForwardKl(Config):
    """KL(teacher || student): the student must cover all that the teacher says. Stores of drawn types give it alone."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKl(Config):
    """KL(student || teacher): the student must say nothing that the teacher does not."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(Config):
    """Between both; beta as in GKD: 0 is forward_kl, 1 is reverse_kl."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(default=0.5, ge=0, le=1)


class TotalVariation(Config):
    """Half the sum of absolute differences."""

    kind: Literal["total_variation"] = "total_variation"


class SkewKl(Config):
    """KL(teacher || alpha teacher + (1 - alpha) student), as in DistiLLM."""

    kind: Literal["skew_kl"] = "skew_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1)


DivergenceConfig = Annotated[
    ForwardKl | ReverseKl | JensenShannon | TotalVariation | SkewKl,
    Field(discriminator="kind"),
]

Rate = Annotated[float, Field(gt=0, le=1)]


class WordSelection(Config):
    """All tokens, from the teacher alone: the labels play no part, so hard_weight and label_smoothing are 0."""

    kind: Literal["word"] = "word"


class WordAndSequenceSelection(Config):
    """All tokens, from the teacher beside the labels."""

    kind: Literal["word_and_sequence"] = "word_and_sequence"


class BatchSelection(Config):
    """The share `rate` of each optimizer step's tokens that the student finds hardest."""

    kind: Literal["batch"] = "batch"
    rate: Rate = 0.5


class GlobalSelection(Config):
    """Tokens of a step that are as hard as the share `rate` of the last `queue_size` tokens, this step's included."""

    kind: Literal["global"] = "global"
    rate: Rate = 0.5
    queue_size: PositiveInt = 30_000


class GlobalByLanguageSelection(Config):
    """As `global`, with a queue of `queue_size` for each language.

    tags: every source sentence begins with one of these symbols, and each of them begins some sentence.
    """

    kind: Literal["global_by_language"] = "global_by_language"
    rate: Rate = 0.5
    queue_size: PositiveInt = 30_000
    tags: list[str] = Field(min_length=1)


SelectionConfig = Annotated[
    WordSelection | WordAndSequenceSelection | BatchSelection | GlobalSelection | GlobalByLanguageSelection,
    Field(discriminator="kind"),
]


class OnPolicyConfig(Config):
    """On-policy distillation: on some steps the student learns from what the teacher says of the student's own samples.

    After Agarwal et al., ICLR 2024, "On-Policy Distillation of Language Models". fraction: the chance of each optimizer step, as
    a whole, to be such a step (the paper's lambda). temperature, top_k, top_p: how the student samples, as in `generation`.
    max_length_ratio, max_length_offset: a sample has at most ratio x source length + offset tokens (source with its EOS), and
    never more than the models and batching.max_tokens allow; what has not ended by then is cut, without an EOS.
    """

    fraction: Rate = 0.5
    temperature: PositiveFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: Rate | None = None
    max_length_ratio: NonNegativeFloat = 1.2
    max_length_offset: PositiveInt = 10


class HiddenStatesFeature(Config):
    """Hidden states of the student resemble the teacher's; see `objectives/features.py`.

    side: of the encoder at all source tokens, of the decoder at all target tokens. loss: `mse`, the mean squared difference of a
    state's numbers; `cosine`, 1 - the cosine. layers: the teacher's layer for each of the student's that learns, counted in
    passes from 1, 0 for what the first one reads; left out, the student's are spread evenly over the teacher's, last to last,
    without 0. Where the models are not equally wide, the student's states are projected first, by one learned matrix.
    """

    kind: Literal["hidden_states"] = "hidden_states"
    side: Literal["encoder", "decoder"]
    loss: Literal["mse", "cosine"] = "mse"
    weight: PositiveFloat = 1.0
    layers: dict[NonNegativeInt, NonNegativeInt] | None = Field(default=None, min_length=1)


class AttentionFeature(Config):
    """Tokens of the student look where those of the teacher look; see `objectives/features.py`.

    side: self-attention of encoder or decoder, or the decoder's `cross` attention to the source. loss, of the probabilities
    averaged over the heads: `squared_error` and `kl`, KL(teacher || student), are sums over the keys; `cosine` is 1 - the cosine.
    layers: as those of hidden states, without 0.
    """

    kind: Literal["attention"] = "attention"
    side: Literal["encoder", "decoder", "cross"]
    loss: Literal["squared_error", "kl", "cosine"] = "kl"
    weight: PositiveFloat = 1.0
    layers: dict[PositiveInt, PositiveInt] | None = Field(default=None, min_length=1)


FeatureConfig = Annotated[HiddenStatesFeature | AttentionFeature, Field(discriminator="kind")]


class DistillationConfig(Config):
    """hard_weight x label-smoothed cross-entropy + kd_weight x temperature^2 x divergence from the teacher on selected tokens.

    features: what is learned besides from inside one teacher at work, each `weight` times, on all tokens whatever is selected.
    temperature: divides the logits of both models in the divergence. hard_weight: 1, or 0 where `selection` is `word`;
    label_smoothing: 0.1, or 0 where there is no hard loss to smooth. teacher_precision: what a teacher at work computes in, None
    for engine.precision. renormalize: give the mass of the types that dumped logits of method topk leave out to those they keep,
    which is biased. on_policy: steps on the student's own samples, None for none. On these there are no labels: no hard loss, and
    every token learns from the teacher whatever `selection` says, whose queues stay as they are. chunk_tokens: positions whose
    logits exist at one time; memory is a few times chunk_tokens x vocabulary. It moves no result.
    """

    kind: Literal["distillation"] = "distillation"
    divergence: DivergenceConfig = Field(default_factory=ForwardKl)
    temperature: PositiveFloat = 1.0
    kd_weight: PositiveFloat = 1.0
    hard_weight: NonNegativeFloat = 1.0
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    selection: SelectionConfig = Field(default_factory=WordAndSequenceSelection)
    features: tuple[FeatureConfig, ...] = ()
    teacher_precision: Precision | None = None
    renormalize: bool = False
    on_policy: OnPolicyConfig | None = None
    chunk_tokens: PositiveInt = 256

    @model_validator(mode="before")
    @classmethod
    def _without_labels(cls, data: Any) -> Any:
        """What follows from `word` and from hard_weight = 0 where nothing else is said."""
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
                f"selection.kind = word learns from the teacher alone, but hard_weight = {self.hard_weight}; leave hard_weight "
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


ObjectiveConfig = Annotated[CrossEntropyConfig | DistillationConfig, Field(discriminator="kind")]
