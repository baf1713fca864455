"""Turn a fairseq-train command line into a recipe."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the format takes."""


def run(args: argparse.Namespace) -> int:
    """Later."""
    return 0
