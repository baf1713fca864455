"""Convert a fairseq-train command line into a recipe.

dstrain import fairseq-args 'fairseq-train data-bin --arch transformer --max-tokens 4096 ...' > recipe.yaml
dstrain import fairseq-args "$(cat train.sh)" --output recipe.yaml

Comments at the top of the recipe name every option that has no counterpart, is unknown, or did in fairseq something else than it
says; with --output they are printed, too. Where the data directory is at hand, its pieces and languages are read from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dstrain.cli.common import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the format."""
    parser.add_argument(
        "command", metavar="COMMAND", help="the command line in one pair of quotes; `fairseq-train` may be left out"
    )
    parser.add_argument("--output", type=Path, metavar="RECIPE", help="file to write (default: standard output)")
    add_overwrite_argument(parser, "RECIPE")


def run(args: argparse.Namespace) -> int:
    """Convert, check, write."""
    from dstrain.interop.fairseq.command_line.convert import recipe_from_command
    from dstrain.storage.atomic import write_file
    from dstrain.storage.outputs import check_output_file

    if args.output is not None:
        check_output_file(args.output, {}, overwrite=args.overwrite)
    recipe = recipe_from_command(args.command)
    if args.output is None:
        sys.stdout.write(recipe)
        return 0
    write_file(args.output, recipe.encode())
    sys.stderr.writelines(line for line in recipe.splitlines(keepends=True) if line.startswith("#"))
    return 0
