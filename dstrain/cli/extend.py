"""dstrain extend: a bundle with rotary positions that reads longer sequences; its weights stay as they are.

    dstrain extend BUNDLE --factor 4 --kind yarn --output LONGER
    dstrain extend BUNDLE --factor 4 --kind yarn --original-length 256 --output LONGER

Kinds: linear divides positions, ntk raises the base of the frequencies, yarn treats fast and slow frequencies apart. Train on
afterwards, with long text: `dstrain train RECIPE --base LONGER`. A recipe may name the scaling itself and start from BUNDLE, see
language_modeling/wikitext_extend. An adapter bundle is merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from dstrain.checkpoint.directories import check_bundle_output, require_bundle
from dstrain.cli.bundle_arguments import add_base_argument
from dstrain.cli.common import add_overwrite_argument, named, positive_number
from dstrain.errors import ArgumentError
from dstrain.models.extend import ExtensionKind, check_factor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle with rotary positions")
    add_base_argument(parser)
    parser.add_argument("--factor", metavar="X", type=_factor, required=True, help="new length by old length, from 1 on")
    parser.add_argument("--kind", choices=get_args(ExtensionKind), required=True, help="how positions are scaled")
    parser.add_argument(
        "--original-length",
        metavar="N",
        type=positive_number,
        help="tokens that the model was trained with (default: the longest sequence that it reads)",
    )
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the extended bundle")
    add_overwrite_argument(parser, "BUNDLE at --output")


def run(args: argparse.Namespace) -> int:
    """Extend, and say how far the model reads now."""
    require_bundle(args.bundle, args.base)
    check_bundle_output(args.output, {"BUNDLE": args.bundle}, overwrite=args.overwrite)
    from dstrain.build.extension import ExtendOptions, extend

    names = ("bundle", "base", "kind", "factor", "original_length", "output", "overwrite")
    limits = extend(ExtendOptions(**named(args, *names))).limits
    reads = (
        f"{limits.target:,} tokens" if limits.joint else f"sources of {limits.source:,} and targets of {limits.target:,} tokens"
    )
    print(f"{args.bundle} extended {args.factor:g} times by {args.kind}: it reads {reads} -> {args.output}")
    return 0


def _factor(text: str) -> float:
    try:
        return check_factor(float(text))
    except (ValueError, ArgumentError) as error:
        raise argparse.ArgumentTypeError(f"{error}") from error
