"""How text is generated: beam search or sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from dstrain.config_base import Config
from dstrain.errors import RecipeError
from dstrain.storage.explain import explain


class _Limits(Config):
    """The fields of both methods.

    A hypothesis has at most ratio x source length + offset tokens before EOS, and never more than the model allows. The source
    length includes its EOS; if the source is empty, the prefix's length counts instead.
    """

    max_length_ratio: NonNegativeFloat = Field(default=1.2, description="Ratio of the length limit.")
    max_length_offset: NonNegativeInt = Field(default=10, description="Offset of the length limit, in tokens.")
    min_length: NonNegativeInt = Field(default=1, description="Least tokens before EOS.")
    num_best: PositiveInt = Field(default=1, description="Hypotheses returned.")
    temperature: PositiveFloat = Field(default=1.0, description="Divides the logits.")
    unk_penalty: float = Field(default=0.0, description="Subtracted from the log-probability of `<unk>`.")
    no_repeat_ngram: NonNegativeInt = Field(default=0, description="Length of n-grams that may not occur twice; 0 = any may.")
    length_penalty: float = Field(default=1.0, description="A normalized score is divided by length ** length_penalty.")
    score: Literal["normalized", "sum"] = Field(
        default="normalized", description="sum = the log-probability of the hypothesis; normalized = that by its length."
    )
    max_tokens: PositiveInt = Field(default=12_000, description="Decoder rows x (source + prefix) length of one batch.")


class BeamSearchConfig(_Limits):
    """Beam search."""

    kind: Literal["beam"] = "beam"
    beam_size: PositiveInt = Field(default=5, description="Hypotheses kept at each step; 1 is greedy search.")
    groups: PositiveInt = Field(default=1, description="More than 1: diverse beam search with so many groups.")
    diversity: NonNegativeFloat = Field(default=0.5, description="Strength of diverse beam search.")

    @model_validator(mode="after")
    def _sizes(self) -> BeamSearchConfig:
        if self.num_best > self.beam_size:
            raise ValueError(f"num_best = {self.num_best} exceeds beam_size = {self.beam_size}; raise beam_size")
        if self.beam_size % self.groups:
            raise ValueError(f"groups = {self.groups} does not divide beam_size = {self.beam_size}")
        return self


class SamplingConfig(_Limits):
    """`num_best` independent samples."""

    kind: Literal["sampling"] = "sampling"
    top_k: PositiveInt | None = Field(default=None, description="Sample from the k most probable tokens; null = all.")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Sample from the smallest set with more than this mass; null = all."
    )
    seed: NonNegativeInt = Field(default=1, description="Decides the samples.")


GenerationConfig = Annotated[BeamSearchConfig | SamplingConfig, Field(discriminator="kind")]


def generation_config(section: Mapping[str, Any] | None, options: Mapping[str, Any]) -> GenerationConfig:
    """A section of a bundle's recipe, overridden by the options that are not None; defaults if there is none.

    A beam size without a kind means beam search. RecipeError explains every mistake.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    section = dict(section or {})
    kind = chosen.get("kind", "beam" if "beam_size" in chosen else section.get("kind", "beam"))
    method = SamplingConfig if kind == "sampling" else BeamSearchConfig
    if section.get("kind", "beam") != kind:
        section = {name: value for name, value in section.items() if name in method.model_fields}
    if problems := list(_without_effect(chosen, method)):
        raise RecipeError("generation options: " + "; ".join(problems))
    try:
        config = method.model_validate({**section, **chosen, "kind": kind})
    except ValidationError as error:
        raise RecipeError("generation options: " + "; ".join(explain(error, method))) from error
    if "diversity" in chosen and isinstance(config, BeamSearchConfig) and config.groups == 1:
        raise RecipeError("generation options: diversity has no effect in one group; give groups (--groups) too, or leave it out")
    return config


def _without_effect(chosen: Mapping[str, Any], method: type[GenerationConfig]) -> Iterator[str]:
    """The options that only the other method has."""
    searches = method is BeamSearchConfig
    other: type[GenerationConfig] = SamplingConfig if searches else BeamSearchConfig
    here = "beam search" if searches else "sampling"
    remedy = "choose kind: sampling (--sampling)" if searches else "choose kind: beam (by --beam-size, without --sampling)"
    for name in chosen:
        if name in other.model_fields and name not in method.model_fields:
            yield f"{name} (--{name.replace('_', '-')}) has no effect in {here}; {remedy}, or leave it out"
