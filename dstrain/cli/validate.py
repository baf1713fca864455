"""dstrain validate: loss, perplexity, BLEU and chrF of a bundle on a split of prepared data.

Prints one JSON object. The loss is that of the bundle's recipe, in nats; perplexity never includes label smoothing, and is always
per target token. Text is generated as the recipe says, unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.cli.common import positive_number

if TYPE_CHECKING:
    from dstrain.distillation.config import ObjectiveConfig
    from dstrain.parallel.mesh import Mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="model directory, for example RUN/bundles/best")
    parser.add_argument("--data", metavar="DATA", type=Path, required=True, help="directory that `dstrain prepare` wrote")
    parser.add_argument("--split", default="valid", help="default: valid")
    parser.add_argument("--generate", action=argparse.BooleanOptionalAction, default=True, help="translate, too (default)")
    parser.add_argument("--beam-size", metavar="N", type=positive_number, help="default: as in the bundle's recipe")
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive_number, default=4096, help="padded tokens of a batch (default: 4096)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")


def run(args: argparse.Namespace) -> int:
    """Score on as many processes as were started; rank 0 prints."""
    from dstrain.parallel.mesh import build_mesh, finalize

    mesh = build_mesh(args.device)
    try:
        scores = _score(args, mesh)
    finally:
        finalize()
    if mesh.world.rank == 0:
        print(json.dumps({"bundle": str(args.bundle), "data": str(args.data), "split": args.split, **scores}, indent=1))
    return 0


def _score(args: argparse.Namespace, mesh: Mesh) -> dict[str, float]:
    from dstrain.api import generation_config
    from dstrain.build.objective import validation_objective
    from dstrain.checkpoint.bundle import load_bundle
    from dstrain.evaluation.bundle_validation import validate_bundle

    bundle = load_bundle(args.bundle, device=mesh.device)
    objective = _objective(bundle.recipe or {})
    generation = generation_config(bundle.recipe, {"beam_size": args.beam_size}) if args.generate else None
    return validate_bundle(
        bundle,
        args.data,
        args.split,
        mesh,
        objective=validation_objective(objective),
        generation=generation,
        max_tokens=args.max_tokens,
    )


def _objective(recipe: dict[str, Any]) -> ObjectiveConfig:
    """The objective of the bundle's recipe; plain cross-entropy where it has none."""
    from dstrain.objectives.config import CrossEntropyConfig
    from dstrain.recipe_file import check_recipe

    return check_recipe(recipe, "the bundle's recipe").objective if recipe else CrossEntropyConfig(label_smoothing=0.0)
