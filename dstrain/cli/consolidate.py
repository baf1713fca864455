"""dstrain consolidate: make a bundle from a training checkpoint, whatever ranks and ZeRO stage wrote it.

dstrain consolidate RUN/checkpoints/step_00001000 --output BUNDLE

The checkpoint suffices, without a GPU: tensors are copied in pieces, so a model of any size needs little memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.checkpoint.directories import check_bundle_output, require_checkpoint
from dstrain.cli.common import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a directory step_... of RUN/checkpoints")
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the bundle")
    add_overwrite_argument(parser, "BUNDLE")
    parser.add_argument(
        "--weights",
        choices=("as_bundles", "averaged", "trained"),
        default="as_bundles",
        help="default: the moving average if the run has one, as in its own bundles; else the weights as they are trained",
    )


def run(args: argparse.Namespace) -> int:
    """Verify the checkpoint, then stream its weights into a bundle."""

    require_checkpoint(args.checkpoint)
    check_bundle_output(args.output, {"CHECKPOINT": args.checkpoint}, overwrite=args.overwrite)
    from dstrain.checkpoint.consolidate import consolidate

    kind = consolidate(args.checkpoint, args.output, weights=args.weights, overwrite=args.overwrite)
    print(f"{kind} weights of {args.checkpoint} -> {args.output}")
    return 0
