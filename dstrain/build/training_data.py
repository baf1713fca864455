"""The prepared data that a training reads, opened and compared with its recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dstrain.batch import Batch
from dstrain.config_base import upgrade_config
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import TrainLoader, evaluation_loader
from dstrain.data.batching.plan import StepPlan
from dstrain.data.config import DataConfig
from dstrain.data.prepared.comparison import other_content, settings_of
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.errors import DataError
from dstrain.evaluation.validator import check_split
from dstrain.log import logger
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.parallel.mesh import Mesh
from dstrain.recipe import Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.training.run_directory import tree_changes


class TrainingData:
    """What training reads of a DATA directory; DataError if it was prepared from another data section than the recipe's."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory = directory
        self.manifest = load_manifest(directory)
        if self.manifest.pseudo_labels is not None:
            logger.info(
                "%s: the training targets are the outputs of teacher %s", directory, self.manifest.pseudo_labels["teacher"][:12]
            )
        self._require_data_of(recipe)
        self.train: Dataset = open_dataset(directory, "train")
        self.valid: Dataset = open_dataset(directory, "valid")
        self.tokenizers: TokenizerPair = load_tokenizers(directory / "tokenizer")

    def _require_data_of(self, recipe: Recipe) -> None:
        """DataError unless this is the data of the recipe, wherever that finds its files; test sets do not count."""
        prepared, requested = upgrade_config(DataConfig, self.manifest.data), recipe_tree(recipe)["data"]
        changes = tree_changes({"data": settings_of(prepared)}, {"data": settings_of(requested)})
        lines = [f"  {key}: {change}" for key, change in changes.items()]
        lines = lines or list(other_content(self.directory, self.manifest, DataConfig.model_validate(prepared), recipe.data))
        if lines:
            raise DataError(
                f"{self.directory} was prepared from another data section than this recipe's:\n"
                + "\n".join(lines)
                + "\nundo these changes, or prepare the data again into another directory"
            )
        moved = tree_changes(*({"data": {key: side[key] for key in ("train", "valid")}} for side in (prepared, requested)))
        if moved:
            logger.info("%s is read, whose text was elsewhere when it was prepared: %s", self.directory, "; ".join(moved))

    @property
    def vocabulary(self) -> VocabularySizes:
        """Sizes and special ids for the model."""
        return VocabularySizes.of(self.tokenizers.source, self.tokenizers.target)

    def plan_steps(self, recipe: Recipe) -> StepPlan:
        """The optimizer steps of every epoch. Raises DataError if a split is empty or has examples that the model cannot read."""
        for split, dataset in (("train", self.train), ("valid", self.valid)):
            check_split(split, dataset.lengths, recipe.model)
        return StepPlan(self.train.lengths, recipe.batching, recipe.training.seed, kind=recipe.model.kind)

    def collator(self, recipe: Recipe, teachers: Sequence[ModelConfig] = ()) -> Collator:
        """Makes the batches of the recipe's model and of its teachers."""
        kinds = [teacher.kind for teacher in teachers]
        sizes = self.vocabulary
        return Collator(recipe.model.kind, pad_id=sizes.pad_id, eos_id=sizes.eos_id, start_id=sizes.start_id, teacher_kinds=kinds)

    def train_loader(self, plan: StepPlan, collator: Collator, mesh: Mesh, epoch: int, index: int) -> TrainLoader:
        """This rank's micro-batches from step `index` of an epoch on."""
        return TrainLoader(
            self.train,
            plan,
            collator,
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
            start=(epoch, index),
        )

    def valid_batches(self, recipe: Recipe, mesh: Mesh) -> Iterator[Batch]:
        """This rank's share of the valid split."""
        return evaluation_loader(
            self.valid,
            recipe.batching.max_tokens,
            self.collator(recipe),
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
        )
