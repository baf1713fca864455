"""What to write instead of an option that a verb does not have."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dstrain.errors import close_to


def option_remedy(parser: argparse.ArgumentParser, option: str, words: Sequence[str]) -> str:
    """The recipe key that is called like the option, if the verb takes a recipe; the nearest option; else all options.

    words: of the verb, the option and perhaps its value among them.
    """
    name, _, value = option.partition("=")
    following = [word for word in words[words.index(option) + 1 :][:1] if not word.startswith("--")]
    value = value or "".join(following) or "VALUE"
    visible = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    own = {text.lstrip("-"): text for action in visible for text in action.option_strings}
    if "set" in own and (key := _recipe_key(name.lstrip("-").replace("-", "_"))):
        return f"{name} is a key of the recipe; use --set {key}={value}"
    written = name.lstrip("-").replace("_", "-")
    close = [text for text in own if text.startswith(written)] or close_to(written, own)
    remedy = (
        f"did you mean {' or '.join(own[text] for text in close)}?" if close else f"it has {', '.join(own.values()) or 'none'}"
    )
    return f"{name} is no option of {parser.prog}; {remedy}"


def _recipe_key(name: str) -> str | None:
    from dstrain.recipe import Recipe
    from dstrain.storage.schema import key_paths

    paths = key_paths(name.rpartition(".")[2], Recipe)
    return next((path for path in paths if "." not in name or path == name), None)
