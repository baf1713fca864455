"""Where text comes from, and how its ids become steps."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from dstrain.config_base import Config
from dstrain.data.batching.config import LinePattern, PackingConfig
from dstrain.data.filtering import FilterConfig
from dstrain.data.sampling import CorpusName, MixtureConfig
from dstrain.data.shuffling import ExampleShuffle, ShuffleConfig
from dstrain.data.tasks.config import LanguageModeling, TextTask
from dstrain.data.tokenizers.config import TokenizerConfig, TrainedSentencePiece
from dstrain.log import logger


class Corpus(Config):
    """What every corpus has. Corpora of one name are one corpus to sampling, losses, scores and tags."""

    name: CorpusName | None = Field(
        default=None, description="Name of the corpus or its direction, such as en-de; all corpora of a split have one, or none."
    )

    @property
    def text_task(self) -> TextTask | None:
        """What a model learns from text without a source; None for pairs, which are translated."""
        return None


class ParallelText(Corpus):
    """Two line-parallel files, plain or compressed (gzip, bzip2, xz, zstd). `${NAME}` and `$NAME` in a path are read from the
    environment, `~` is the home directory."""

    kind: Literal["parallel"] = "parallel"
    source: str = Field(description="File of the source side.")
    target: str = Field(description="File of the target side, line by line.")


class Columns(Corpus):
    """A corpus of columns, from which the recipe chooses: two of them are pairs, one is text without a source."""

    task: TextTask | None = Field(
        default=None, description="What a model learns from text without a source; null = language modeling."
    )

    @property
    @abstractmethod
    def has_source(self) -> bool:
        """Whether a column of sources is chosen."""

    @property
    def text_task(self) -> TextTask | None:
        """The task, if there is no source."""
        return None if self.has_source else self.task or LanguageModeling()

    @model_validator(mode="after")
    def _task_acts(self) -> Self:
        if self.task is not None and self.has_source:
            raise ValueError(
                "task is for text without a source; leave it out, or choose no source (source: null, in tsv source_column: null)"
            )
        return self


class TsvText(Columns):
    """One tab-separated file, plain or compressed; columns count from 0. All lines must have as many columns as the first.

    Nothing is quoted: a quotation mark is text.
    """

    kind: Literal["tsv"] = "tsv"
    path: str = Field(description="The file.")
    source_column: NonNegativeInt | None = Field(
        default=0, description="Column of the source; null = the target is all there is."
    )
    target_column: NonNegativeInt = Field(default=1, description="Column of the target.")
    header: bool = Field(default=False, description="Whether the first line names the columns, and is no pair.")

    @property
    def has_source(self) -> bool:
        """Whether there is a column of sources."""
        return self.source_column is not None


FieldPath = Annotated[str, Field(min_length=1)]
"""The name of a field; `a.b` is field b inside field a, `a.0` the first item of a list."""


class Records(Columns):
    """A corpus of records with named fields.

    A path of fields may lead inside: `translation.en`, or `target.0` for the first of several references.
    """

    source: FieldPath | None = Field(
        default="source", description="Field of the source, or the path to it; null = the target is all there is."
    )
    target: FieldPath = Field(default="target", description="Field of the target, or the path to it.")
    join: str | None = Field(default=None, description="What stands between the strings of a list; null = lists are refused.")
    references: FieldPath | None = Field(
        default=None,
        description="List of all references, with which generated text is compared; of evaluation splits only; null = the target "
        "is the only one.",
    )

    @property
    def has_source(self) -> bool:
        """Whether there is a field of sources."""
        return self.source is not None


class JsonlText(Records):
    """One JSON object per line, plain or compressed; blank lines at the end do not count."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="The file.")

    @model_validator(mode="before")
    @classmethod
    def _rename_keys(cls, tree: object) -> object:
        if not isinstance(tree, Mapping):
            return tree
        names = {f"{side}_field": side for side in ("source", "target") if side not in tree}
        if names.keys() & tree.keys():
            _warn_of_old_keys()
        return {names.get(key, key): value for key, value in tree.items()}


class ParquetTable(Records):
    """One parquet file, an example per row; its columns are fields."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="The file.")


class HuggingFaceDataset(Records):
    """A data set of Hugging Face, from the disk or the hub; needs `dstrain[hf]`. Its columns are fields."""

    kind: Literal["huggingface"] = "huggingface"
    dataset: str = Field(description="Directory of `save_to_disk`, folder of parquet or JSON files, or a name of the hub.")
    config: str | None = Field(default=None, description="Configuration of the data set, such as a language pair.")
    split: str | None = Field(default=None, description="Which split; null if there is only one.")


@cache
def _warn_of_old_keys() -> None:
    logger.warning("kind: jsonl: source_field and target_field are source and target since 0.2; rename them in the recipe")


RecordSource = JsonlText | ParquetTable | HuggingFaceDataset
"""Corpora whose examples are records with named fields."""


class GrammarText(Corpus):
    """English-German pairs made by dstrain's own grammar. `test` sentences hold combinations that `train` never has."""

    kind: Literal["grammar"] = "grammar"
    split: Literal["train", "valid", "test"] = Field(description="Which sentences are made.")
    num_pairs: PositiveInt = Field(description="How many are made.")
    seed: NonNegativeInt = Field(default=1, description="Decides the sentences.")


class FairseqIds(Corpus):
    """Output of `fairseq-preprocess`: PREFIX.bin and PREFIX.idx of each side, ids of the dictionaries that `tokenizer` names.

    Inside a sentence `<s>`, `<pad>` and `</s>` are read as `<unk>`, as in text.
    """

    kind: Literal["fairseq"] = "fairseq"
    source: str = Field(description="PREFIX of the source side.")
    target: str = Field(description="PREFIX of the target side.")


class TextOnly(Corpus):
    """A corpus of text without a source; no split keeps blank lines."""

    task: TextTask = Field(default_factory=LanguageModeling, description="What a model learns from it.")

    @property
    def text_task(self) -> TextTask:
        """The task."""
        return self.task


class PlainText(TextOnly):
    """Text without a source: an example per line, plain or compressed; no split keeps blank lines."""

    kind: Literal["text"] = "text"
    path: str = Field(description="The file.")
    document_start: LinePattern | None = Field(
        default=None, description="Regular expression of lines that begin a document: `\\s*$` = blank ones; null = every line."
    )


class FairseqText(TextOnly):
    """Output of `fairseq-preprocess --only-source`: PREFIX.bin and PREFIX.idx, ids of text without a source, as `text` is."""

    kind: Literal["fairseq_text"] = "fairseq_text"
    path: str = Field(description="PREFIX.")


TextSource = Annotated[
    ParallelText | TsvText | RecordSource | GrammarText | FairseqIds | PlainText | FairseqText, Field(discriminator="kind")
]


KINDS_WITHOUT_SOURCE = frozenset({"text", "fairseq_text"})
"""Of `TextOnly`."""
SOURCE_KEYS = ("source", "source_column")
"""Keys of `Columns` that are null if there is no source."""


def is_text_tree(corpus: Mapping[str, Any]) -> bool:
    """`is_text_only` of a corpus as a recipe of this version or an earlier one spells it."""
    return corpus["kind"] in KINDS_WITHOUT_SOURCE or any(corpus.get(key, "") is None for key in SOURCE_KEYS)


def is_text_only(source: TextSource) -> bool:
    """Whether a corpus is text without a source."""
    return source.text_task is not None


def task_of_text(source: TextSource) -> TextTask | None:
    """The task of a corpus of text without a source; None for pairs, which are translated."""
    return source.text_task


def tells_documents(sources: Iterable[TextSource]) -> bool:
    """Whether a corpus says where its documents begin."""
    return any(isinstance(source, PlainText) and source.document_start is not None for source in sources)


def gives_sources(source: TextSource) -> bool:
    """Whether its examples have a source: of their own, or one that its task makes of the text."""
    return not isinstance(task_of_text(source), LanguageModeling)


def has_no_source(sources: Iterable[TextSource]) -> bool:
    """Whether these corpora are text without a source, all of them."""
    return all(map(is_text_only, sources))


class Direction(Config):
    """The tokens that tell a model the languages of a corpus, at least one of them. Its text stays as it is."""

    source_tags: tuple[str, ...] = Field(
        default=(), description="Words in front of every source: `[eng_Latn, hin_Deva]`, or that of the target's language."
    )
    start_token: str | None = Field(
        default=None, description="What the decoder reads in front of every target, such as `hin_Deva`; null = the end token."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Direction:
        if not self.source_tags and self.start_token is None:
            raise ValueError("neither source_tags nor start_token is given; give one of them, or leave the direction out")
        return self


class DataConfig(Config):
    """The corpora of a recipe. Every split keeps its order; only `train` is filtered by length and ratio.

    Evaluation splits keep every pair, empty ones included. A line of text without a source counts as a pair.
    """

    train: tuple[TextSource, ...] = Field(min_length=1, description="Corpora to train on.")
    valid: tuple[TextSource, ...] = Field(min_length=1, description="Corpora that training is validated on.")
    test: dict[str, tuple[TextSource, ...]] = Field(default_factory=dict, description="Test sets: name -> corpora.")
    directions: dict[CorpusName, Direction] = Field(
        default_factory=dict,
        description="Tags of the corpora by name, in every split; a SentencePiece model that is trained keeps them whole.",
    )
    tokenizer: TokenizerConfig = Field(default_factory=TrainedSentencePiece, description="How text becomes token ids.")
    filter: FilterConfig = Field(default_factory=FilterConfig, description="Which training pairs are dropped.")
    pairs_per_shard: PositiveInt = Field(default=500_000, description="Pairs per file of prepared data, dropped ones included.")

    @model_validator(mode="after")
    def _ids_have_dictionaries(self) -> DataConfig:
        ids = any(isinstance(source, FairseqIds | FairseqText) for _, source in self.corpora())
        if ids and self.tokenizer.kind != "fairseq_dictionaries":
            raise ValueError(
                f"tokenizer.kind = {self.tokenizer.kind} does not know the ids of a fairseq corpus; choose fairseq_dictionaries"
            )
        return self

    @model_validator(mode="after")
    def _tasks_have_symbols(self) -> DataConfig:
        if not isinstance(self.tokenizer, TrainedSentencePiece):
            return self
        for key, source in self.corpora():
            if (task := task_of_text(source)) is None:
                continue
            for symbol in task.symbols():
                if symbol not in self.tokenizer.user_symbols:
                    raise ValueError(f"{key}.task = {task.kind} needs the symbol {symbol!r}; add it to tokenizer.user_symbols")
        return self

    @model_validator(mode="after")
    def _references_are_read(self) -> DataConfig:
        for key, source in self.corpora():
            unread = key.startswith("train.") or is_text_only(source)
            if unread and isinstance(source, RecordSource) and source.references is not None:
                raise ValueError(f"{key}.references has no effect: only pairs of evaluation splits are scored; leave it out")
        return self

    @field_validator("test", mode="before")
    @classmethod
    def _test_sets_have_names(cls, test: object) -> object:
        if isinstance(test, Mapping) and "kind" in test:
            raise ValueError("'kind' names no test set; write test: {NAME: [{kind: ...}]}")
        return test

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

    @model_validator(mode="after")
    def _names_fit(self) -> DataConfig:
        for split, sources in self._splits().items():
            unnamed = [number for number, source in enumerate(sources) if source.name is None]
            if 0 < len(unnamed) < len(sources):
                raise ValueError(f"{split}.{unnamed[0]} has no name, other corpora of {split} have; name all of them, or none")
        used = dict.fromkeys(source.name for _, source in self.corpora())
        for name in self.directions:
            if name not in used:
                raise ValueError(
                    f"directions.{name} is no name of a corpus ({', '.join(filter(None, used)) or 'there is none with a name'}); "
                    "correct it, or remove the direction"
                )
        for key, source in self.corpora():
            if source.name in self.directions and self.directions[source.name].source_tags and is_text_only(source):
                raise ValueError(
                    f"directions.{source.name}.source_tags stand in front of sources, and {key} is text without one; give its "
                    "direction a start_token, or the corpus another name"
                )
        return self

    def corpora(self) -> Iterator[tuple[str, TextSource]]:
        """Every corpus with its key in the recipe: `train.0`, `valid.0`, `test.NAME.0`."""
        for split, sources in self._splits().items():
            for number, source in enumerate(sources):
                yield f"{split}.{number}", source

    def _splits(self) -> dict[str, tuple[TextSource, ...]]:
        return {"train": self.train, "valid": self.valid, **{f"test.{name}": sources for name, sources in self.test.items()}}

    @property
    def tags(self) -> tuple[str, ...]:
        """The words of all directions."""
        words = [(*direction.source_tags, direction.start_token) for direction in self.directions.values()]
        return tuple(dict.fromkeys(word for direction in words for word in direction if word is not None))


def corpus_names(sources: Iterable[TextSource]) -> tuple[str, ...]:
    """The name of each corpus of a split, if there are several names; else nothing: there is but one corpus to tell apart."""
    names = tuple(source.name for source in sources if source.name is not None)
    return names if len(set(names)) > 1 else ()


class BatchingConfig(Config):
    """How examples become steps.

    A micro-batch of padded rows has rows x max(longest source, longest target) tokens; a packed one (engine.layout) as many as
    its sources or its targets together, whichever are more. A decoder-only model reads source and target, less one EOS, as one
    sequence. If `bucket_tokens` is smaller than `max_tokens` by the share of padding, each bucket is a micro-batch.
    """

    tokens_per_step: PositiveInt = Field(
        description="Most target tokens of one optimizer step over all ranks; only a single longer sentence exceeds it."
    )
    max_tokens: PositiveInt = Field(description="Most tokens of one micro-batch on one rank, padding included.")
    bucket_tokens: PositiveInt = Field(
        default=4096, description="Target tokens of examples of similar length that stay together in a step."
    )
    shuffle_window: PositiveInt = Field(
        default=1_000_000, description="Examples that are sorted by length together; the memory of planning grows with it."
    )
    shuffle: ShuffleConfig = Field(
        default_factory=ExampleShuffle, description="How far an epoch's random order takes the examples from where they lie."
    )
    sampling: MixtureConfig | None = Field(
        default=None, description="How often each corpus of `data.train` is drawn; null = every example once an epoch."
    )
    packing: PackingConfig | None = Field(
        default=None, description="Blocks of text for language models in place of lines; null = every line is an example."
    )
