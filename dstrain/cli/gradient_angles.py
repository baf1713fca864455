"""What `inspect --against-teacher` computes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.cli.teacher import TeacherSource, load_teacher_source
from dstrain.errors import BundleError

if TYPE_CHECKING:
    from dstrain.distillation.store.gradient_angle import Angle
    from dstrain.models.factory import Model

MAX_TOKENS = 512


def angles_of(args: argparse.Namespace) -> Iterator[Angle]:
    """The angles of the store `args.path`. DataError where it was not made by this teacher or of this data."""
    import torch

    from dstrain.data.batching.collate import Collator
    from dstrain.distillation.store.gradient_angle import gradient_angles, random_batches
    from dstrain.distillation.store.manifest import load_store_manifest
    from dstrain.distillation.store.store import moved, open_store

    job = load_store_manifest(args.path).job
    lesson = load_teacher_source(args.against_teacher, args.data, job.split, args.device)
    job.require_teacher(lesson.fingerprint, args.path, args.against_teacher)
    store = open_store(args.path, data=args.data, manifest=lesson.manifest, renormalize=args.renormalize)
    student, device = _student(args.student, lesson), torch.device(lesson.device)

    sizes = lesson.bundle.vocabulary
    kinds = [lesson.bundle.model_config.kind]
    collator = Collator(student.config.kind, pad_id=sizes.pad_id, eos_id=sizes.eos_id, teacher_kinds=kinds)
    batches = random_batches(lesson.dataset, MAX_TOKENS, collator)
    return gradient_angles(
        student,
        list(student.parameters()),
        lesson.bundle.model,
        lambda batch: moved(store.signal(batch), device),
        (batch.to(device) for batch in batches),
        tokens=args.tokens,
        temperature=store.temperature,
    )


def _student(path: Path | None, lesson: TeacherSource) -> Model:
    """The bundle's model, or a fresh one of the teacher's shape."""
    from dstrain.checkpoint.bundle import load_bundle
    from dstrain.models.factory import build_model

    if path is None:
        return build_model(lesson.bundle.model_config, lesson.bundle.vocabulary, seed=1).to(lesson.device).eval()
    bundle = load_bundle(path, device=lesson.device)
    if bundle.vocabulary != lesson.bundle.vocabulary:
        raise BundleError(f"{path} has another vocabulary than the teacher; name a student that was trained on the same data")
    return bundle.model
