"""What a model learns from text without a source: the tasks and their options. A corpus of pairs is always translated.

A task makes a source and a target of every text, anew in every epoch. Masks and sentinels are symbols of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dstrain.config_base import Config

MaskToken = Annotated[str, Field(description="The symbol of the tokenizer that stands for what is masked.", min_length=1)]
RandomShare = Annotated[float, Field(description="Share of the masks that are random tokens instead.", ge=0, le=1)]


class LanguageModeling(Config):
    """The text is the target, and there is no source."""

    kind: Literal["language_modeling"] = "language_modeling"

    def symbols(self) -> Iterator[str]:
        """What the tokenizer must have."""
        yield from ()


class PrefixLanguageModeling(Config):
    """A text is cut at a random token: the beginning is the source, the rest the target (Raffel et al. 2020, 3.2.3).

    A decoder-only model reads both as one sequence, causally, and learns the rest only.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"

    def symbols(self) -> Iterator[str]:
        """What the tokenizer must have."""
        yield from ()


class Denoising(Config):
    """The target is the text, the source a noised copy (Lewis et al. 2020, BART). The noises act in this order:

    sentences change places, spans are masked, masks are inserted, the text is rotated. One word at least is never masked.
    """

    kind: Literal["denoising"] = "denoising"
    permute_sentences: float = Field(
        default=1.0, ge=0, le=1, description="Share of the sentences of a text that are put in a random order."
    )
    mask: float = Field(default=0.3, ge=0, lt=1, description="Share of the units of a text that are masked.")
    unit: Literal["word", "token"] = Field(
        default="word", description="What is masked as one; words are those that the tokenizer tells: by their start, or by `@@`."
    )
    poisson_lambda: float | None = Field(
        default=3.5,
        ge=1,
        description="Mean units of a span, whose length is Poisson; a span of length 0 inserts a mask. null = single units.",
    )
    replace: Literal["span", "token", "nothing"] = Field(
        default="span", description="What gets a mask: each span (infilling), each token of it, or nothing (deletion)."
    )
    insert: float = Field(default=0.0, ge=0, lt=1, description="Masks inserted at random places, as a share of the tokens.")
    random: RandomShare = 0.0
    rotate: float = Field(
        default=0.0, ge=0, le=1, description="Share of the texts that begin at a random token, the rest at the end."
    )
    sentence_ends: tuple[str, ...] = Field(default=(".", "!", "?"), min_length=1, description="The tokens that end a sentence.")
    mask_token: MaskToken = "<mask>"

    @model_validator(mode="after")
    def _every_key_acts(self) -> Denoising:
        if not (self.mask or self.insert or self.rotate or self.permute_sentences):
            raise ValueError("mask, insert, rotate and permute_sentences are all 0, so nothing is noised; raise one of them")
        if self.random and not self.has_masks:
            raise ValueError("random is a share of the masks, and there are none; raise mask or insert, or leave random out")
        return self

    @property
    def has_masks(self) -> bool:
        """Whether the mask token is used."""
        return bool(self.insert or (self.mask and self.replace != "nothing"))

    def symbols(self) -> Iterator[str]:
        """What the tokenizer must have."""
        if self.has_masks:
            yield self.mask_token


class SpanCorruption(Config):
    """The source has a sentinel for each random span, the target each sentinel and its span (Raffel et al. 2020, T5).

    The numbers of tokens and spans follow from the length of the text.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    noise_density: float = Field(default=0.15, gt=0, lt=1, description="Share of the tokens of a text that are in a span.")
    mean_span_length: float = Field(default=3.0, ge=1, description="Mean tokens of a span.")
    sentinels: str = Field(
        default="<extra_id_{}>", description="The symbols of the tokenizer that stand for spans; {} is their number, from 0."
    )

    @model_validator(mode="after")
    def _sentinels_are_numbered(self) -> SpanCorruption:
        if self.sentinels.count("{}") != 1:
            raise ValueError(f"sentinels = {self.sentinels!r} has no number; write {{}} in its place, as in <extra_id_{{}}>")
        return self

    def sentinel(self, number: int) -> str:
        """One of the symbols."""
        return self.sentinels.replace("{}", str(number))

    def symbols(self) -> Iterator[str]:
        """What the tokenizer must have; a long text needs further sentinels."""
        yield self.sentinel(0)


class Mass(Config):
    """The target is a random fragment of the text, the source the text with this fragment masked (Song et al. 2019, MASS).

    The decoder counts positions from the start of the fragment.
    """

    kind: Literal["mass"] = "mass"
    share: float = Field(default=0.5, gt=0, lt=1, description="Tokens of the fragment, as a share of the text.")
    random: RandomShare = 0.1
    unchanged: float = Field(default=0.1, ge=0, le=1, description="Share of the masks where the token stays instead.")
    mask_token: MaskToken = "<mask>"

    @model_validator(mode="after")
    def _masks_remain(self) -> Mass:
        if self.random + self.unchanged > 1:
            raise ValueError(f"random = {self.random:g} and unchanged = {self.unchanged:g} are together more than 1; lower one")
        return self

    def symbols(self) -> Iterator[str]:
        """What the tokenizer must have."""
        yield self.mask_token


TextTask = Annotated[LanguageModeling | PrefixLanguageModeling | Denoising | SpanCorruption | Mass, Field(discriminator="kind")]
