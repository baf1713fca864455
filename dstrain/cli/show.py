"""dstrain show: the resolved recipe, every default written out, or every mistake in it.

dstrain show translation/multi30k_tiny --set training.max_steps=1600
dstrain show --explain                  every key of a recipe
dstrain show --explain model.position   one key or section: values, default, meaning
"""

from __future__ import annotations

import argparse
import sys

from dstrain.cli.recipe_arguments import add_recipe_arguments, recipe_from
from dstrain.errors import RecipeError
from dstrain.log import logger
from dstrain.recipe_file import dump_recipe
from dstrain.recipe_reference import explain_key, reference_page
from dstrain.training.horizons import Horizons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_recipe_arguments(parser, required=False)
    parser.add_argument("--explain", nargs="?", const="", metavar="KEY", help="print what a key means; all keys without KEY")


def run(args: argparse.Namespace) -> int:
    """Print the recipe as YAML that dstrain reads back, or the reference of its keys."""
    if args.explain is not None and (args.recipe or args.overrides or args.base):
        raise RecipeError("--explain is about the keys of all recipes; leave RECIPE, --set and --base out, or --explain")
    if args.explain is not None:
        sys.stdout.write(explain_key(args.explain) if args.explain else reference_page())
    elif args.recipe is None:
        raise RecipeError("a RECIPE is missing: name one, or --explain [KEY] for the keys of all recipes")
    else:
        recipe = recipe_from(args)
        for warning in Horizons(recipe).warnings():
            logger.warning("%s", warning)
        sys.stdout.write(dump_recipe(recipe))
    return 0
