"""dstrain perplexity: how well a language model predicts a text, for each token, each word, each byte.

    dstrain perplexity RUN/bundles/best test.txt
    dstrain perplexity BUNDLE book.txt --document file --context-window 1024 --stride 256 --per-word
    zcat news.gz | dstrain perplexity BUNDLE - --json

Each line ends in EOS, which is scored as the end of the line; blank lines are left out. A line is a document, whose first token
has no context; with --document file all lines are one. A longer document than --context-window is read in windows whose ends are
--stride tokens apart: each token is scored once, from the second window on with at least window - stride tokens before it. Words
lie between white space; the ends of lines are none. Models of different tokenizers compare by word or by byte only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dstrain.cli.bundle_arguments import add_base_argument, add_device_argument, add_precision_argument
from dstrain.cli.common import named, positive_number

DOCUMENTS = {"line": "each line a document", "file": "the file one document"}
ARGUMENTS = ("bundle", "file", "base", "document", "context_window", "stride", "max_tokens", "device", "precision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle of a decoder-only model")
    parser.add_argument("file", metavar="FILE", help="text; may be compressed, or a pipe; - for standard input")
    add_base_argument(parser)
    parser.add_argument("--document", choices=tuple(DOCUMENTS), default="line", help="what is read as one text (default: line)")
    parser.add_argument(
        "--context-window", metavar="N", type=positive_number, help="tokens read at once (default: as many as the model can)"
    )
    parser.add_argument(
        "--stride", metavar="N", type=positive_number, help="tokens from window to window (default: half a window)"
    )
    parser.add_argument("--per-word", action="store_true", help="perplexity per word, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures")
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive_number, default=4096, help="padded tokens of a batch (default: 4096)"
    )
    add_device_argument(parser)
    add_precision_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Score, and print."""
    from dstrain.build.perplexity_options import PerplexityOptions, check_perplexity

    options = PerplexityOptions(**named(args, *ARGUMENTS))
    check_perplexity(options)
    from dstrain.build.perplexity import perplexity

    figures = perplexity(options)
    if args.json:
        print(json.dumps({"bundle": str(args.bundle), **named(args, "file", "document"), **figures}, indent=1))
        return 0
    by_word = f", {figures['word_perplexity']:.6g} per word" if args.per_word else ""
    blank = f" ({figures['blank_lines']:,} blank ones left out)" if figures["blank_lines"] else ""
    print(f"perplexity {figures['perplexity']:.6g} per token{by_word}; {figures['bits_per_byte']:.4f} bits per byte")
    print(
        f"{figures['num_tokens']:,} tokens, {figures['unknown_tokens']:,} of them <unk>, {figures['num_words']:,} words, "
        f"{figures['num_bytes']:,} bytes in {figures['num_lines']:,} lines{blank}"
    )
    window = f"windows of {figures['context_window']:,} tokens, stride {figures['stride']:,}"
    print(f"{window}; {DOCUMENTS[args.document]}; {figures['precision']}")
    return 0
