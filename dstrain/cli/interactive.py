"""dstrain interactive: answer each line as it comes, from a terminal or a pipe.

    dstrain interactive RUN/bundles/best
    echo "a man rides a bike ." | dstrain interactive RUN/bundles/best --beam-size 10

A language model, trained on text only, continues the typed line; other models answer it as in their training pairs.
An empty line gives an empty line. On a terminal Ctrl-D and Ctrl-C end, and a line that cannot be translated
(too long, invalid UTF-8) gets a message and the next one is read; in a pipe it ends the command.
"""

from __future__ import annotations

import argparse
import sys

from dstrain.cli.generation_options import add_generation_arguments, generate_options
from dstrain.errors import DataError
from dstrain.log import logger


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    add_generation_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read, answer, flush, until the input ends."""
    from dstrain.build.generation_options import check_generation

    options = generate_options(args)
    check_generation(options)
    from dstrain.build.generation import open_translator
    from dstrain.data.sources.opening import STANDARD_INPUT
    from dstrain.data.sources.text import decode_line
    from dstrain.generation.files import standard_output
    from dstrain.generation.formats import Answer

    model, config, render = open_translator(options)
    at_terminal = sys.stdin.isatty()
    out = standard_output()
    number = 0
    try:
        while raw := _read_line(at_terminal):
            number += 1
            try:
                line = decode_line(raw, STANDARD_INPUT, number)
                (hypotheses,) = model.translate(
                    [line], config, direction=args.direction, truncate_source=args.truncate, first_line=number
                )
            except DataError as error:
                if not at_terminal:
                    raise
                logger.error("%s", error)
                continue
            out.write(render(Answer(number, line, hypotheses)))
            out.flush()
    except KeyboardInterrupt:
        if not at_terminal:
            raise
    finally:
        if at_terminal:
            print(file=sys.stderr)
    return 0


def _read_line(at_terminal: bool) -> bytes:
    """The next line with its end; nothing at the end of the input. The prompt goes to stderr, so output can be redirected."""
    if at_terminal:
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.buffer.readline()
