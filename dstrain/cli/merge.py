"""dstrain merge: an adapter bundle and its base as one plain bundle, which needs neither any more.

dstrain merge RUN/bundles/best --output BUNDLE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.checkpoint.directories import check_bundle_output, is_adapter, require_bundle
from dstrain.cli.bundle_arguments import add_base_argument
from dstrain.cli.common import add_overwrite_argument
from dstrain.errors import BundleError
from dstrain.storage.atomic import complete_version
from dstrain.storage.outputs import check_output_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="an adapter bundle")
    add_base_argument(parser)
    parser.add_argument("--output", metavar="BUNDLE", type=Path, required=True, help="directory of the plain bundle")
    add_overwrite_argument(parser, "BUNDLE at --output")


def run(args: argparse.Namespace) -> int:
    """Read, merge, write."""
    require_bundle(args.bundle)
    if not is_adapter(complete_version(args.bundle)):
        raise BundleError(f"{args.bundle} is a plain bundle already; name an adapter bundle, such as RUN/bundles/best")
    require_bundle(args.bundle, args.base)
    check_bundle_output(args.output, {"BUNDLE": args.bundle}, overwrite=args.overwrite)
    from dstrain.checkpoint.bundle import load_bundle, save_bundle
    from dstrain.models.weights import to_canonical

    bundle = load_bundle(args.bundle, base=args.base)
    check_output_path(args.output, bundle.sources)
    save_bundle(
        args.output,
        model_config=bundle.model_config,
        vocabulary=bundle.vocabulary,
        weights=to_canonical(bundle.model),
        tokenizers=bundle.tokenizers,
        recipe=bundle.recipe,
        task=bundle.task,
        notes={**bundle.notes, "merged_from": str(args.bundle)},
        overwrite=args.overwrite,
    )
    print(f"{args.bundle} merged into its base -> {args.output}")
    return 0
