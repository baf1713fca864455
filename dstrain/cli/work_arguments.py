"""The arguments that dump-logits and pseudo-label share: teacher, data, and this job's share of the work."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from dstrain.checkpoint.directories import require_bundle
from dstrain.cli.bundle_arguments import add_base_argument, add_device_argument, add_precision_argument
from dstrain.cli.common import add_data_argument, add_overwrite_argument
from dstrain.data.prepared.location import data_directory
from dstrain.data.prepared.manifest import load_manifest
from dstrain.errors import DataError
from dstrain.storage.outputs import check_output_path
from dstrain.storage.sharded_job import ShardedJob, Worker

WORK = ("teacher", "base", "data", "output", "worker", "device", "precision", "overwrite")
"""Names of the shared arguments, as in `DumpOptions` and `LabelOptions`."""


def add_work_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """--teacher, --base, --data, --output, --shard, --device, --precision and --merge. output: the name of its value."""
    parser.add_argument("--teacher", metavar="BUNDLE", type=Path, help="model directory of the teacher")
    add_base_argument(parser)
    add_data_argument(parser)
    parser.add_argument("--output", metavar=output, type=Path, help="directory to write, or to go on with")
    parser.add_argument(
        "--shard",
        dest="worker",
        metavar="I/N",
        type=worker,
        default=Worker(0, 1),
        help="do share I (from 0) of N shares of the work (default: 0/1)",
    )
    add_device_argument(parser)
    add_precision_argument(parser)
    add_overwrite_argument(parser, f"{output} of another job")
    parser.add_argument("--merge", metavar=output, type=Path, help="check that every shard is there and complete, and finish")


def worker(text: str) -> Worker:
    """I/N, for `type=` of an argument."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share I/N of the work with I from 0 to N - 1; of two: 0/2 and 1/2")
    return Worker(int(numbers[1]), int(numbers[2]))


def check_work(args: argparse.Namespace, work: ShardedJob[Any, Any], output: str, split: str) -> None:
    """Check arguments and paths: DataError unless there is either all that work needs, or --merge."""
    present = [value is not None for value in (args.teacher, args.data, args.output, args.merge)]
    if args.merge is not None and (args.base is not None or args.overwrite):
        raise DataError(f"{work.verb} --merge reads no teacher and replaces nothing; leave --base and --overwrite out")
    if present not in ([True, True, True, False], [False, False, False, True]):
        raise DataError(f"{work.verb} takes --teacher, --data and --output, or --merge {output} without them")
    if args.merge is None:
        require_bundle(args.teacher, args.base)
        data = data_directory(args.data)
        load_manifest(data).require_split(split, data)
        check_output_path(args.output, {"--teacher": args.teacher, "--data": data})
        work.read(args.output)
