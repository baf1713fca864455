"""dstrain evaluate: BLEU, chrF and TER as sacreBLEU computes them, with signatures, and how much the text repeats itself."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import chain

from dstrain.cli.bundle_arguments import add_tokenize_argument
from dstrain.log import logger

TITLES = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER", "repetition": "repetition"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "--hypothesis", metavar="FILE", required=True, help="detokenized output, one line a sentence; - is standard input"
    )
    parser.add_argument(
        "--reference",
        metavar="FILE",
        required=True,
        action="append",
        help="line-parallel; repeat it for several references",
    )
    parser.add_argument("--lowercase", action="store_true", help="let BLEU and chrF ignore case, as TER always does")
    add_tokenize_argument(parser, "auto", "auto")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    """Print a line for each score: its name, value and signature."""
    from dstrain.data.sources.opening import input_name, require_different_streams
    from dstrain.data.sources.text import read_lines
    from dstrain.errors import DataError
    from dstrain.evaluation.metrics.corpus import corpus_scores
    from dstrain.evaluation.metrics.tokenization import choose_tokenization, doubtful_tokenization
    from dstrain.generation.formats import require_sentences

    streams = {f"--reference {number}": path for number, path in enumerate(args.reference, 1)}
    require_different_streams({"--hypothesis": args.hypothesis, **streams})
    hypotheses = read_lines(args.hypothesis)
    require_sentences(hypotheses, input_name(args.hypothesis))
    references = [read_lines(path) for path in args.reference]
    for path, lines in zip(args.reference, references, strict=True):
        if len(lines) != len(hypotheses):
            raise DataError(
                f"{input_name(args.hypothesis)} has {len(hypotheses)} lines, {input_name(path)} has {len(lines)}; "
                "give files that are line-parallel"
            )
    tokenize = choose_tokenization(args.tokenize, chain(*references))
    if (doubt := doubtful_tokenization(tokenize, chain(*references))) is not None:
        logger.warning("%s", doubt)
    scores = corpus_scores(
        hypotheses,
        *references,
        metrics=("bleu", "chrf", "ter", "repetition"),
        lowercase=args.lowercase,
        tokenize=tokenize,
    )
    if args.format == "json":
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return 0
    for score in scores:
        detail = f"  ({score.detail})" if score.detail else ""
        print(f"{TITLES[score.name]:10} {score.value:6.2f}  {score.signature}{detail}")
    return 0
