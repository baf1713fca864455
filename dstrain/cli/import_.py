"""Import from fairseq (a checkpoint, binarized data, a training command) or PEFT (an adapter).

dstrain import fairseq checkpoint_best.pt --dictionary data-bin --output BUNDLE
dstrain import fairseq-data data-bin --output DATA
dstrain import fairseq-args 'fairseq-train data-bin --arch transformer ...' --output recipe.yaml
dstrain import peft DIR --base BUNDLE --output ADAPTED
`dstrain import FORMAT --help` explains a format.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import TypeVar

from dstrain.cli.parser import help_of
from dstrain.errors import ImportFormatError

_M = TypeVar("_M")

IMPORT_FORMATS = {
    "fairseq": "convert a checkpoint of an encoder-decoder transformer into a bundle",
    "fairseq-data": "convert binarized data (.bin, .idx, dict.*.txt) into prepared data",
    "fairseq-args": "convert a fairseq-train command line into a recipe",
    "peft": "convert a LoRA adapter of PEFT into an adapter bundle",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each format; each imports its modules when it runs."""
    parser.set_defaults(run_format=help_of(parser))
    formats = parser.add_subparsers(dest="format", metavar="FORMAT")
    for name, summary in IMPORT_FORMATS.items():
        module = importlib.import_module(f"dstrain.cli.import_{name.replace('-', '_')}")
        subparser = formats.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run_format=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen format."""
    return int(args.run_format(args))


def model_pair(models: Sequence[_M] | None) -> tuple[_M, _M] | None:
    """The SentencePiece models of source and target that --sentencepiece names, if any."""
    if models is not None and len(models) > 2:
        raise ImportFormatError(f"--sentencepiece takes one model or two (source, target), found {len(models)}")
    return (models[0], models[-1]) if models else None


def add_tags_argument(parser: argparse.ArgumentParser) -> None:
    """--language-tags, of the formats with tokenizers."""
    parser.add_argument(
        "--language-tags",
        nargs="+",
        default=[],
        metavar="TAG",
        help="words before the text that SentencePiece does not split, or patterns of them: '???_????' for eng_Latn and the like",
    )
