"""From a recipe to a running training: the one module that knows every room.

Cheap checks come first: recipe, DeepSpeed file, data directory and run directory are looked at before the model is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from dstrain import __version__
from dstrain.batch import Batch
from dstrain.build.base import build_on_base, check_reloaded, find_base
from dstrain.build.objective import build_objective, require_teacher_source, validation_objective
from dstrain.build.teachers import (
    PlannedTeacher,
    TeacherOptions,
    open_logits,
    plan_teachers,
    signals_of,
    start_teachers,
)
from dstrain.checkpoint.bundle import StoredBundle, save_adapter_bundle, save_bundle
from dstrain.checkpoint.manager import CheckpointManager
from dstrain.config_base import Precision, upgrade_config
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import Steps, TrainLoader, evaluation_loader
from dstrain.data.batching.plan import StepPlan
from dstrain.data.config import DataConfig
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.tags import locate_tags
from dstrain.data.tokenizers.tokenizer import TokenizerPair, load_tokenizers
from dstrain.distillation.config import DistillationConfig, GlobalByLanguageSelection
from dstrain.distillation.feature_plan import PlannedFeature, plan_features
from dstrain.distillation.on_policy import OnPolicySteps, OwnSamples, room_for_samples
from dstrain.distillation.store.store import LogitStore
from dstrain.engine.ds_config import resolve_ds_config
from dstrain.engine.training_engine import TrainEngine
from dstrain.errors import DataError, RecipeError, TrainingError
from dstrain.evaluation.translation import build_translation
from dstrain.evaluation.validator import Validator, check_split
from dstrain.generation.constraints import SpecialIds
from dstrain.log import logger
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.models.weights import load_canonical
from dstrain.objectives.objective import Objective
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.allocator import keep_freed_memory
from dstrain.parallel.errors import raise_on_all_ranks
from dstrain.parallel.mesh import DeviceChoice, Mesh, build_mesh, finalize
from dstrain.recipe import Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.training.bundles import BundleStore
from dstrain.training.preemption import StopSignals
from dstrain.training.rank_agreement import require_agreement
from dstrain.training.reporting import build_reporter
from dstrain.training.run_directory import Run, open_run, recipe_differences
from dstrain.training.trainer import Trainer
from dstrain.training.watchdog import Watchdog


def train(
    recipe: Recipe, *, data: Path, output: Path, device: DeviceChoice, teachers: TeacherOptions, base: Path | None = None
) -> int:
    """Train `recipe` on prepared `data` into the run directory `output`, or resume what is there.

    base: the bundle whose weights training starts from; None for random ones. Returns the exit code of the verb. Raises
    DstrainError where something does not fit together.
    """
    mesh = build_mesh(device, tensor=recipe.engine.parallel.tensor, sequence=recipe.engine.parallel.sequence)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    start = raise_on_all_ranks(mesh.world, TrainingError, "starting", partial(_check, recipe, data, teachers, base))
    require_agreement(mesh.world, _facts(recipe, start, output, teachers.placement))
    corpora, fingerprints = start.corpora, start.teacher_fingerprints
    upgrade = partial(upgrade_config, Recipe)
    run = open_run(output, recipe_tree(recipe), mesh.world, data=corpora.manifest.job, teachers=fingerprints, upgrade=upgrade)
    try:
        teaching = start_teachers(start.teachers, placement=teachers.placement, precision=_teacher_precision(recipe), mesh=mesh)
        signals = signals_of(teaching) if start.store is None else start.store
        seed = recipe.training.seed
        objective = build_objective(
            recipe.objective, signals, tag_position=start.tag_position, features=start.features, seed=seed
        )
        engine = build_engine(recipe, corpora.vocabulary, mesh, objective, start.base)
        code = build_trainer(recipe, corpora, start.plan, run, engine, base=start.base, teachers=start.teachers).run()
        if code == 0 and recipe.adapter is not None:
            _check_last_bundle(recipe, corpora, run, engine)
    finally:
        run.close()
    engine.close()
    finalize()  # in order only after a success: after a failure the other ranks may be inside a collective
    return code


@dataclass(frozen=True)
class _Start:
    """All that training reads before a model is built; each part suits the recipe.

    store: of dumped logits. deepspeed: the file that engine.deepspeed names, resolved.
    """

    corpora: Corpora
    base: StoredBundle | None
    plan: StepPlan
    teachers: list[PlannedTeacher]
    store: LogitStore | None
    tag_position: int
    features: list[PlannedFeature]
    deepspeed: dict[str, Any]

    @property
    def teacher_fingerprints(self) -> list[str]:
        """Of the teachers, or of the store in their place."""
        return [teacher.fingerprint for teacher in self.teachers] if self.store is None else [self.store.manifest.fingerprint]


def _check(recipe: Recipe, data: Path, teachers: TeacherOptions, base: Path | None) -> _Start:
    """The checks that need no model. Raises DstrainError if something does not fit the recipe."""
    require_teacher_source(recipe.objective, teacher=bool(teachers.bundles), logits=teachers.logits is not None)
    corpora = Corpora(data, recipe)
    started_from = None if base is None else find_base(base, recipe.model, corpora.manifest)
    for split, dataset in (("train", corpora.train), ("valid", corpora.valid)):
        check_split(split, dataset.source_lengths, dataset.target_lengths, recipe.model)
    plan = StepPlan(
        corpora.train.source_lengths,
        corpora.train.target_lengths,
        recipe.batching,
        recipe.training.seed,
        kind=recipe.model.kind,
    )
    planned = plan_teachers(teachers, corpora.tokenizers, corpora.vocabulary, corpora.train)
    tag_position = _tag_position(recipe, corpora)
    store = _store(recipe, teachers, data, corpora)
    features = plan_features(recipe.objective, recipe.model, [teacher.model for teacher in planned])
    return _Start(
        corpora, started_from, plan, planned, store, tag_position, features, resolve_ds_config(recipe.engine, world_size=1)
    )


def _facts(recipe: Recipe, start: _Start, output: Path, placement: str) -> dict[str, Any]:
    """What must be equal on every rank, under the keys by which a message names it."""
    manifest = start.corpora.manifest.model_dump_json()
    return {
        **recipe_tree(recipe),
        "DeepSpeed file": start.deepspeed,
        "--data": hashlib.sha256(manifest.encode()).hexdigest(),
        "--base": start.base and start.base.fingerprint,
        "--teacher or --logits": start.teacher_fingerprints,
        "--teacher-placement": placement,
        "--output": str(output),
        "version": {"dstrain": __version__, **{name: version(name) for name in ("torch", "deepspeed")}},
    }


class Corpora:
    """What training reads of a DATA directory; DataError where it was prepared from another data section than the recipe's."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.manifest = load_manifest(directory)
        if self.manifest.pseudo_labels is not None:
            logger.info(
                "%s: the training targets are the outputs of teacher %s", directory, self.manifest.pseudo_labels["teacher"][:12]
            )
        prepared = {"data": upgrade_config(DataConfig, self.manifest.data)}
        differences = recipe_differences(prepared, {"data": recipe_tree(recipe)["data"]})
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


def _tag_position(recipe: Recipe, corpora: Corpora) -> int:
    """Where the language tag stands in a source, for an objective that asks for it."""
    objective = recipe.objective
    if isinstance(objective, DistillationConfig) and isinstance(objective.selection, GlobalByLanguageSelection):
        return locate_tags(objective.selection.tags, corpora.tokenizers.source, corpora.train)
    return 0


def _store(recipe: Recipe, teachers: TeacherOptions, data: Path, corpora: Corpora) -> LogitStore | None:
    """Dumped logits to distil from, where some are named."""
    if teachers.logits is None or not isinstance(recipe.objective, DistillationConfig):
        return None
    return open_logits(teachers.logits, data, corpora.manifest, recipe.objective)


def _teacher_precision(recipe: Recipe) -> Precision:
    own = recipe.objective.teacher_precision if isinstance(recipe.objective, DistillationConfig) else None
    return own or recipe.engine.precision


def build_engine(
    recipe: Recipe, vocabulary: VocabularySizes, mesh: Mesh, objective: Objective, base: StoredBundle | None = None
) -> TrainEngine:
    """Model and objective under the engine, with the base's weights, or initial ones from the seed.

    Raises RecipeError for an adapter without a base, or one that does not suit the model.
    """
    if base is not None:
        model, weights = build_on_base(base, recipe.model, recipe.adapter, recipe.training.seed)
        load_canonical(model, weights)
    elif recipe.adapter is None:
        model = build_model(recipe.model, vocabulary, seed=recipe.training.seed)
    else:
        raise RecipeError("the recipe has an adapter section, which adapts a trained model; name its bundle with --base BUNDLE")
    if mesh.world.rank == 0 and recipe.adapter is not None:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        trained = sum(size for size, is_trained in sizes if is_trained)
        logger.info("adapter: %d of %d parameters are trained", trained, sum(size for size, _ in sizes))
    return TrainEngine(
        TrainModule(model, objective, validation_objective(recipe.objective)),
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        engine=recipe.engine,
        ema=recipe.training.ema,
        seed=recipe.training.seed,
        mesh=mesh,
        base=None if base is None else base.fingerprint,
    )


def build_trainer(
    recipe: Recipe,
    corpora: Corpora,
    plan: StepPlan,
    run: Run,
    engine: TrainEngine,
    *,
    base: StoredBundle | None = None,
    teachers: Sequence[PlannedTeacher] = (),
) -> Trainer:
    """All parts of a training, put together."""
    mesh = engine.mesh
    collator = build_collator(recipe, corpora, teachers)
    watchdog = Watchdog(recipe.training.hang_seconds, rank=mesh.world.rank)
    own_samples = _build_own_samples(recipe, corpora, engine, teachers, collator=collator, watchdog=watchdog)

    def steps(epoch: int, index: int) -> Steps:
        loader = TrainLoader(
            corpora.train,
            plan,
            collator,
            rank=mesh.data.rank,
            world_size=mesh.data.size,
            start=(epoch, index),
        )
        return loader if own_samples is None else OnPolicySteps(loader, own_samples)

    return Trainer(
        training=recipe.training,
        validation=recipe.validation,
        checkpoint=recipe.checkpoint,
        reporting=recipe.reporting,
        ranks=mesh.world,
        engine=engine,
        steps=steps,
        validate=_build_validator(recipe, corpora, engine, watchdog),
        checkpoints=CheckpointManager(run.checkpoints, mesh.world, keep=recipe.checkpoint.keep_checkpoints, run_id=run.run_id),
        bundles=_build_bundles(recipe, corpora, engine, run.bundles, base),
        reporter=build_reporter(
            run.directory, recipe.reporting, rank=mesh.world.rank, total_steps=recipe.training.max_steps, run_id=run.run_id
        ),
        signals=StopSignals(),
        watchdog=watchdog,
        header={"dstrain": __version__, "run_id": run.run_id, "recipe": recipe_tree(recipe)},
    )


def build_collator(recipe: Recipe, corpora: Corpora, teachers: Sequence[PlannedTeacher] = ()) -> Collator:
    """What makes the batches of the recipe's model and of its teachers."""
    vocabulary, kinds = corpora.vocabulary, [teacher.model.kind for teacher in teachers]
    return Collator(recipe.model.kind, pad_id=vocabulary.pad_id, eos_id=vocabulary.eos_id, teacher_kinds=kinds)


def _build_own_samples(
    recipe: Recipe,
    corpora: Corpora,
    engine: TrainEngine,
    teachers: Sequence[PlannedTeacher],
    *,
    collator: Collator,
    watchdog: Watchdog,
) -> OwnSamples | None:
    """What writes the targets of on-policy steps, where the objective has any."""
    on_policy = recipe.objective.on_policy if isinstance(recipe.objective, DistillationConfig) else None
    if on_policy is None:
        return None
    return OwnSamples(
        config=on_policy,
        student=lambda: engine.generation_model(averaged=False),
        ranks=engine.mesh.data,
        ids=SpecialIds.of(corpora.tokenizers.target),
        room=room_for_samples(
            [recipe.model.limits, *(teacher.model.limits for teacher in teachers)],
            longest_source=int(corpora.train.source_lengths.max()),
            max_tokens=recipe.batching.max_tokens,
        ),
        collator=collator,
        max_tokens=recipe.batching.max_tokens,
        seed=recipe.training.seed,
        device=engine.device,
        beat=watchdog.beat,
    )


def _valid_batches(recipe: Recipe, corpora: Corpora, mesh: Mesh) -> Iterator[Batch]:
    """This rank's share of the valid split."""
    return evaluation_loader(
        corpora.valid,
        recipe.batching.max_tokens,
        build_collator(recipe, corpora),
        rank=mesh.data.rank,
        world_size=mesh.data.size,
    )


def _check_last_bundle(recipe: Recipe, corpora: Corpora, run: Run, engine: TrainEngine) -> None:
    check_reloaded(
        run.bundles / "last",
        engine,
        next(_valid_batches(recipe, corpora, engine.mesh)),
        engine.mesh,
        averaged=recipe.training.ema is not None,
        tolerance=1e-4 if recipe.engine.precision == "fp32" else 0.05,
    )


def _build_validator(recipe: Recipe, corpora: Corpora, engine: TrainEngine, watchdog: Watchdog) -> Validator:
    mesh = engine.mesh
    generation = recipe.validation.generation
    return Validator(
        engine,
        replicas=mesh.replicas,
        data=mesh.data,
        batches=lambda: _valid_batches(recipe, corpora, mesh),
        denominator=engine.module.validation.denominator,
        averaged=recipe.training.ema is not None,
        translation=build_translation(generation, recipe.model, corpora.valid, corpora.tokenizers, mesh.device),
        beat=watchdog.beat,
    )


def _build_bundles(
    recipe: Recipe, corpora: Corpora, engine: TrainEngine, directory: Path, base: StoredBundle | None
) -> BundleStore:
    def save(bundle: Path, weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        if recipe.adapter is not None and base is not None:
            tree = recipe_tree(recipe)
            save_adapter_bundle(bundle, adapter=recipe.adapter, base=base, weights=weights, recipe=tree, notes=notes)
            return
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
        engine.mesh.world,
        gather=lambda: engine.gather_weights(averaged=averaged),
        save=save,
        keep=recipe.checkpoint.keep_bundles,
    )
