"""Convert the output of fairseq-preprocess into prepared data that `dstrain train` and `validate` read.

dstrain import fairseq-data data-bin --output DATA > data.yaml
dstrain import fairseq-data part1:part2 --source-lang en --target-lang de --sentencepiece spm.model --output DATA

A directory without languages (train.idx) is text for a language model. Prints the `data:` section that a recipe needs to be
trained on DATA; one may say `extends: [RECIPE, data.yaml]`. Training pairs with an empty side or one of more than 1,024 tokens
are dropped and counted; for other limits put the section into a recipe, change `filter` and run `dstrain prepare RECIPE`, which
reads the same files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dstrain.cli.common import add_overwrite_argument
from dstrain.cli.import_ import add_tags_argument, model_pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the format."""
    parser.add_argument("directories", metavar="DIR", help="--destdir of fairseq-preprocess, or several joined by ':'")
    parser.add_argument("--output", type=Path, required=True, metavar="DATA", help="directory to write")
    parser.add_argument("-s", "--source-lang", metavar="LANG", help="default: from the names of the files")
    parser.add_argument("-t", "--target-lang", metavar="LANG", help="default: from the names of the files")
    parser.add_argument(
        "--sentencepiece",
        nargs="+",
        metavar="MODEL",
        help="SentencePiece model that made the dictionaries' symbols, or two: source, target; default: symbols are words",
    )
    add_tags_argument(parser)
    add_overwrite_argument(parser, "DATA")


def run(args: argparse.Namespace) -> int:
    """Find the files, write the data, print its section."""
    import yaml

    from dstrain.data.prepared.prepare import prepare
    from dstrain.data.sources.fairseq_directory import fairseq_data

    data = fairseq_data(
        [Path(directory) for directory in args.directories.split(":")],
        source=args.source_lang,
        target=args.target_lang,
        models=model_pair(args.sentencepiece),
        tags=args.language_tags,
    )
    report = prepare(data, args.output, workers=1, overwrite=args.overwrite)
    section = yaml.safe_dump({"data": data.model_dump(mode="json")}, sort_keys=False, allow_unicode=True, width=120)
    sys.stdout.write("".join(f"# {line}\n" for line in report.lines()) + section)
    return 0
