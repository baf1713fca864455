"""From the options of dump-logits to what does the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from dstrain.cli.common import positive_float, positive_number, whole_number
from dstrain.cli.teacher import load_teacher_source

if TYPE_CHECKING:
    from dstrain.distillation.store.dump import Dumper

METHOD: dict[str, tuple[Callable[[str], object], str]] = {
    "draws": (positive_number, "sample: draws a token (default: 50)"),
    "seed": (whole_number, "sample: decides the draws (default: 1)"),
    "k": (positive_number, "topk: types a token (default: 64)"),
    "dtype": (str, "topk: of log-probabilities: uint8, float16 or float32 (default: uint8)"),
    "temperature": (positive_float, "divide the teacher's logits by this (default: 1)"),
}


def build_dumper(args: argparse.Namespace, device: str) -> Dumper:
    """Teacher, data and job. DataError where they do not fit together."""
    from dstrain.distillation.store.dump import Dumper, plan_dump
    from dstrain.distillation.store.manifest import choose_method

    method = choose_method(args.method, {name: vars(args)[name] for name in METHOD})
    lesson = load_teacher_source(args.teacher, args.data, args.split, device, args.precision)
    bundle = lesson.bundle
    job = plan_dump(
        method,
        lesson.dataset,
        lesson.manifest,
        args.split,
        lesson.fingerprint,
        vocabulary=bundle.vocabulary,
        tokens_per_shard=args.tokens_per_shard,
        precision=args.precision,
    )
    return Dumper(
        bundle.model,
        lesson.dataset,
        job,
        args.output,
        bundle.vocabulary,
        lesson.device,
        args.max_tokens,
    )
