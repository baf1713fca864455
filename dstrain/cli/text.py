"""dstrain text: the raw text of an evaluation split, as it was read by prepare: DIRECTORY/source.txt and target.txt.

Line k of both files is pair k. A line break inside a text, which JSON and parquet can hold, becomes a space.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.cli.common import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("data", metavar="DATA", type=Path, help="prepared data directory")
    parser.add_argument("--split", default="test", help="valid, or the name of a test split (default: test)")
    parser.add_argument("--output", metavar="DIRECTORY", type=Path, required=True, help="where source.txt and target.txt go")
    add_overwrite_argument(parser, "source.txt and target.txt")


def run(args: argparse.Namespace) -> int:
    """Write both sides, one line a pair."""
    from dstrain.data.prepared.dataset import open_dataset
    from dstrain.generation.formats import one_line
    from dstrain.storage.atomic import atomic_writer
    from dstrain.storage.outputs import check_output_file

    for name in ("source.txt", "target.txt"):
        check_output_file(args.output / name, {}, overwrite=args.overwrite)
    dataset = open_dataset(args.data, args.split)
    for name, line_of in (("source.txt", dataset.source_text), ("target.txt", dataset.target_text)):
        with atomic_writer(args.output / name) as sink:
            for row in range(len(dataset)):
                sink.write(f"{one_line(line_of(row))}\n".encode())
    print(f"{len(dataset)} pairs of {args.data}/{args.split} -> {args.output}/source.txt, target.txt")
    return 0
