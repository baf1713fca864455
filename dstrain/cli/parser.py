"""An argument parser whose mistakes name the nearest option, or the recipe key that was meant, under the usage of the verb."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from dstrain.cli.unknown_option import option_remedy
from dstrain.errors import close_to

IN_WORDS = {
    r"argument (\S+): expected (one|at least one) argument": r"\1 lacks its value",
    r"invalid float value: (.*)": r"\1 is not a number",
    r"invalid int value: (.*)": r"\1 is not a whole number",
    r"ignored explicit argument (.*)": r"it takes no value, so leave \1 out",
}
"""A message of argparse -> the message here."""


def help_of(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """What runs if no verb was named: prints the help."""

    def run(_: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    return run


class Parser(argparse.ArgumentParser):
    """Parser of the command line or of one verb; options are not abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "allow_abbrev": False})

    # Untyped as in argparse, whose overloads differ by the type of the namespace.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but unknown options are an error of their own verb, and come before missing ones."""
        if unknown := list(self._unknown_options(args)):
            self.error("; ".join(option_remedy(self, option, args) for option in unknown))
        parsed, extra = super().parse_known_args(args, namespace)
        if extra:
            self.error(f"{' '.join(extra)}: not expected; {self.prog} takes no more words")
        return parsed, extra

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 after the usage and the message."""
        for pattern, words in IN_WORDS.items():
            message = re.sub(pattern, words, message)
        super().error(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if choices and value not in (action.choices or ()):
            close = close_to(str(value), choices)
            remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{value!r} is unknown; {remedy}")
        super()._check_value(action, value)

    def _unknown_options(self, args: Sequence[str]) -> Iterator[str]:
        """Words of this parser, not of a verb behind it, that look like options."""
        for word in args:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return
            name = word.partition("=")[0] if word.startswith("--") else word[:2]  # -sVALUE is -s VALUE
            if re.match(r"--?[A-Za-z]\S*$", word) and name not in self._option_string_actions:
                yield word
