"""dstrain recipes: every shipped recipe with one line about it.

`dstrain show RECIPE` prints one with all that it holds; the beginning of its file says what it costs and reaches.
"""

from __future__ import annotations

import argparse

from dstrain.recipe_file import recipe_summaries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has none."""


def run(args: argparse.Namespace) -> int:
    """Print names and summaries."""
    summaries = recipe_summaries()
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")
    return 0
