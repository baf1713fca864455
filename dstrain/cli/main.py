"""The command line: finds the verb, imports only this one, and turns a user's mistake into one message."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Collection, Sequence

from dstrain import __version__
from dstrain.cli.guard import guarded
from dstrain.cli.parser import Parser, help_of
from dstrain.cli.verbs import VERBS
from dstrain.log import logger, setup_logging
from dstrain.parallel.launch_environment import rank_for_messages

EPILOG = """a first run:
  dstrain prepare translation/quickstart --output data/quickstart
  dstrain train translation/quickstart --data data/quickstart --output runs/quickstart
  dstrain interactive runs/quickstart/bundles/best

on several GPUs or nodes the same recipe runs under a launcher:
  deepspeed --num_gpus 8 --module dstrain train RECIPE --data DATA --output RUN
`dstrain VERB --help` explains a verb."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 a mistake that the message explains, 2 usage, 130 interrupted."""
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not re.match(r"--local[-_]rank=", word)]
    try:
        args = build_parser([word for word in words if not word.startswith("-")][:1]).parse_args(words)
    except KeyboardInterrupt:  # imports take a moment
        logger.error("interrupted")
        return 130
    setup_logging(debug=args.debug, rank=rank_for_messages(os.environ))
    return guarded(args)


def build_parser(verbs: Collection[str]) -> Parser:
    """The parser of the command line; of all verbs only these have their arguments. Without a verb it prints its help."""
    parser = Parser(
        prog="dstrain",
        description="Train and run translation and other sequence models with DeepSpeed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=help_of(parser))
    parser.add_argument("--version", action="version", version=f"dstrain {__version__}")
    parser.add_argument("--debug", action="store_true", help="show stack traces and debug messages")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB")
    for name, summary in VERBS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in verbs:
            module = importlib.import_module(f"dstrain.cli.{'import_' if name == 'import' else name.replace('-', '_')}")
            subparser.description = f"{module.__doc__}"
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser
