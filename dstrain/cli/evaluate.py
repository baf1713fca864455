"""dstrain evaluate: BLEU, chrF and TER as sacreBLEU computes them, ROUGE on request, and how much the text repeats itself.

Every score has its signature. A line may have several references, one in each file. A blank line is no reference, so that some
lines may have fewer than others.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import chain

from dstrain.cli.bundle_arguments import add_rouge_argument, add_tokenize_argument
from dstrain.log import logger

TITLES = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER", "rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}


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
        help="line-parallel; repeat it for several references, of which some may be blank lines: a line then has fewer",
    )
    parser.add_argument("--lowercase", action="store_true", help="let BLEU and chrF ignore case, as TER always does")
    add_tokenize_argument(parser, "auto", "auto")
    add_rouge_argument(parser, "none")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="default: text")


def run(args: argparse.Namespace) -> int:
    """Print a line for each score: its name, value and signature."""
    from dstrain.data.sources.opening import input_name, require_different_streams
    from dstrain.data.sources.text import read_lines
    from dstrain.errors import DataError
    from dstrain.evaluation.metrics.corpus import corpus_scores, doubtful_scores
    from dstrain.evaluation.metrics.tokenization import choose_tokenization
    from dstrain.generation.formats import require_sentences

    streams = {f"--reference {number}": path for number, path in enumerate(args.reference, 1)}
    require_different_streams({"--hypothesis": args.hypothesis, **streams})
    hypotheses = read_lines(args.hypothesis)
    require_sentences(hypotheses, input_name(args.hypothesis))
    references = [read_lines(path) for path in args.reference]
    for path, lines in zip(args.reference, references, strict=True):
        if len(lines) != len(hypotheses):
            lacking = "hypothesis" if len(hypotheses) < len(lines) else "reference"
            raise DataError(
                f"{input_name(args.hypothesis)} has {len(hypotheses)} lines, {input_name(path)} has {len(lines)}: line "
                f"{min(len(hypotheses), len(lines)) + 1} has no {lacking}; give files that are line-parallel"
            )
    tokenize = choose_tokenization(args.tokenize, chain(*references))
    for doubt in doubtful_scores(list(chain(*references)), tokenize=tokenize, rouge=args.rouge):
        logger.warning("%s", doubt)
    scores = corpus_scores(
        hypotheses,
        *([line if line.strip() else None for line in lines] for lines in references),
        metrics=("bleu", "chrf", "ter", "repetition"),
        lowercase=args.lowercase,
        tokenize=tokenize,
        rouge=args.rouge,
    )
    if args.format == "json":
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return 0
    for score in scores:
        detail = f"  ({score.detail})" if score.detail else ""
        print(f"{TITLES.get(score.name, score.name):10} {score.value:6.2f}  {score.signature}{detail}")
    return 0
