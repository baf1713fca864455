"""From the options of pseudo-label to what does the work."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dstrain.cli.teacher import load_teacher_source
from dstrain.errors import DataError

if TYPE_CHECKING:
    from dstrain.generation.pseudo_label import Labeler


def build_labeler(args: argparse.Namespace, device: str) -> Labeler:
    """Teacher, data and job. DataError where they do not fit together."""
    from dstrain.api import generation_config
    from dstrain.data.config import DataConfig
    from dstrain.data.prepared.derived import LabelJob
    from dstrain.generation.constraints import SpecialIds
    from dstrain.generation.generator import Generator
    from dstrain.generation.pseudo_label import Labeler

    lesson = load_teacher_source(args.teacher, args.data, "train", device, args.precision)
    bundle, pairs = lesson.bundle, len(lesson.dataset)
    options = {name: vars(args)[name] for name in ("beam_size", "length_penalty", "max_tokens")}
    search = generation_config(bundle.recipe, {**options, "kind": "beam", "num_best": 1})
    limits = DataConfig.model_validate(lesson.manifest.data).filter
    if args.max_ratio is not None:
        if args.max_ratio <= 1:
            raise DataError(f"--max-ratio {args.max_ratio:g} would drop every pair of unequal lengths; choose a number above 1")
        limits = limits.model_copy(update={"max_ratio": args.max_ratio})
    pairs_per_part = args.pairs_per_shard or max(min(pairs // 64, 50_000), 1000)
    job = LabelJob(
        teacher=lesson.fingerprint,
        original=lesson.manifest.job,
        generation=search.model_dump(mode="json", exclude={"max_tokens"}),
        max_ratio=limits.max_ratio,
        max_repeats=args.max_repeats,
        keep_original=args.keep_original,
        pairs=pairs,
        parts=-(-pairs // pairs_per_part),
        pairs_per_part=pairs_per_part,
        precision=args.precision,
    )
    generator = Generator(
        bundle.model,
        search,
        SpecialIds.of(lesson.tokenizers.target),
        limits=bundle.model_config.limits,
        device=lesson.device,
    )
    return Labeler(generator, lesson.dataset, job, limits, (bundle.vocabulary.source, bundle.vocabulary.target), args.output)
