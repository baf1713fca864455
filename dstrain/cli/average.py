"""dstrain average: the mean of the newest bundles of a run, or of named bundles.

dstrain average RUN --last 10 --output BUNDLE
dstrain average BUNDLE BUNDLE ... --output BUNDLE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.cli.bundle_arguments import add_base_argument
from dstrain.cli.common import positive_number
from dstrain.errors import BundleError
from dstrain.storage.directory_kind import instead_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("inputs", metavar="RUN|BUNDLE", type=Path, nargs="+", help="one run directory, or several bundles")
    parser.add_argument(
        "--last", metavar="N", type=positive_number, help="how many of the run's newest step_... bundles (default: all)"
    )
    add_base_argument(parser)
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the averaged bundle")


def run(args: argparse.Namespace) -> int:
    """Choose the bundles, then average them."""
    from dstrain.checkpoint.average import average_bundles

    bundles = _newest(args.inputs[0], args.last) if _is_run(args.inputs) else args.inputs
    if args.last is not None and bundles is args.inputs:
        raise BundleError("--last goes with one run directory, not with bundles: leave it out")
    average_bundles(bundles, args.output, args.base)
    print(f"mean of {len(bundles)} bundles ({', '.join(path.name for path in bundles)}) -> {args.output}")
    return 0


def _is_run(inputs: list[Path]) -> bool:
    from dstrain.checkpoint.bundle_directory import is_bundle

    return len(inputs) == 1 and not is_bundle(inputs[0])


def _newest(directory: Path, count: int | None) -> list[Path]:
    """The newest step bundles of a run, oldest first."""
    from dstrain.training.bundles import step_bundles

    if not (directory / "bundles").is_dir():
        raise BundleError(
            f"{directory} is neither a run (it has no bundles/) nor a bundle (it has no model.yaml): "
            f"{instead_of('a run', directory)}"
        )
    present = step_bundles(directory / "bundles")
    if not present or len(present) < (count or 1):
        raise BundleError(
            f"{directory}/bundles holds {len(present)} step_... bundles, not {count or 1}: lower --last, "
            "or train with a larger checkpoint.keep_bundles"
        )
    return present[-count:] if count else present
