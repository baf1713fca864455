"""dstrain validate: loss, perplexity, BLEU, chrF and, on request, ROUGE of a bundle on a split of prepared data.

Prints one JSON object, with the signatures of the scores. The loss is that of the bundle's recipe, in nats; perplexity never
includes label smoothing, and is always per target token. Text is generated and scored by the recipe's `validation` section, as
training does it, unless options change that.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dstrain.build.validation_options import ValidateOptions, check_validation
from dstrain.cli.bundle_arguments import add_base_argument, add_precision_argument, add_rouge_argument, add_tokenize_argument
from dstrain.cli.common import add_data_argument, named, positive_number
from dstrain.cli.generation_options import METHOD_OPTIONS, add_method_arguments

FIGURES = ("generate", "tokenize", "lowercase", "rouge", "max_tokens", "device", "precision")
SCORED_METHOD = tuple(name for name in METHOD_OPTIONS if name not in ("num_best", "max_tokens"))
"""What decides the best hypothesis."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="model directory, for example RUN/bundles/best")
    add_base_argument(parser)
    add_data_argument(parser, required=True)
    parser.add_argument("--split", default="valid", help="default: valid")
    parser.add_argument("--generate", action=argparse.BooleanOptionalAction, help="translate, too (default: if it has sources)")
    add_tokenize_argument(parser, None, "as in the bundle's recipe")
    parser.add_argument("--lowercase", action=argparse.BooleanOptionalAction, help="BLEU and chrF ignore case (as in the recipe)")
    add_rouge_argument(parser, "as in the bundle's recipe")
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive_number, default=4096, help="padded tokens of a batch (default: 4096)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one")
    add_precision_argument(parser)
    add_method_arguments(parser, SCORED_METHOD)


def run(args: argparse.Namespace) -> int:
    """Score on as many processes as were started; rank 0 prints."""
    method = named(args, *SCORED_METHOD)
    options = ValidateOptions(**named(args, "bundle", "base", "data", "split", *FIGURES), method=method)
    check_validation(options)
    from dstrain.build.evaluation import validate

    scores = validate(options)
    if scores is not None:
        print(json.dumps({"bundle": str(args.bundle), "data": str(args.data), "split": args.split, **scores}, indent=1))
    return 0
