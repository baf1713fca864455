"""From the configuration of a distillation to its objective: the source of signals, the selection, the features."""

from __future__ import annotations

from collections.abc import Sequence

from dstrain.build.objective_plan import ObjectivePlan
from dstrain.build.teachers import PlannedTeacher, open_logits, plan_teachers, start_teachers
from dstrain.build.training_data import TrainingData
from dstrain.build.training_options import TeacherOptions
from dstrain.data.tags import locate_tags
from dstrain.distillation.build import build_distillation
from dstrain.distillation.config import DistillationConfig, GlobalByLanguageSelection
from dstrain.distillation.feature_plan import plan_features
from dstrain.distillation.objective import Distillation
from dstrain.distillation.signals import TeacherSignals
from dstrain.errors import RecipeError
from dstrain.models.config import sequence_problems
from dstrain.parallel.mesh import Mesh
from dstrain.recipe import Recipe


def plan_distillation(config: DistillationConfig, recipe: Recipe, options: TeacherOptions, data: TrainingData) -> ObjectivePlan:
    """Look at teachers, stored logits, tags and features without loading them. Raises a DstrainError if one does not fit."""
    store = None if options.logits is None else open_logits(options.logits, data.directory, data.manifest, config)
    planned = plan_teachers(options, data.tokenizers, data.vocabulary, data.train_examples.lengths)
    _require_shared_heads(planned, recipe)
    _require_blocks(planned, recipe)
    features = plan_features(config, recipe.model, [teacher.model for teacher in planned])
    tag_position = 0
    if isinstance(config.selection, GlobalByLanguageSelection):
        tag_position = locate_tags(config.selection.tags, data.tokenizers.source, data.train)
    placement = options.placement or "sharded"
    precision = config.teacher_precision or recipe.engine.precision

    def build(mesh: Mesh) -> Distillation:
        signals = store or TeacherSignals(start_teachers(planned, placement=placement, precision=precision, mesh=mesh))
        return build_distillation(config, signals, tag_position=tag_position, features=features, seed=recipe.training.seed)

    return ObjectivePlan(
        build,
        teachers=tuple(teacher.fingerprint for teacher in planned) if store is None else (store.manifest.fingerprint,),
        models=tuple(teacher.model for teacher in planned),
    )


def _require_blocks(teachers: Sequence[PlannedTeacher], recipe: Recipe) -> None:
    """RecipeError for a teacher that cannot read blocks of text: it would need a source for each of their sequences."""
    for teacher in teachers:
        if recipe.batching.packing is not None and teacher.model.kind != "decoder_only":
            raise RecipeError(
                f"the teacher {teacher.bundle.directory} is an encoder-decoder, which cannot read blocks of text: set "
                "batching.packing: null, or choose a decoder-only teacher"
            )


def _require_shared_heads(teachers: Sequence[PlannedTeacher], recipe: Recipe) -> None:
    """RecipeError for a teacher whose heads sequence ranks cannot share. One of the other kind reads whole batches on each."""
    for teacher in teachers:
        if teacher.model.kind == recipe.model.kind:
            owner, sequence = f"{teacher.bundle.directory}: ", recipe.engine.parallel.sequence
            for problem in sequence_problems(teacher.model, tensor=1, sequence=sequence, owner=owner):
                raise RecipeError(problem)
