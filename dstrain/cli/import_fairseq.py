"""Convert a fairseq checkpoint of an encoder-decoder transformer into a bundle: weights, configuration and tokenizers.

dstrain import fairseq checkpoint_best.pt --dictionary data-bin --sentencepiece spm.model --output BUNDLE

A checkpoint with LoRA adapters becomes an adapter bundle; BUNDLE/base is the model that they were trained on. A multilingual
model becomes a bundle of one direction. BUNDLE/recipe.yaml trains it further as the checkpoint's settings say.
"""

from __future__ import annotations

import argparse
from pathlib import Path


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
    parser.add_argument(
        "--language-tags",
        nargs="+",
        default=[],
        metavar="TAG",
        help="words before the text that SentencePiece does not split, or patterns of them: '???_????' for eng_Latn and the like",
    )
    parser.add_argument(
        "--unmerged",
        action="store_true",
        help="LoRA adapters are not merged into the weights; so it is in crash.pt, which is known by its name",
    )
    parser.add_argument(
        "--pair", metavar="SRC-TGT", help="direction of a multilingual model, such as de-en; default: the one that it names"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")


def run(args: argparse.Namespace) -> int:
    """Read, convert, write."""
    from dstrain.errors import ImportFormatError
    from dstrain.interop.fairseq.importing import FairseqImport, import_checkpoint
    from dstrain.log import logger

    models = args.sentencepiece
    if models and len(models) > 2:
        raise ImportFormatError(f"--sentencepiece takes one model or two (source, target), found {len(models)}")
    options = FairseqImport(
        checkpoint=args.checkpoint,
        output=args.output,
        dictionary=args.dictionary,
        sentencepiece=(models[0], models[-1]) if models else None,
        tags=args.language_tags,
        unmerged=args.unmerged,
        pair=args.pair,
    )
    for line in import_checkpoint(options):
        logger.info(line)
    return 0
