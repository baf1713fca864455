"""From a recipe to a running training: the one module that knows every room.

Cheap checks come first: recipe, DeepSpeed file, data directory and run directory are looked at before the model is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain import __version__
from dstrain.batch import Batch
from dstrain.checkpoint.bundle import save_bundle
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.data.dataset import Dataset, open_dataset
from dstrain.data.loader import TrainLoader, evaluation_loader
from dstrain.data.manifest import load_manifest
from dstrain.data.plan import StepPlan
from dstrain.data.tags import locate_tags
from dstrain.data.tokenizer import TokenizerPair, load_tokenizers
from dstrain.engine.deepspeed_engine import TrainEngine
from dstrain.engine.teacher_engine import Precision
from dstrain.errors import DataError
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.objectives.config import DistillationConfig, GlobalByLanguageSelection
from dstrain.objectives.factory import build_objective, require_teacher, validation_objective
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.allocator import keep_freed_memory
from dstrain.parallel.topology import DeviceChoice, World, finalize, initialize
from dstrain.protocols import Objective
from dstrain.recipe import Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.training.bundles import BundleStore
from dstrain.training.preemption import StopSignals
from dstrain.training.reporting import build_reporter
from dstrain.training.run_directory import Run, open_run, recipe_differences
from dstrain.training.teachers import TeacherOptions, plan_teachers, signals_of, start_teachers
from dstrain.training.trainer import Trainer
from dstrain.training.translation import build_translation
from dstrain.training.validator import Validator, check_split
from dstrain.training.watchdog import Watchdog


def train(recipe: Recipe, *, data: Path, output: Path, device: DeviceChoice, teachers: TeacherOptions) -> int:
    """Train `recipe` on prepared `data` into the run directory `output`, or resume what is there.

    Returns the exit code of the verb. Raises DstrainError where something does not fit together.
    """
    require_teacher(recipe.objective, given=bool(teachers.bundles))
    world = initialize(device)
    if world.device.type == "cpu":
        keep_freed_memory()
    corpora = Corpora(data, recipe)
    for split, dataset in (("train", corpora.train), ("valid", corpora.valid)):
        check_split(split, dataset.source_lengths, dataset.target_lengths, recipe.model)
    plan = StepPlan(corpora.train.source_lengths, corpora.train.target_lengths, recipe.batching, recipe.training.seed)
    planned = plan_teachers(teachers, corpora.tokenizers, corpora.vocabulary, corpora.train)
    tag_place = _tag_place(recipe, corpora)
    fingerprints = [teacher.fingerprint for teacher in planned]
    run = open_run(output, recipe_tree(recipe), world, data=corpora.manifest.job, teachers=fingerprints)
    try:
        teaching = start_teachers(planned, placement=teachers.placement, precision=_teacher_precision(recipe), world=world)
        objective = build_objective(recipe.objective, signals_of(teaching), tag_place=tag_place)
        engine = build_engine(recipe, corpora.vocabulary, world, objective)
        code = build_trainer(recipe, corpora, plan, run, engine).run()
    finally:
        run.close()
    engine.close()
    for teacher in teaching:
        teacher.close()
    finalize()  # in order only after a success: after a failure the other ranks may be inside a collective
    return code


class Corpora:
    """What training reads of a DATA directory; DataError where it was prepared from another data section than the recipe's."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.manifest = load_manifest(directory)
        differences = recipe_differences({"data": self.manifest.data}, {"data": recipe_tree(recipe)["data"]})
        if differences:
            raise DataError(
                f"{directory} was prepared from another data section than this recipe's:\n"
                + "\n".join(differences)
                + "\nundo these changes, or prepare the data again into another directory"
            )
        self.train: Dataset = open_dataset(directory, "train")
        self.valid: Dataset = open_dataset(directory, "valid")
        self.tokenizers: TokenizerPair = load_tokenizers(directory / "tokenizer")

    @property
    def vocabulary(self) -> VocabularySizes:
        """Sizes and special ids for the model."""
        source, target = self.tokenizers.source, self.tokenizers.target
        return VocabularySizes(source=source.vocab_size, target=target.vocab_size, pad_id=target.pad_id, eos_id=target.eos_id)


def _tag_place(recipe: Recipe, corpora: Corpora) -> int:
    """Where the language tag stands in a source, for an objective that asks for it."""
    objective = recipe.objective
    if isinstance(objective, DistillationConfig) and isinstance(objective.selection, GlobalByLanguageSelection):
        return locate_tags(objective.selection.tags, corpora.tokenizers.source, corpora.train)
    return 0


def _teacher_precision(recipe: Recipe) -> Precision:
    own = recipe.objective.teacher_precision if isinstance(recipe.objective, DistillationConfig) else None
    return own or recipe.engine.precision


def build_engine(recipe: Recipe, vocabulary: VocabularySizes, world: World, objective: Objective) -> TrainEngine:
    """Model and objective under the engine, with initial weights from the seed."""
    model = build_model(recipe.model, vocabulary, seed=recipe.training.seed)
    return TrainEngine(
        TrainModule(model, objective, validation_objective(recipe.objective)),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        engine=recipe.engine,
        ema=recipe.training.ema,
        seed=recipe.training.seed,
        world=world,
    )


def build_trainer(recipe: Recipe, corpora: Corpora, plan: StepPlan, run: Run, engine: TrainEngine) -> Trainer:
    """All parts of a training, put together."""
    vocabulary, world = corpora.vocabulary, engine.world
    watchdog = Watchdog(recipe.training.hang_seconds, rank=world.rank)

    def steps(epoch: int, index: int) -> TrainLoader:
        return TrainLoader(
            corpora.train,
            plan,
            pad_id=vocabulary.pad_id,
            eos_id=vocabulary.eos_id,
            rank=world.rank,
            world_size=world.world_size,
            start=(epoch, index),
        )

    return Trainer(
        training=recipe.training,
        validation=recipe.validation,
        checkpoint=recipe.checkpoint,
        reporting=recipe.reporting,
        ranks=world,
        engine=engine,
        steps=steps,
        validate=_build_validator(recipe, corpora, engine, watchdog),
        checkpoints=CheckpointManager(run.checkpoints, world, keep=recipe.checkpoint.keep_checkpoints),
        bundles=_build_bundles(recipe, corpora, engine, run.bundles),
        reporter=build_reporter(
            run.directory, recipe.reporting, rank=world.rank, total_steps=recipe.training.max_steps, run_id=run.run_id
        ),
        signals=StopSignals(),
        watchdog=watchdog,
        header={"dstrain": __version__, "run_id": run.run_id, "recipe": recipe_tree(recipe)},
    )


def _build_validator(recipe: Recipe, corpora: Corpora, engine: TrainEngine, watchdog: Watchdog) -> Validator:
    vocabulary, world = corpora.vocabulary, engine.world

    def batches() -> Iterator[Batch]:
        return evaluation_loader(
            corpora.valid,
            recipe.batching.max_tokens,
            pad_id=vocabulary.pad_id,
            eos_id=vocabulary.eos_id,
            rank=world.rank,
            world_size=world.world_size,
        )

    generation = recipe.validation.generation
    return Validator(
        engine,
        world,
        batches=batches,
        averaged=recipe.training.ema is not None,
        translation=build_translation(generation, recipe.model, corpora.valid, corpora.tokenizers, world.device),
        beat=watchdog.beat,
    )


def _build_bundles(recipe: Recipe, corpora: Corpora, engine: TrainEngine, directory: Path) -> BundleStore:
    def save(bundle: Path, weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        save_bundle(
            bundle,
            model_config=recipe.model,
            vocabulary=corpora.vocabulary,
            weights=weights,
            tokenizers=corpora.tokenizers,
            recipe=recipe_tree(recipe),
            notes=notes,
        )

    averaged = recipe.training.ema is not None
    return BundleStore(
        directory,
        engine.world,
        gather=lambda: engine.gather_weights(averaged=averaged),
        save=save,
        keep=recipe.checkpoint.keep_bundles,
    )
