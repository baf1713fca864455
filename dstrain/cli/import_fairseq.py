"""Convert a fairseq checkpoint of an encoder-decoder transformer into a bundle: weights, configuration and tokenizers.

dstrain import fairseq checkpoint_best.pt --dictionary data-bin --sentencepiece spm.model --output BUNDLE

A checkpoint with LoRA adapters becomes an adapter bundle; BUNDLE/base is the model that they were trained on. A multilingual
model becomes a bundle of one direction. BUNDLE/recipe.yaml trains it further as the checkpoint's settings say.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dstrain.checkpoint.directories import check_bundle_output
from dstrain.cli.common import add_overwrite_argument
from dstrain.cli.import_ import add_tags_argument, model_pair
from dstrain.errors import ImportFormatError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the format."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a checkpoint*.pt file")
    parser.add_argument(
        "--dictionary",
        type=Path,
        metavar="DIR",
        help="directory of dict.SOURCE.txt and dict.TARGET.txt; default: the data directory that the checkpoint names",
    )
    parser.add_argument(
        "--sentencepiece",
        type=Path,
        nargs="+",
        metavar="MODEL",
        help="SentencePiece model in front of the dictionaries, or two: source, target; default: text is split by spaces",
    )
    add_tags_argument(parser)
    parser.add_argument(
        "--unmerged",
        action="store_true",
        help="LoRA adapters are not merged into the weights; so it is in crash.pt, which is known by its name",
    )
    parser.add_argument(
        "--pair", metavar="SRC-TGT", help="direction of a multilingual model, such as de-en; default: the one that it names"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")
    add_overwrite_argument(parser, "BUNDLE")


def run(args: argparse.Namespace) -> int:
    """Read, convert, write."""
    if not args.checkpoint.is_file():
        raise ImportFormatError(f"{args.checkpoint} is no file; name one checkpoint*.pt file")
    models = model_pair(args.sentencepiece)
    inputs = {"CKPT": args.checkpoint, "--dictionary": args.dictionary}
    inputs |= {f"--sentencepiece {model}": model for model in models or ()}
    check_bundle_output(args.output, inputs, overwrite=args.overwrite)
    from dstrain.interop.fairseq.importing import FairseqImport, import_checkpoint
    from dstrain.log import logger

    options = FairseqImport(
        checkpoint=args.checkpoint,
        output=args.output,
        dictionary=args.dictionary,
        sentencepiece=models,
        tags=args.language_tags,
        unmerged=args.unmerged,
        pair=args.pair,
        overwrite=args.overwrite,
    )
    for line in import_checkpoint(options):
        logger.info(line)
    return 0
