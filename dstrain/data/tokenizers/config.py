"""How text becomes ids: a tokenizer that is trained, or one that is there."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from dstrain.config_base import Config


class TrainedSentencePiece(Config):
    """Train SentencePiece on the training text. Ids 0-3 are `<s> <pad> </s> <unk>`, then `user_symbols`, `tags`, then pieces.

    The memory of `prepare` grows with the corpus up to `max_training_lines`, and not beyond.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"
    model_type: Literal["bpe", "unigram"] = Field(default="bpe", description="SentencePiece's algorithm.")
    vocab_size: PositiveInt = Field(default=8000, description="Vocabulary entries, special tokens included.")
    sharing: Literal["joint", "separate"] = Field(default="joint", description="One model for both sides, or one for each.")
    character_coverage: float = Field(default=1.0, gt=0, le=1, description="Share of characters in the text that get a piece.")
    user_symbols: tuple[str, ...] = Field(
        default=(),
        description="Strings that are never split; at the beginning of a word one is two tokens, the space before it and itself.",
    )
    tags: tuple[str, ...] = Field(
        default=(), description="Words of one token each, such as the language tags of `eng_Latn hin_Deva text`."
    )
    max_training_lines: PositiveInt = Field(
        default=5_000_000,
        description="Lines that one model is trained on, at even intervals over the corpora; both sides together if it is joint.",
    )


class SentencePieceFiles(Config):
    """Use existing SentencePiece models."""

    kind: Literal["sentencepiece_files"] = "sentencepiece_files"
    source_model: str = Field(description="Model file of the source side.")
    target_model: str | None = Field(default=None, description="Model file of the target side; null = the source's.")


class TokenizerDirectory(Config):
    """Use the `tokenizer/` directory of a bundle or of prepared data, fairseq dictionaries included."""

    kind: Literal["tokenizer_directory"] = "tokenizer_directory"
    path: str = Field(description="The directory.")


class FairseqDictionaries(Config):
    """Use fairseq's dict.txt files."""

    kind: Literal["fairseq_dictionaries"] = "fairseq_dictionaries"
    source: str = Field(description="Dictionary of the source side.")
    target: str | None = Field(default=None, description="Dictionary of the target side; null = one tokenizer for both sides.")
    source_model: str | None = Field(
        default=None, description="SentencePiece model that splits source text into symbols; null = text is split by white space."
    )
    target_model: str | None = Field(default=None, description="The same for target text.")
    tags: tuple[str, ...] = Field(
        default=(),
        description="Words before the text that the model does not split, or patterns of them: ???_???? for eng_Latn.",
    )

    @model_validator(mode="after")
    def _every_key_acts(self) -> FairseqDictionaries:
        if self.target is None and self.target_model is not None:
            raise ValueError("target_model is set without target; give target, or leave both out for one tokenizer of both sides")
        if self.tags and self.source_model is None and self.target_model is None:
            raise ValueError("tags act before a SentencePiece model, and there is none: words stay whole anyway; leave tags out")
        return self


TokenizerConfig = Annotated[
    TrainedSentencePiece | SentencePieceFiles | TokenizerDirectory | FairseqDictionaries, Field(discriminator="kind")
]
