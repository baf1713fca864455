"""dstrain completion: the script that completes verbs, options, files and the names of recipes in your shell.

eval "$(dstrain completion bash)"        in ~/.bashrc
dstrain completion zsh > ~/.zfunc/_dstrain
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

RECIPES = {
    "bash": '_dstrain_recipes() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_dstrain_recipes() {{ compadd -- {names}; _files; }}",
}
"""A shell -> its function that completes RECIPE."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("shell", metavar="SHELL", choices=tuple(RECIPES), help="bash or zsh")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from dstrain.cli.main import build_parser
    from dstrain.cli.verbs import VERBS
    from dstrain.extras import import_extra
    from dstrain.recipe_file import recipe_names

    shtab = import_extra("shtab", extra="completion", purpose="completion in a shell")
    parser = build_parser(VERBS)
    for action in _actions(parser):
        if action.metavar == "RECIPE" and not action.option_strings:
            action.complete = dict.fromkeys(RECIPES, "_dstrain_recipes")  # type: ignore[attr-defined]
        elif action.nargs != 0 and action.choices is None:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell, preamble=RECIPES[args.shell].format(names=" ".join(recipe_names()))))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The actions of a parser and of the verbs in it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
        else:
            yield action
