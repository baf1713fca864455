"""The arguments that generate and interactive share: a bundle, and the options of a search or of sampling."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dstrain.cli.bundle_arguments import add_base_argument, add_device_argument, add_precision_argument
from dstrain.cli.common import add_options, named, positive_number
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.formats import FORMATS

if TYPE_CHECKING:
    from dstrain.build.generation_options import GenerateOptions

GENERATION_OPTIONS: dict[str, tuple[Callable[[str], float], str]] = {
    "beam_size": (positive_number, "hypotheses kept per sentence; 1 is greedy"),
    "length_penalty": (float, "divide scores by length to this power; above 1 favors long hypotheses"),
    "groups": (positive_number, "diverse beam search with so many groups"),
    "diversity": (float, "diverse beam search: the penalty of a group for repeating an earlier one"),
    "num_best": (positive_number, "hypotheses (or samples) written per line"),
    "top_k": (positive_number, "sampling: only the k best tokens"),
    "top_p": (float, "sampling: only the smallest set of tokens with more than this mass"),
    "seed": (int, "sampling: decides the draws"),
    "temperature": (float, "divide logits by this"),
    "min_length": (int, "tokens before EOS, at least"),
    "max_length_ratio": (
        float,
        "tokens before EOS, at most: ratio x source length (of an empty source: prefix length) + offset",
    ),
    "max_length_offset": (int, "see --max-length-ratio"),
    "no_repeat_ngram": (int, "never say an n-gram of this size twice; 0 for no limit"),
    "unk_penalty": (float, "subtracted from the log-probability of <unk>"),
    "max_tokens": (positive_number, "size of a batch: hypotheses x (source + prefix) length"),
}
METHOD_OPTIONS = ("kind", "score", *GENERATION_OPTIONS)
"""Names of all options of a method."""


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """BUNDLE and all options; those not given follow the recipe in the bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="a bundle directory, for example RUN/bundles/best")
    add_base_argument(parser)
    parser.add_argument(
        "--adapter", metavar="DIR", type=Path, help="over BUNDLE: an adapter bundle trained on it, or a LoRA adapter of PEFT"
    )
    parser.add_argument(
        "--direction", metavar="NAME", help="of a multilingual model: whose tags and start token it reads, such as en-de"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the output (default: text)")
    add_device_argument(parser)
    add_precision_argument(parser)
    parser.add_argument("--threads", type=positive_number, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--truncate", action="store_true", help="cut lines longer than the model reads instead of refusing them")
    add_method_arguments(parser)


def add_method_arguments(parser: argparse.ArgumentParser, names: Sequence[str] = METHOD_OPTIONS) -> None:
    """The options of a search or of sampling, or some of them by name."""
    group = parser.add_argument_group("method, by default as in the bundle's recipe")
    group.add_argument("--sampling", dest="kind", action="store_const", const="sampling", help="draw instead of searching")
    add_options(group, {name: option for name, option in GENERATION_OPTIONS.items() if name in names})
    scores = get_args(BeamSearchConfig.model_fields["score"].annotation)
    group.add_argument("--score", choices=scores, help="log-probability by length ** length penalty, or the bare sum")


def generate_options(args: argparse.Namespace, *files: str) -> GenerateOptions:
    """The options of both verbs. files: further arguments of `generate`."""
    from dstrain.build.generation_options import GenerateOptions

    return GenerateOptions(
        **named(args, "bundle", "base", "adapter", "direction", "format", "truncate", "device", "precision", "threads", *files),
        method=named(args, *METHOD_OPTIONS),
    )
