"""dstrain inspect: the contents of a directory, a check of every byte, and the quality of dumped logits.

    dstrain inspect DATA|BUNDLE|LOGITS
    dstrain inspect LOGITS --against-teacher BUNDLE --data DATA

The last compares, on the same random tokens, the gradient that a student gets from the store with the one it would get from all
of the teacher's probabilities: angle in degrees, and ratio of lengths. With a sampled store the angle falls like one over the
root of the number of tokens; one that stays is a bias that no amount of data removes. Without --student it is a fresh model of
the teacher's shape; gradients of a trained student are small, so its angles are larger.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.checkpoint.directories import is_bundle, require_bundle
from dstrain.cli.bundle_arguments import add_base_argument, add_device_argument
from dstrain.cli.common import add_data_argument, named, positive_number
from dstrain.data.prepared.location import data_directory
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import DataError
from dstrain.storage.directory_kind import directory_kind, instead_of
from dstrain.storage.sharded_job import PARTS_FILE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help="prepared data (or its URL), a bundle, or dumped logits")
    add_base_argument(parser)
    group = parser.add_argument_group("gradients of dumped logits")
    group.add_argument("--against-teacher", metavar="BUNDLE", type=Path, help="the teacher that made them")
    add_data_argument(group)
    group.add_argument("--student", metavar="BUNDLE", type=Path, help="whose gradient (default: a fresh model)")
    sizes = (1024, 4096, 16384)
    group.add_argument("--tokens", metavar="N", type=positive_number, nargs="+", default=sizes, help=f"default: {sizes}")
    group.add_argument("--renormalize", action="store_true", help="topk: give the tail to the kept tokens (biased)")
    add_device_argument(group)


def run(args: argparse.Namespace) -> int:
    """Print the facts; with a teacher, the angles."""
    if (args.against_teacher is None) != (args.data is None):
        raise DataError("inspect --against-teacher BUNDLE needs --data DATA beside it, and the other way round")
    for bundle in filter(None, (args.against_teacher, args.student)):
        require_bundle(bundle)
    if args.data is not None:
        load_manifest(data_directory(args.data))
    print("\n".join(_describe(data_directory(args.path), args.base if args.against_teacher is None else None)))
    if args.against_teacher is not None:
        _print_angles(args)
    return 0


def _describe(path: Path, base: Path | None) -> list[str]:
    if is_bundle(path):
        from dstrain.checkpoint.bundle import describe_bundle

        return describe_bundle(path, base)
    if base is not None:
        raise DataError(f"--base {base} is for an adapter bundle, which {path} is not; leave it out")
    if directory_kind(path) == "prepared data":
        from dstrain.data.prepared.report import describe_data

        return describe_data(path)
    if directory_kind(path) == "dumped logits" or (path / PARTS_FILE).is_file():
        from dstrain.distillation.store.store import describe_store

        return describe_store(path)
    raise DataError(f"{path} is no prepared data, no bundle and no dumped logits: {instead_of('a bundle', path)}")


def _print_angles(args: argparse.Namespace) -> None:
    from dstrain.build.evaluation import AngleOptions, measure_angles

    options = named(args, "base", "data", "student", "tokens", "renormalize", "device")
    angles = measure_angles(AngleOptions(store=args.path, teacher=args.against_teacher, **options))
    print(f"{'tokens':>8} {'angle':>8} {'norm ratio':>11}")
    for angle in angles:
        print(f"{angle.tokens:8,} {angle.degrees:7.2f}° {angle.norm_ratio:11.3f}")
