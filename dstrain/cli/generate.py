"""dstrain generate: translate a file, line by line in the order of the input; every line gives a line, empty ones too.

    dstrain generate RUN/bundles/best --input test.en --output hyp.de --beam-size 5
    zcat news.en.gz | dstrain generate BUNDLE --num-best 5 --format jsonl > news.jsonl
    dstrain generate BUNDLE --input test.en --sampling --top-p 0.9 --seed 7 --output draws.de
    dstrain generate BUNDLE --input test.en --reference test.de --score-only > scores.txt
    echo "The castle was built" | dstrain generate LANGUAGE_MODEL --sampling --top-p 0.9

A language model, trained on text only, continues each line, which its answer repeats; other models translate the line.
Formats: text is one line for each input line; jsonl one object with all hypotheses, pieces and scores (natural logarithms);
fairseq the S- T- H- D- P- lines, numbered from 0, scores in base 2. Answers wait in OUTPUT.partial until all are there;
after Ctrl-C those that are finished stay in it. With --score-only the references are the only hypotheses; format text then is
one score for each line.
"""

from __future__ import annotations

import argparse

from dstrain.cli.common import add_overwrite_argument, named
from dstrain.cli.generation_options import add_generation_arguments, generate_options
from dstrain.log import logger

FILES = ("input", "output", "reference", "prefix", "score_only", "overwrite")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_generation_arguments(parser)
    parser.add_argument(
        "--input", metavar="FILE", default="-", help="text, one sentence a line; may be compressed, or a pipe (default: -)"
    )
    parser.add_argument("--output", metavar="FILE", default="-", help="default: standard output")
    add_overwrite_argument(parser, "the output")
    parser.add_argument("--reference", metavar="FILE", help="human translations to write beside the answers (jsonl, fairseq)")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--prefix", metavar="FILE", help="how each answer must begin, one text a line; free if the line is empty")
    task.add_argument("--score-only", action="store_true", help="translate nothing: score the lines of --reference")


def run(args: argparse.Namespace) -> int:
    """Translate chunk by chunk; say at the end how much and how fast."""
    from dstrain.build.generation_options import check_generation
    from dstrain.generation.files import check_texts

    check_texts(**named(args, "bundle", *FILES))
    options = generate_options(args, *FILES)
    check_generation(options)
    from dstrain.build.generation import generate_file

    lines, tokens, seconds = generate_file(options)
    logger.info(
        f"{lines:,} lines, {tokens:,} tokens in {seconds:.1f} s: {lines / seconds:,.1f} lines/s, {tokens / seconds:,.0f} tokens/s"
    )
    return 0
