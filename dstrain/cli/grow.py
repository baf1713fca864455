"""dstrain grow: a bundle with more entries in its vocabulary; what it computed before it still computes.

    dstrain grow BUNDLE --tags __pl__ --text train.pl --output GROWN
    dstrain grow BUNDLE --symbols '<mask>' --output GROWN
    dstrain grow BUNDLE --tokenizer DATA/tokenizer --output GROWN

Tags are words, such as those of a language; symbols may stand anywhere; of a text every character becomes a symbol that the
vocabulary lacks; --tokenizer is a directory with all entries of the bundle's and more. The rows of old entries stay, new rows are
the mean of the old ones. Train on with the grown tokenizer:

    data: {tokenizer: {kind: tokenizer_directory, path: GROWN/tokenizer}, ...}      in RECIPE
    dstrain train RECIPE --base GROWN --data DATA --output RUN

An adapter bundle is merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.cli.bundle_arguments import add_base_argument
from dstrain.cli.common import add_overwrite_argument, named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle with a tokenizer")
    add_base_argument(parser)
    parser.add_argument("--tags", metavar="WORD", nargs="+", default=[], help="words of one token each")
    parser.add_argument("--symbols", metavar="SYMBOL", nargs="+", default=[], help="strings that are never split")
    parser.add_argument("--text", metavar="FILE", type=Path, help="text of a new language: for its characters")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="a tokenizer with the bundle's entries and more")
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the grown bundle")
    add_overwrite_argument(parser, "BUNDLE at --output")


def run(args: argparse.Namespace) -> int:
    """Grow, and say by how much."""
    from dstrain.build.growth import GrowOptions, grow

    own = named(args, "bundle", "base", "text", "tokenizer", "output", "overwrite")
    growth = grow(GrowOptions(**own, tags=tuple(args.tags), symbols=tuple(args.symbols)))
    sides = " and ".join(
        f"{side} {getattr(growth.before, side):,} -> {getattr(growth.after, side):,}" for side in ("source", "target")
    )
    print(f"{args.bundle} grown: vocabulary of the {sides} -> {args.output}")
    return 0
