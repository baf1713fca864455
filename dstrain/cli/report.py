"""dstrain report: draw loss, learning rate, gradient norm, throughput and validation curves as a PNG and one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.cli.common import add_overwrite_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="run directory that `dstrain train` wrote")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where report.png and report.html go (default: RUN)")
    add_overwrite_argument(parser, "report.png and report.html in DIR; in RUN they are always drawn anew")


def run(args: argparse.Namespace) -> int:
    """Read the events and draw."""
    from dstrain.training.curves import write_report

    png, page = write_report(args.run_directory, args.output or args.run_directory, overwrite=args.overwrite)
    print(f"{png}\n{page}")
    return 0
