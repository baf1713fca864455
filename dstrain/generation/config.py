"""How text is generated: beam search or sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dstrain.config_base import Config


class _Limits(Config):
    """What both methods share.

    max_length_ratio, max_length_offset: a hypothesis has at most ratio * source length + offset tokens before EOS, and never
    more than the model allows; source length counts its EOS, and where the source is empty that of the prefix takes its place.
    min_length: tokens before EOS. num_best: hypotheses returned.
    unk_penalty is subtracted from the log-probability of <unk>. max_tokens: decoder rows x (source + prefix) length of one batch.
    """

    max_length_ratio: NonNegativeFloat = 1.2
    max_length_offset: NonNegativeInt = 10
    min_length: NonNegativeInt = 1
    num_best: PositiveInt = 1
    temperature: PositiveFloat = 1.0
    unk_penalty: float = 0.0
    no_repeat_ngram: NonNegativeInt = 0
    length_penalty: float = 1.0
    score: Literal["normalized", "sum"] = "normalized"
    max_tokens: PositiveInt = 12_000


class BeamSearchConfig(_Limits):
    """Beam search; beam_size 1 is greedy. groups > 1 is diverse beam search with `diversity` as its strength."""

    kind: Literal["beam"] = "beam"
    beam_size: PositiveInt = 5
    groups: PositiveInt = 1
    diversity: NonNegativeFloat = 0.5

    @model_validator(mode="after")
    def _sizes(self) -> BeamSearchConfig:
        if self.num_best > self.beam_size:
            raise ValueError(f"num_best = {self.num_best} exceeds beam_size = {self.beam_size}; raise beam_size")
        if self.beam_size % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide beam_size = {self.beam_size}")
        return self


class SamplingConfig(_Limits):
    """`num_best` independent samples. top_k: only the k best tokens; top_p: the smallest set with more than that mass."""

    kind: Literal["sampling"] = "sampling"
    top_k: PositiveInt | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: NonNegativeInt = 1


GenerationConfig = Annotated[BeamSearchConfig | SamplingConfig, Field(discriminator="kind")]
