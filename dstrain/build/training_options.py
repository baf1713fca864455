"""The options of a training, and the checks of them that cost nothing: no torch, no weights, no text."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from dstrain.arguments import CheckedOptions
from dstrain.build.same_data import require_data_of
from dstrain.checkpoint.directories import require_bundle
from dstrain.config_base import DeviceChoice, upgrade_config
from dstrain.data.config import gives_sources, is_text_only
from dstrain.data.prepared.location import DataDirectory
from dstrain.data.prepared.manifest import load_manifest
from dstrain.distillation.store.manifest import load_store_manifest
from dstrain.engine.config import Placement
from dstrain.engine.ds_config import read_ds_config
from dstrain.errors import DataError, RecipeError, TrainingError
from dstrain.recipe import ObjectiveConfig, Recipe
from dstrain.recipe_file import recipe_tree
from dstrain.storage.outputs import check_output_path
from dstrain.training.accepted_changes import check_accepted
from dstrain.training.run_directory import check_run


@dataclass(frozen=True)
class TeacherOptions(CheckedOptions):
    """Where a distillation gets its signal from: dumped logits, or bundles.

    placement: of the bundles' parameters, None for `sharded`. vocabulary_map: for bundles of another vocabulary.
    """

    bundles: tuple[Path, ...] = ()
    placement: Placement | None = None
    vocabulary_map: Path | None = None
    logits: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(CheckedOptions):
    """The options of `dstrain train`. output: the run directory. base: the bundle that training starts from, None for none.

    accept_changes: keys of the recipe that a resume may change, although they decide the result.
    """

    data: DataDirectory
    output: Path
    base: Path | None = None
    teachers: TeacherOptions = field(default_factory=TeacherOptions)
    device: DeviceChoice = "auto"
    accept_changes: tuple[str, ...] = ()


def check_training(recipe: Recipe, options: TrainOptions) -> None:
    """Raise a DstrainError for every mistake in arguments and paths that shows before anything is loaded."""
    teachers = options.teachers
    check_teacher_options(recipe.objective, teachers)
    noised = [number for number, corpus in enumerate(recipe.data.train) if is_text_only(corpus) and gives_sources(corpus)]
    if noised and teachers.logits is not None:
        raise RecipeError(
            f"data.train.{noised[0]}.task makes another example of a text in every epoch, and --logits are of what is stored: "
            "distill with --teacher BUNDLE"
        )
    if recipe.batching.packing is not None and teachers.logits is not None:
        raise RecipeError(
            "batching.packing makes examples of several lines, and --logits are of single ones: distill with --teacher BUNDLE, "
            "or set batching.packing: null"
        )
    check_accepted(options.accept_changes, recipe_tree(recipe))
    if recipe.adapter is not None and options.base is None:
        raise RecipeError("the recipe has an adapter section, which adapts a trained model; name its bundle with --base BUNDLE")
    bundles = {f"--teacher {bundle}": bundle for bundle in teachers.bundles}
    inputs = {**bundles, "--data": options.data, "--base": options.base, "--logits": teachers.logits}
    check_output_path(options.output, inputs)
    check_run(options.output, recipe_tree(recipe), upgrade=partial(upgrade_config, Recipe), accept=options.accept_changes)
    manifest = load_manifest(options.data)
    for split in ("train", "valid"):
        manifest.require_split(split, options.data)
    require_data_of(recipe, options.data, manifest)
    for bundle in (*bundles.values(), *(() if options.base is None else (options.base,))):
        require_bundle(bundle)
    if teachers.logits is not None:
        load_store_manifest(teachers.logits)
    if teachers.vocabulary_map is not None and not teachers.vocabulary_map.is_file():
        raise DataError(f"--vocabulary-map {teachers.vocabulary_map} is no file; name a YAML or JSON file")
    read_ds_config(recipe.engine)
    if find_spec("deepspeed") is None:
        raise TrainingError("training needs DeepSpeed, which is not installed: pip install deepspeed")


def check_teacher_options(config: ObjectiveConfig, options: TeacherOptions) -> None:
    """Raise RecipeError unless an objective with a teacher has either bundles or dumped logits, and another one neither.

    Keys and options that have no use beside the other source are refused.
    """
    if not options.bundles and (options.placement or options.vocabulary_map):
        raise RecipeError(
            "--teacher-placement and --vocabulary-map say how a teacher works: add --teacher BUNDLE, or leave them out"
        )
    needs, at_work, stored = config.needs.teacher, bool(options.bundles), options.logits is not None
    if needs is None:
        if at_work or stored:
            raise RecipeError(
                f"objective.kind = {config.kind} has no use for a teacher: leave {'--teacher' if at_work else '--logits'} out, "
                "or choose objective: {kind: distillation}"
            )
        return
    if at_work and stored:
        raise RecipeError("--teacher and --logits are two sources of the same signal: leave one of them out")
    if not (at_work or stored):
        raise RecipeError(
            f"objective.kind = {config.kind} needs a teacher: add --teacher BUNDLE, or --logits LOGITS for what `dstrain "
            "dump-logits` wrote, or choose objective: {kind: cross_entropy}"
        )
    if stored and needs.precision is not None:
        raise RecipeError(
            f"objective.teacher_precision = {needs.precision} is the precision of an online teacher, dumped logits are as they "
            "are: leave it out beside --logits"
        )
    if at_work and needs.renormalize:
        raise RecipeError(
            "objective.renormalize is for dumped logits of method topk; an online teacher gives its whole distribution: leave "
            "it out beside --teacher"
        )
