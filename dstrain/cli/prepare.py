"""dstrain prepare: turn the text that a recipe names into a tokenizer and Arrow shards.

Reads the corpora of the recipe's data section, trains or takes its tokenizer, and writes DATA: shards, tokenizer/, manifest.json.
The same command again continues an interrupted run, and does nothing where DATA is finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.cli.common import add_overwrite_argument, positive_number
from dstrain.cli.recipe_arguments import add_recipe_arguments, recipe_from
from dstrain.parallel.launch_environment import num_cores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE, --output, --workers, --overwrite."""
    add_recipe_arguments(parser)
    parser.add_argument("--output", metavar="DATA", type=Path, required=True, help="directory to write")
    parser.add_argument("--workers", metavar="N", type=positive_number, help="processes that encode (default: all cores)")
    add_overwrite_argument(parser, "DATA")


def run(args: argparse.Namespace) -> int:
    """Prepare, and print the counts."""
    from dstrain.data.prepared.prepare import prepare

    recipe = recipe_from(args)
    workers = args.workers or num_cores()
    report = prepare(recipe.data, args.output, workers=workers, overwrite=args.overwrite)
    print("\n".join(report.lines()))
    return 0
