"""What several verbs share: types of arguments, and the arguments of an options object."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any


def add_data_argument(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    """--data, as text: the options that it goes to make a directory of it."""
    parser.add_argument("--data", metavar="DATA", required=required, help="what `dstrain prepare` wrote: a directory or a URL")


def add_overwrite_argument(parser: argparse.ArgumentParser, output: str) -> None:
    """--overwrite, of every verb that writes. output: what it replaces."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {output} if it exists")


def positive_float(text: str) -> float:
    """A number above 0, for `type=` of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_options(parser: argparse._ActionsContainer, options: Mapping[str, tuple[Callable[[str], object], str]]) -> None:
    """`--some-name` for each some_name, by its type and help."""
    for name, (kind, text) in options.items():
        metavar = "X" if kind in {float, positive_float} else "N"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, help=text)


def whole_number(text: str, least: int = 0) -> int:
    """A whole number from `least` on, for `type=` of an argument."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def positive_number(text: str) -> int:
    """A whole number from 1 on, for `type=` of an argument."""
    return whole_number(text, 1)


def named(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The arguments of these names, for the options of a verb."""
    return {name: vars(args)[name] for name in names}
