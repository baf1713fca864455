"""The arguments of the verbs that read a bundle, compute with it, or score what it says."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from dstrain.arguments import check_device_name
from dstrain.config_base import BleuTokenization, PrecisionChoice, RougeWords
from dstrain.errors import ArgumentError


def add_base_argument(parser: argparse.ArgumentParser) -> None:
    """--base, of the verbs that read bundles."""
    parser.add_argument(
        "--base", metavar="BUNDLE", type=Path, help="the base of an adapter bundle, if it is not where that looks for it"
    )


def add_device_argument(parser: argparse._ActionsContainer) -> None:
    """--device, of the verbs that compute with a bundle in one process, on any device."""
    text = "cpu, cuda, cuda:N or auto, a GPU if there is one (default: auto)"
    parser.add_argument("--device", type=_device_name, default="auto", help=text)


def _device_name(text: str) -> str:
    try:
        return check_device_name(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """--precision, of the verbs that compute with a bundle."""
    parser.add_argument(
        "--precision",
        choices=get_args(PrecisionChoice),
        default="auto",
        help="of the computation; auto = bf16 on a GPU that has it, else fp32 (default: auto)",
    )


def add_tokenize_argument(parser: argparse.ArgumentParser, default: BleuTokenization | None, shown: str) -> None:
    """--tokenize, of the verbs that compute BLEU. shown: the default in words."""
    parser.add_argument(
        "--tokenize",
        metavar="NAME",
        choices=get_args(BleuTokenization),
        default=default,
        help=f"how BLEU finds words: {', '.join(get_args(BleuTokenization))} (auto = by script; default: {shown})",
    )


def add_rouge_argument(parser: argparse.ArgumentParser, shown: str) -> None:
    """--rouge, of the verbs that score text. shown: the default in words."""
    parser.add_argument(
        "--rouge",
        choices=get_args(RougeWords),
        help=f"ROUGE-1, 2 and L of words without English endings, or of plain words; needs dstrain[rouge] (default: {shown})",
    )
