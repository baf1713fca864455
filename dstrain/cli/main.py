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
from dstrain.log import logger, setup_logging
from dstrain.parallel.launch_environment import rank_for_messages

VERBS = {
    "show": "check a recipe and print it resolved",
    "estimate": "say what memory, traffic and time a training will need, and recommend a layout",
    "prepare": "turn text into a tokenizer and Arrow shards",
    "train": "train, or resume training, into a run directory",
    "generate": "translate a file with a bundle",
    "interactive": "translate line by line from a terminal or a pipe",
    "evaluate": "score hypotheses: BLEU, chrF, TER with sacreBLEU signatures",
    "validate": "loss, perplexity and BLEU of a bundle on prepared data",
    "text": "write the raw text of an evaluation split",
    "consolidate": "make a bundle from a training checkpoint",
    "average": "average bundles into one",
    "merge": "merge an adapter bundle into its base, as a plain bundle",
    "report": "draw the curves of a run as PNG and HTML",
    "import": "bring what fairseq made: checkpoints, binarized data, command lines",
    "completion": "print the script that completes verbs, options and recipes in your shell",
    "inspect": "describe a data directory, a bundle or dumped logits, and check that they are complete",
    "pseudo-label": "let a teacher translate the training sources: data for a student",
    "dump-logits": "write a teacher's distribution of every token to disk, to distill from later",
}
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
