"""The recipe: all configurations in one tree, checked whole before anything heavy is imported.

Recipe files (names, `extends`, overrides, duplicate keys) are read by recipe_file.py; mistakes are put into words by
storage/explain.py. Torch-free: a recipe can be checked on a login node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dstrain.adapters.config import AdapterConfig
from dstrain.config_base import Config, ConfigErrors
from dstrain.data.config import (
    BatchingConfig,
    DataConfig,
    corpus_names,
    gives_sources,
    has_no_source,
    is_text_only,
    tells_documents,
)
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.distillation.config import DistillationConfig
from dstrain.engine.config import EngineConfig, OptimizerConfig, ScheduleConfig
from dstrain.generation.config import BeamSearchConfig, GenerationConfig
from dstrain.models.config import ModelConfig, sequence_problems, tensor_problems
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.training.config import CheckpointConfig, ReportingConfig, TrainingConfig, ValidationConfig

RECIPE_VERSION = 1
ObjectiveConfig = Annotated[CrossEntropyConfig | DistillationConfig, Field(discriminator="kind")]


class Recipe(Config):
    """One training run, from text to bundle."""

    version: Literal[1] = Field(description="Version of the recipe format.")
    description: str = Field(default="", description="A sentence for readers.")
    data: DataConfig = Field(description="Corpora and tokenizer.")
    batching: BatchingConfig = Field(description="How examples become steps.")
    model: ModelConfig = Field(description="Architecture; `preset: NAME` starts from a known one.")
    adapter: AdapterConfig | None = Field(default=None, description="Adapters beside a frozen base; null = all weights train.")
    objective: ObjectiveConfig = Field(default_factory=CrossEntropyConfig, description="The loss.")
    optimizer: OptimizerConfig = Field(description="How gradients become updates.")
    schedule: ScheduleConfig = Field(description="Learning rate by step.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="Precision, clipping and distribution.")
    training: TrainingConfig = Field(description="Seed, limits and moving average.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="When and how the valid split is scored.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="When checkpoints are written.")
    reporting: ReportingConfig = Field(default_factory=ReportingConfig, description="Logging.")
    generation: GenerationConfig = Field(default_factory=BeamSearchConfig, description="How the trained model generates text.")

    def packs(self, device: Literal["cpu", "cuda"]) -> bool:
        """Whether training on such a device packs the sequences of a batch, instead of padding them."""
        blocks, layout = self.batching.packing, self.engine.layout
        shared, compiled = self.engine.parallel.sequence > 1, self.engine.compile != "none"
        needed = shared or compiled or (blocks is not None and blocks.attention == "document")
        return layout == "packed" or (layout == "auto" and (device == "cuda" or needed))

    @model_validator(mode="after")
    def _sections_fit(self) -> Recipe:
        problems = [
            *self._text_problems(),
            *self._source_problems(),
            *self._sampling_problems(),
            *self._packing_problems(),
            *self._validation_problems(),
            *self._length_problems(),
            *self._vocabulary_problems(),
            *self._dropout_problems(),
            *self._rate_problems(),
            *self._tile_problems(),
            *tensor_problems(self.model, self.engine.parallel.tensor),
            *sequence_problems(self.model, **self.engine.parallel.model_dump()),
        ]
        if problems:
            raise ConfigErrors(problems)
        return self

    def _text_problems(self) -> Iterator[str]:
        plain = {key: corpus.kind for key, corpus in self.data.corpora() if is_text_only(corpus)}
        unread = [key for key, corpus in self.data.corpora() if not gives_sources(corpus)]
        if unread and self.model.kind == "encoder_decoder":
            yield (
                f"data.{unread[0]} is text without a source (kind: {plain[unread[0]]}), so an encoder has nothing to read; "
                "choose a task that makes one (task: {kind: denoising}), model.kind: decoder_only, or a corpus of pairs"
            )
        untranslatable = [key for key in plain if key.startswith("valid.") or has_no_source(self.data.train)]
        if untranslatable and self.validation.generation is not None:
            yield (
                f"validation.generation translates the valid split, but data.{untranslatable[0]} is text without a source (kind: "
                f"{plain[untranslatable[0]]}), so there is nothing to translate; set validation.generation: null"
            )
        if self.data.filter.long_sources == "truncate" and has_no_source(self.data.train):
            yield "data.filter.long_sources = truncate cuts sources, and data.train has none; leave it out"
        if self.data.filter.max_ratio is not None and has_no_source(self.data.train):
            yield "data.filter.max_ratio compares the lengths of two sides, but data.train is text without a source; leave it out"

    def _source_problems(self) -> Iterator[str]:
        """Keys of the objective that read a source, if training data has none."""
        plain = next(((number, corpus.kind) for number, corpus in enumerate(self.data.train) if not gives_sources(corpus)), None)
        if plain is None:
            return
        without = f"data.train.{plain[0]} is text without a source (kind: {plain[1]})"
        for use, remedy in self.objective.needs.source:
            yield f"{use}, but {without}; {remedy}, or choose corpora of pairs"

    def _sampling_problems(self) -> Iterator[str]:
        sampling, names = self.batching.sampling, dict.fromkeys(corpus_names(self.data.train))
        if sampling is None:
            return
        if not names:
            yield (
                "batching.sampling draws from the corpora of data.train by name, and they have fewer than two names; give each "
                "corpus a `name`, or leave sampling out"
            )
        for key, weights in sampling.tables() if names else ():
            for name in weights.keys() - names.keys():
                yield f"batching.sampling.{key}: {name} is no corpus of data.train ({', '.join(names)}); correct the name"
            for name in names.keys() - weights.keys():
                yield f"batching.sampling.{key} lacks the corpus {name} of data.train; give it a weight, 0 to leave it out"

    def _packing_problems(self) -> Iterator[str]:
        packing = self.batching.packing
        if packing is None:
            return
        for number, corpus in enumerate(self.data.train):
            if gives_sources(corpus):
                yield (
                    f"batching.packing makes blocks of text for language models, but the examples of data.train.{number} (kind: "
                    f"{corpus.kind}) have a source; set batching.packing: null, or choose text with task: "
                    "{kind: language_modeling}"
                )
        if packing.documents == "complete_documents" and not tells_documents(self.data.train):
            yield (
                "batching.packing.documents = complete_documents would make a block of each line, as no corpus of data.train "
                "says where its documents begin; set document_start, or choose documents: complete_sentences"
            )
        if packing.attention == "document" and self.engine.layout == "padded":
            yield (
                "batching.packing.attention = document needs packed sequences, but engine.layout = padded; choose layout: auto, "
                "or attention: block"
            )
        limits = {
            "model.max_target_length": self.model.limits.target,
            "batching.max_tokens": self.batching.max_tokens,
            "batching.tokens_per_step": self.batching.tokens_per_step,
        }
        for key, limit in limits.items():
            if packing.block_size > limit:
                yield f"batching.packing.block_size = {packing.block_size} is more than {key} = {limit}; lower it, or raise that"

    def _validation_problems(self) -> Iterator[str]:
        corpus, names = self.validation.corpus, dict.fromkeys(corpus_names(self.data.valid))
        if corpus is not None and corpus not in names:
            known = ", ".join(names) or "its corpora have fewer than two names"
            yield f"validation.corpus: {corpus} is no corpus of data.valid ({known}); correct the name, or leave it out"

    def _length_problems(self) -> Iterator[str]:
        kept, limits, packing = self.data.filter, self.model.limits, self.batching.packing
        if packing is not None:
            return  # longer lines are cut
        if has_no_source(self.data.train):
            read = {"target": limits.target}
            if any(map(gives_sources, self.data.train)) and not limits.joint:
                read["source"] = limits.source
            for side, limit in read.items():
                if kept.max_target_length > limit:
                    yield (
                        f"data.filter.max_target_length = {kept.max_target_length} keeps text that the model does not read "
                        f"(model.max_{side}_length = {limit})"
                    )
            return
        if limits.joint and kept.max_source_length + kept.max_target_length - 1 > limits.target:
            yield (
                f"data.filter keeps sources of {kept.max_source_length} and targets of {kept.max_target_length} tokens, together "
                f"more than the model reads (model.max_target_length = {limits.target})"
            )
        sides = [("source", kept.max_source_length, limits.source), ("target", kept.max_target_length, limits.target)]
        for side, longest, limit in [] if limits.joint else sides:
            if longest > limit:
                name = f"max_{side}_length"
                yield f"data.filter.{name} = {longest} keeps sentences that the model does not read (model.{name} = {limit})"

    def _dropout_problems(self) -> Iterator[str]:
        if any(_dropouts(self.model_dump(include={"model", "adapter"}))):
            return
        for use, remedy in self.objective.needs.dropout:
            yield (
                f"{use} has no effect: every dropout of model and adapter is 0, so both passes are the same; raise "
                f"model.dropout, or {remedy}"
            )

    def _rate_problems(self) -> Iterator[str]:
        peak, schedule = self.optimizer.learning_rate, self.schedule
        for name, rate in schedule.model_dump(include={"warmup_init", "final"}).items():
            if rate > peak:
                yield (
                    f"schedule.{name} = {rate:g} is a learning rate, and above the peak, optimizer.learning_rate = {peak:g}; "
                    f"lower it (a tenth of the peak is {peak / 10:g})"
                )

    def _tile_problems(self) -> Iterator[str]:
        tiles, max_tokens = self.engine.feed_forward_tiles, self.batching.max_tokens
        if tiles > max_tokens:
            yield (
                f"engine.feed_forward_tiles = {tiles} cuts more parts than a micro-batch has tokens, batching.max_tokens = "
                f"{max_tokens}; lower it"
            )

    def _vocabulary_problems(self) -> Iterator[str]:
        tokenizer = self.data.tokenizer
        if not isinstance(tokenizer, TrainedSentencePiece) or tokenizer.sharing == "joint":
            return
        if self.model.kind == "decoder_only":
            yield (
                "a decoder-only model reads source and target with one vocabulary, but data.tokenizer.sharing = separate; "
                "choose sharing: joint"
            )
        elif self.model.embedding.tie == "all":
            yield (
                "model.embedding.tie = all needs one vocabulary for both sides, but data.tokenizer.sharing = separate; "
                "choose sharing: joint or tie: decoder"
            )


def _dropouts(tree: Mapping[str, Any]) -> Iterator[float]:
    """Every probability with which something is dropped in training: dropouts and layer_drop, at any depth."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dropouts(value)
        elif key.endswith(("dropout", "layer_drop")):
            yield value
