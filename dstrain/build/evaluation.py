"""How good a finished bundle is on prepared data, and how good a store of logits is against its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.arguments import CheckedOptions, require_type
from dstrain.build.device import usable_precision
from dstrain.build.teacher_source import TeacherSource, load_teacher_source
from dstrain.build.validation_options import ValidateOptions, check_validation, checked_recipe, generation_of
from dstrain.checkpoint.bundle import load_bundle
from dstrain.data.batching.collate import Collator
from dstrain.data.prepared.location import DataDirectory
from dstrain.distillation.store.gradient_angle import Angle, gradient_angles, random_batches
from dstrain.distillation.store.manifest import load_store_manifest
from dstrain.distillation.store.store import moved, open_store
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.errors import BundleError
from dstrain.evaluation.bundle_validation import validate_bundle
from dstrain.models.factory import Model, build_model
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.parallel.mesh import Mesh, build_mesh, finalize
from dstrain.training.config import ValidationConfig

ANGLE_MAX_TOKENS = 512


def validate(options: ValidateOptions) -> dict[str, Any] | None:
    """Loss, perplexity and scores of generated text by name, the signatures of the latter, and the precision of it all.

    Every rank scores its share, and only rank 0 returns the result.

    Raises DataError or BundleError if bundle and data do not fit together, ArgumentError for an option without effect.

    >>> from pathlib import Path
    >>> from dstrain.api import ValidateOptions, validate
    >>> scores = validate(ValidateOptions(bundle=Path("run/bundles/best"), data=Path("data"), method={"beam_size": 2}))
    >>> sorted(scores)
    ['bleu', 'chrf', 'loss', 'nll', 'num_targets', 'perplexity', 'precision', 'repetition', 'signatures']
    """
    require_type("options", options, ValidateOptions)
    check_validation(options)
    mesh = build_mesh(options.device)
    try:
        scores = _validate(options, mesh)
    finally:
        finalize()
    return scores if mesh.world.rank == 0 else None


def _validate(options: ValidateOptions, mesh: Mesh) -> dict[str, Any]:
    bundle = load_bundle(options.bundle, device=mesh.device, base=options.base)
    precision = usable_precision(options.precision, mesh.device)
    bundle.model.to(COMPUTE_DTYPES[precision])
    recipe = checked_recipe(bundle.recipe)
    plain = CrossEntropyConfig(label_smoothing=0.0)
    scoring = ValidationConfig() if recipe is None else recipe.validation
    scores = validate_bundle(
        bundle,
        options.data,
        options.split,
        mesh,
        trained_on=None if recipe is None else recipe.data,
        objective=CrossEntropy(plain if recipe is None else recipe.objective.validation),
        generation=generation_of(recipe, options),
        required=bool(options.generate) or any(value is not None for value in options.method.values()),
        tokenize=scoring.tokenize if options.tokenize is None else options.tokenize,
        lowercase=scoring.lowercase if options.lowercase is None else options.lowercase,
        rouge=scoring.rouge if options.rouge is None else options.rouge,
        max_tokens=options.max_tokens,
    )
    return {**scores, "precision": precision}


@dataclass(frozen=True, kw_only=True)
class AngleOptions(CheckedOptions):
    """The options of `inspect LOGITS --against-teacher`.

    base: of a teacher that is an adapter bundle, if it has moved.
    student: a bundle, None for a fresh model of the teacher's shape.
    """

    store: Path
    teacher: Path
    data: DataDirectory
    base: Path | None = None
    student: Path | None = None
    tokens: Sequence[int] = (1024, 4096, 16384)
    renormalize: bool = False
    device: str = "auto"


def measure_angles(options: AngleOptions) -> Iterator[Angle]:
    """The angles of a store. DataError if it was not made by this teacher or of this data."""
    job = load_store_manifest(options.store).job
    source = load_teacher_source(options.teacher, options.data, job.split, options.device, precision="fp32", base=options.base)
    job.require_teacher(source.fingerprint, options.store, options.teacher)
    store = open_store(options.store, data=options.data, manifest=source.manifest, renormalize=options.renormalize)
    student, device = _student(options.student, source), torch.device(source.device)

    sizes = source.bundle.vocabulary
    kinds = [source.bundle.model_config.kind]
    collator = Collator(
        student.config.kind, pad_id=sizes.pad_id, eos_id=sizes.eos_id, start_id=sizes.start_id, teacher_kinds=kinds
    )
    batches = random_batches(source.dataset, ANGLE_MAX_TOKENS, collator)
    return gradient_angles(
        student,
        list(student.parameters()),
        source.bundle.model,
        lambda batch: moved(store.signal(batch), device),
        (batch.to(device) for batch in batches),
        tokens=options.tokens,
        temperature=store.temperature,
    )


def _student(path: Path | None, source: TeacherSource) -> Model:
    """The bundle's model, or a fresh one of the teacher's shape."""
    if path is None:
        return build_model(source.bundle.model_config, source.bundle.vocabulary, seed=1).to(source.device).eval()
    bundle = load_bundle(path, device=source.device)
    if bundle.vocabulary != source.bundle.vocabulary:
        raise BundleError(f"{path} has another vocabulary than the teacher; name a student that was trained on the same data")
    return bundle.model
