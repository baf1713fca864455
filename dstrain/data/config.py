"""Where text comes from, how it becomes ids, and how ids become steps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from dstrain.config_base import Config


class ParallelText(Config):
    """Two line-parallel files, plain or .gz. `${NAME}` in a path is read from the environment."""

    kind: Literal["parallel"] = "parallel"
    source: str
    target: str


class TsvText(Config):
    """One tab-separated file, plain or .gz, without a header; columns count from 0."""

    kind: Literal["tsv"] = "tsv"
    path: str
    source_column: NonNegativeInt = 0
    target_column: NonNegativeInt = 1


class JsonlText(Config):
    """One JSON object a line, plain or .gz; the two fields hold strings."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    source_field: str = "source"
    target_field: str = "target"


class GrammarText(Config):
    """English-German pairs made by dstrain's own grammar. `test` sentences hold combinations that `train` never shows."""

    kind: Literal["grammar"] = "grammar"
    split: Literal["train", "valid", "test"]
    num_pairs: PositiveInt
    seed: NonNegativeInt = 1


class FairseqIds(Config):
    """What `fairseq-preprocess` wrote: PREFIX.bin and PREFIX.idx of each side, ids of the dictionaries that `tokenizer` names.

    Inside a sentence <s>, <pad> and </s> are read as <unk>, as in text.
    """

    kind: Literal["fairseq"] = "fairseq"
    source: str
    target: str


class PlainText(Config):
    """Text without a source, for language models: an example a line, plain or .gz; blank lines are left out of every split."""

    kind: Literal["text"] = "text"
    path: str


class FairseqText(Config):
    """What `fairseq-preprocess --only-source` wrote, PREFIX.bin and PREFIX.idx: ids of text without a source, as `text` is."""

    kind: Literal["fairseq_text"] = "fairseq_text"
    path: str


TextSource = Annotated[
    ParallelText | TsvText | JsonlText | GrammarText | FairseqIds | PlainText | FairseqText, Field(discriminator="kind")
]


def is_text_alone(source: TextSource) -> bool:
    """Whether a corpus is text without a source."""
    return isinstance(source, PlainText | FairseqText)


def has_no_source(sources: Iterable[TextSource]) -> bool:
    """Whether these corpora are text without a source, all of them."""
    return all(map(is_text_alone, sources))


class TrainedSentencePiece(Config):
    """Train SentencePiece on the training text. Ids 0-3 are <s> <pad> </s> <unk>, then `user_symbols`, `tags`, then pieces.

    user_symbols: never cut, wherever they stand. tags: words that are one token each, such as the language tags of source lines
    like `eng_Latn hin_Deva text`; a user symbol at the beginning of a word is two tokens, the space before it and itself.
    max_training_lines: lines that one model learns from, both sides together where it is joint; spread evenly over the corpora.
    The memory of `prepare` grows with the corpus until then, and not beyond.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"
    model_type: Literal["bpe", "unigram"] = "bpe"
    vocab_size: PositiveInt = 8000
    sharing: Literal["joint", "separate"] = "joint"
    character_coverage: float = Field(default=1.0, gt=0, le=1)
    user_symbols: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    max_training_lines: PositiveInt = 5_000_000


class GivenSentencePiece(Config):
    """Use existing SentencePiece models; without `target_model` one model serves both sides."""

    kind: Literal["sentencepiece_files"] = "sentencepiece_files"
    source_model: str
    target_model: str | None = None


class GivenTokenizer(Config):
    """Use the `tokenizer/` directory of a bundle or of prepared data, fairseq dictionaries included."""

    kind: Literal["tokenizer_directory"] = "tokenizer_directory"
    path: str


class FairseqDictionaries(Config):
    """Use fairseq's dict.txt files; without `target` one serves both sides.

    source_model, target_model: SentencePiece models that split text into the dictionaries' symbols; without one it is split by
    white space. tags: words before the text that a model does not split, as the dictionaries spell them, or patterns of these
    such as `???_????` for the language tags of `eng_Latn hin_Deva text`.
    """

    kind: Literal["fairseq_dictionaries"] = "fairseq_dictionaries"
    source: str
    target: str | None = None
    source_model: str | None = None
    target_model: str | None = None
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_key_acts(self) -> FairseqDictionaries:
        if self.target is None and self.target_model is not None:
            raise ValueError("target_model stands without target; give target, or leave both out for one tokenizer of both sides")
        if self.tags and self.source_model is None and self.target_model is None:
            raise ValueError("tags act before a SentencePiece model, and there is none: words stay whole anyway; leave tags out")
        return self


TokenizerConfig = Annotated[
    TrainedSentencePiece | GivenSentencePiece | GivenTokenizer | FairseqDictionaries, Field(discriminator="kind")
]


class FilterConfig(Config):
    """Which training pairs are dropped, by tokens including EOS; each drop is counted and reported.

    Of text without a source, `max_target_length` alone is asked.
    """

    max_source_length: PositiveInt = 1024
    max_target_length: PositiveInt = 1024
    max_ratio: float | None = Field(default=None, gt=1)


class DataConfig(Config):
    """The corpora of a recipe. Every split keeps its order; only `train` is filtered by length and ratio.

    Evaluation splits keep every pair, empty ones included. pairs_per_shard: pairs of the corpora, dropped ones included.
    Where pairs are counted, a line of text without a source is one.
    """

    train: tuple[TextSource, ...] = Field(min_length=1)
    valid: tuple[TextSource, ...] = Field(min_length=1)
    test: dict[str, tuple[TextSource, ...]] = Field(default_factory=dict)
    tokenizer: TokenizerConfig = Field(default_factory=TrainedSentencePiece)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    pairs_per_shard: PositiveInt = 500_000

    @model_validator(mode="after")
    def _ids_have_dictionaries(self) -> DataConfig:
        ids = any(isinstance(source, FairseqIds | FairseqText) for _, source in self.corpora())
        if ids and self.tokenizer.kind != "fairseq_dictionaries":
            raise ValueError(
                f"tokenizer.kind = {self.tokenizer.kind} does not know the ids of a fairseq corpus; choose fairseq_dictionaries"
            )
        return self

    @field_validator("test")
    @classmethod
    def _names_are_directories(cls, test: dict[str, tuple[TextSource, ...]]) -> dict[str, tuple[TextSource, ...]]:
        for name, sources in test.items():
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in {"train", "valid", "tokenizer"}:
                raise ValueError(
                    f"{name!r} cannot name a test set: use letters, digits, '_', '.', '-', but not train, valid or tokenizer"
                )
            if not sources:
                raise ValueError(f"test set {name!r} names no text")
        return test

    def corpora(self) -> Iterator[tuple[str, TextSource]]:
        """Every corpus with its place in the recipe: `train.0`, `valid.0`, `test.NAME.0`."""
        splits = {"train": self.train, "valid": self.valid, **{f"test.{name}": sources for name, sources in self.test.items()}}
        for split, sources in splits.items():
            for number, source in enumerate(sources):
                yield f"{split}.{number}", source


class BatchingConfig(Config):
    """How examples become steps.

    tokens_per_step: target tokens of one optimizer step over all ranks, never exceeded unless one sentence alone does.
    max_tokens: padded tokens of one micro-batch on one rank: rows x max(longest source, longest target); of a decoder-only model,
    which reads both as one sequence, rows x (longest source + longest target - 1).
    bucket_tokens: target tokens of neighbors in length that stay together; a step of several such buckets holds short and long
    sentences. Less than `max_tokens` by what padding takes makes each a micro-batch. shuffle_window: examples that are sorted by
    length together; the memory that planning costs.
    """

    tokens_per_step: PositiveInt
    max_tokens: PositiveInt
    bucket_tokens: PositiveInt = 4096
    shuffle_window: PositiveInt = 1_000_000
