"""The prepared data that a training reads, opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from dstrain.batch import Batch
from dstrain.data.batching.collate import Collator, PackedSize
from dstrain.data.batching.loader import Examples, TrainLoader, evaluation_loader
from dstrain.data.batching.order import MixedOrder, Order, ShuffledOrder
from dstrain.data.batching.packing import BlockExamples, BlockOrder, BlockWindows, Documents
from dstrain.data.batching.plan import StepPlan, window_capacity
from dstrain.data.batching.shard_window import build_shuffle
from dstrain.data.config import BatchingConfig, task_of_text
from dstrain.data.prepared.corpora import NamedCorpora, split_at_shards
from dstrain.data.prepared.dataset import Dataset, named_corpora, open_split
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tasks.build import build_examples
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.evaluation.validator import check_split
from dstrain.log import logger
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.parallel.mesh import Mesh
from dstrain.recipe import Recipe
from dstrain.storage.mapped_shards import MAX_OPEN_SHARDS

PACKED_MULTIPLE = 64
"""Packed tokens of a rank on a GPU are a multiple of it."""


def packed_size(recipe: Recipe, mesh: Mesh) -> PackedSize | None:
    """How training packs sequences; None if it pads them.

    On a GPU to a multiple of 64 tokens a rank, which suits its kernels: under 1 % of 4,096 tokens is padding. One size for all
    micro-batches, `max_tokens`, would leave 12 to 28 % of padding in Multi30k, whose steps are no multiple of it. On a CPU
    attention takes padded rows all the same, and packing gains little or loses: 1.01 times as many targets a second for
    translation/multi30k_tiny, of which 3 % is padding, 0.93 times for language_modeling/wikitext_tiny, of which 5 % is.
    """
    if not recipe.packs("cuda" if mesh.device.type == "cuda" else "cpu"):
        return None
    if mesh.device.type != "cuda":
        return PackedSize(mesh.sequence.size)
    return PackedSize(PACKED_MULTIPLE * mesh.tensor.size * mesh.sequence.size)


class TrainingData:
    """What training reads of a DATA directory.

    train, valid: as they are stored. train_examples, valid_examples: as the recipe's tasks make them. blocks: the training
    examples if they are packed.
    """

    blocks: BlockExamples | None = None

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.manifest = load_manifest(directory)
        if self.manifest.pseudo_labels is not None:
            logger.info(
                "%s: the training targets are the outputs of teacher %s", directory, self.manifest.pseudo_labels["teacher"][:12]
            )
        self.train: Dataset = open_split(directory, self.manifest, "train")
        self.valid: Dataset = open_split(directory, self.manifest, "valid")
        self.tokenizers: TokenizerPair = load_tokenizers(directory / "tokenizer")
        tasks = {split: list(map(task_of_text, sources)) for split, sources in splits_of(recipe.data).items()}
        build = partial(build_examples, tokenizer=self.tokenizers.target)
        self.train_examples: Examples = build(self.train, tasks["train"], split="train", seed=recipe.training.seed)
        self.valid_examples = build(self.valid, tasks["valid"], split="valid")
        packing = recipe.batching.packing
        self.documents = Documents(None if packing is None else self.train.document_starts, len(self.train))
        self._order = self._build_order(recipe.batching, recipe.training.seed)
        if packing is not None:
            windows = BlockWindows(self.train.lengths, self.documents, self._order, packing, corpora=self.corpora("train"))
            self._order = BlockOrder(windows, recipe.training.seed)
            self.blocks = BlockExamples(self.train, windows, start_id=self.tokenizers.target.start_id)
            self.train_examples = self.blocks

    @property
    def vocabulary(self) -> VocabularySizes:
        """Sizes and special ids for the model."""
        return VocabularySizes.of(self.tokenizers.source, self.tokenizers.target)

    def plan_steps(self, recipe: Recipe) -> StepPlan:
        """The optimizer steps of every epoch. Raises DataError if a split is empty or has examples that the model cannot read."""
        for split, examples in (("train", self.train_examples), ("valid", self.valid_examples)):
            check_split(split, examples.lengths, recipe.model)
        return StepPlan(
            self.train_examples.lengths,
            recipe.batching,
            recipe.training.seed,
            kind=recipe.model.kind,
            order=self._order,
        )

    def corpora(self, split: str) -> NamedCorpora | None:
        """The corpora of a split, if it has several names. DataError if the data does not say whose a row is."""
        return named_corpora(self.manifest, split, self.train if split == "train" else self.valid)

    def _build_order(self, batching: BatchingConfig, seed: int) -> Order:
        """The order of the training examples: each once an epoch, or their corpora sampled; of documents if they are packed."""
        shards, shuffle = self.manifest.splits["train"].shard_rows(), build_shuffle(batching.shuffle)
        if len(shards) > MAX_OPEN_SHARDS and batching.shuffle.kind == "examples":
            logger.warning(
                "%s: a window of the plan reads from all %d shards, of which %d stay mapped; choose batching.shuffle: "
                "{kind: shard_window} to read near ones together, which is faster",
                *(self.directory, len(shards), MAX_OPEN_SHARDS),
            )
        corpora, documents = self.corpora("train"), self.documents
        capacity = -(-window_capacity(batching) * len(documents) // max(len(self.train), 1))  # of as many lines
        if batching.sampling is None or corpora is None:
            return ShuffledOrder(documents.ranges(shards), capacity, seed, shuffle=shuffle)
        drawn = {name: documents.ranges(split_at_shards(corpora.rows(name), shards)) for name in corpora.names}
        return MixedOrder(
            drawn,
            batching.sampling.phases({name: sum(map(len, ranges)) for name, ranges in drawn.items()}),
            num_examples=batching.sampling.examples_per_epoch or len(documents),
            capacity=capacity,
            seed=seed,
            shuffle=shuffle,
        )

    def collator(self, split: str, recipe: Recipe, mesh: Mesh, teachers: Sequence[ModelConfig] = ()) -> Collator:
        """Makes the batches of a split for the recipe's model and its teachers."""
        sizes = self.vocabulary
        return Collator(
            recipe.model.kind,
            pad_id=sizes.pad_id,
            eos_id=sizes.eos_id,
            start_id=sizes.start_id,
            teacher_kinds=[teacher.kind for teacher in teachers],
            packed=packed_size(recipe, mesh),
            corpora=self.corpora(split),
        )

    def train_loader(self, plan: StepPlan, collator: Collator, mesh: Mesh, epoch: int, index: int) -> TrainLoader:
        """This rank's micro-batches from step `index` of an epoch on."""
        return TrainLoader(
            self.train_examples,
            plan,
            collator,
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
            start=(epoch, index),
            device=mesh.device if mesh.device.type == "cuda" else None,
            sequence_rank=mesh.sequence.rank,
            sequence_size=mesh.sequence.size,
        )

    def valid_batches(self, recipe: Recipe, mesh: Mesh) -> Iterator[Batch]:
        """This rank's share of the valid split."""
        return evaluation_loader(
            self.valid_examples,
            recipe.batching.max_tokens,
            self.collator("valid", recipe, mesh),
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
        )
