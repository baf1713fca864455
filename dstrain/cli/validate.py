"""dstrain validate: loss, perplexity, BLEU and chrF of a bundle on a split of prepared data.

Prints one JSON object. The loss is that of the bundle's recipe, in nats; perplexity never includes label smoothing, and is always
per target token. Text is generated as the recipe says, unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dstrain.cli.common import named, positive_number


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
    from dstrain.build.evaluation import ValidateOptions, validate

    scores = validate(ValidateOptions(**named(args, "bundle", "data", "split", "generate", "beam_size", "max_tokens", "device")))
    if scores is not None:
        print(json.dumps({"bundle": str(args.bundle), "data": str(args.data), "split": args.split, **scores}, indent=1))
    return 0
