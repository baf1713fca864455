"""dstrain average: the mean of the newest bundles of a run, or of named bundles.

dstrain average RUN --last 10 --output BUNDLE
dstrain average BUNDLE BUNDLE ... --output BUNDLE
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from dstrain.checkpoint.directories import check_bundle_output, is_bundle, newest_step_bundles, require_bundle, require_different
from dstrain.cli.bundle_arguments import add_base_argument
from dstrain.cli.common import add_overwrite_argument, positive_number
from dstrain.errors import BundleError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("inputs", metavar="RUN|BUNDLE", type=Path, nargs="+", help="one run directory, or several bundles")
    parser.add_argument(
        "--last", metavar="N", type=positive_number, help="how many of the run's newest step_... bundles (default: all)"
    )
    add_base_argument(parser)
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the averaged bundle")
    add_overwrite_argument(parser, "BUNDLE")


def run(args: argparse.Namespace) -> int:
    """Choose the bundles, then average them."""
    check_bundle_output(args.output, {str(path): path for path in args.inputs}, overwrite=args.overwrite)
    first = args.inputs[0]
    if len(args.inputs) == 1 and not is_bundle(first):
        choose = partial(newest_step_bundles, first, args.last)
    elif args.last is not None:
        raise BundleError("--last goes with one run directory, not with bundles: leave it out")
    else:
        choose = partial(list, args.inputs)
    for bundle in choose():
        require_bundle(bundle)
    require_different(args.inputs)
    from dstrain.checkpoint.average import average_bundles

    bundles = average_bundles(choose, args.output, args.base, overwrite=args.overwrite)
    number = "1 bundle" if len(bundles) == 1 else f"{len(bundles)} bundles"
    print(f"mean of {number} ({', '.join(path.name for path in bundles)}) -> {args.output}")
    return 0
