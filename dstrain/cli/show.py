"""dstrain show: the resolved recipe, every default written out, or every mistake in it."""

from __future__ import annotations

import argparse
import sys

from dstrain.cli.common import add_recipe_arguments, recipe_from
from dstrain.recipe_file import dump_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the recipe as YAML that dstrain reads back."""
    sys.stdout.write(dump_recipe(recipe_from(args)))
    return 0
