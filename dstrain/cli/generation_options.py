"""What generate and interactive share: the options of a search or of sampling, and the model that they apply to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, get_args

from dstrain.cli.common import add_options, positive_number
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.formats import FORMATS

if TYPE_CHECKING:
    from dstrain.api import MethodConfig, Model
    from dstrain.generation.formats import Answer

OPTIONS: dict[str, tuple[Callable[[str], float], str]] = {
    "beam_size": (positive_number, "hypotheses kept per sentence; 1 is greedy"),
    "length_penalty": (float, "divide scores by length to this power; above 1 favors long hypotheses"),
    "groups": (positive_number, "diverse beam search with so many groups"),
    "diversity": (float, "diverse beam search: what a group pays for saying the same as an earlier one"),
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


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """BUNDLE and all options; those not given follow the recipe in the bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle directory, for example RUN/bundles/best")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the output (default: text)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto, a GPU where there is one (default: auto)")
    parser.add_argument("--threads", type=positive_number, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--truncate", action="store_true", help="cut lines longer than the model reads instead of refusing them")
    group = parser.add_argument_group("method, by default as in the bundle's recipe")
    group.add_argument("--sampling", dest="kind", action="store_const", const="sampling", help="draw instead of searching")
    add_options(group, OPTIONS)
    scores = get_args(BeamSearchConfig.model_fields["score"].annotation)
    group.add_argument("--score", choices=scores, help="log-probability by length ** length penalty, or the bare sum")


def load_translator(args: argparse.Namespace, *, score_only: bool = False) -> tuple[Model, MethodConfig, Callable[[Answer], str]]:
    """The model, how it generates, and what turns an answer into output lines. score_only: given texts are scored."""
    import torch

    from dstrain.api import load
    from dstrain.generation.formats import formatter
    from dstrain.ops.allocator import keep_freed_memory

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = load(args.bundle, args.device)
    if model.device == "cpu":
        keep_freed_memory()
    config = model.generation_config({name: getattr(args, name) for name in ("kind", "score", *OPTIONS)})
    render = formatter(args.format, model.tokenizer.target, num_best=config.num_best, score_only=score_only)
    return model, config, render
