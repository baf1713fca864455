"""dstrain consolidate: make a bundle from a training checkpoint, whatever ranks and ZeRO stage wrote it.

dstrain consolidate RUN/checkpoints/step_00001000 --output BUNDLE

The checkpoint suffices, without a GPU: tensors are copied in pieces, so a model of any size needs little memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a directory step_... of RUN/checkpoints")
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the bundle")
    parser.add_argument(
        "--weights",
        choices=("as_bundles", "averaged", "trained"),
        default="as_bundles",
        help="default: the moving average if the run has one, as in its own bundles; else the weights as they are trained",
    )


def run(args: argparse.Namespace) -> int:
    """Verify the checkpoint, then stream its weights into a bundle."""
    from dstrain.checkpoint.consolidate import consolidate

    kind = consolidate(args.checkpoint, args.output, weights=args.weights)
    print(f"{kind} weights of {args.checkpoint} -> {args.output}")
    return 0
