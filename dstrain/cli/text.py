"""dstrain text: the raw text of an evaluation split, as it was read by prepare: DIRECTORY/source.txt and target.txt.

Line k of both files is pair k. A line break inside a text, which JSON and parquet can hold, becomes a space. If the corpora name
references, there are reference_1.txt and so on, too; a blank line means that a pair has fewer, as `dstrain evaluate` reads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.cli.common import add_overwrite_argument

if TYPE_CHECKING:
    from dstrain.data.prepared.dataset import Dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("data", metavar="DATA", help="prepared data, a directory or a URL")
    parser.add_argument("--split", default="test", help="valid, or the name of a test split (default: test)")
    parser.add_argument(
        "--output", metavar="DIRECTORY", type=Path, required=True, help="where source.txt, target.txt and further references go"
    )
    add_overwrite_argument(parser, "these files")


def run(args: argparse.Namespace) -> int:
    """Write both sides, one line a pair."""
    from dstrain.data.prepared.dataset import open_dataset
    from dstrain.data.prepared.location import data_directory
    from dstrain.generation.formats import one_line
    from dstrain.storage.atomic import atomic_writer
    from dstrain.storage.outputs import check_output_file

    dataset = open_dataset(data_directory(args.data), args.split)
    rows = range(len(dataset))
    files: dict[str, Callable[[int], str]] = {"source.txt": dataset.source_text, "target.txt": dataset.target_text}
    most = max((len(dataset.references(row)) for row in rows), default=1) if dataset.has_references else 0
    files |= {f"reference_{number + 1}.txt": partial(_reference, dataset, number) for number in range(most)}
    for name in files:
        check_output_file(args.output / name, {}, overwrite=args.overwrite)
    for name, line_of in files.items():
        with atomic_writer(args.output / name) as sink:
            for row in rows:
                sink.write(f"{one_line(line_of(row))}\n".encode())
    print(f"{len(dataset)} pairs of {args.data}/{args.split} -> {args.output}/{', '.join(files)}")
    return 0


def _reference(dataset: Dataset, number: int, row: int) -> str:
    """One of a pair's references; blank if it has fewer."""
    return "".join(dataset.references(row)[number : number + 1])
