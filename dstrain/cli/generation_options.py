"""What generate and interactive share: the options of a search or of sampling, and the model that they apply to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstrain.api import MethodConfig, Model
    from dstrain.generation.formats import Answer

OPTIONS: dict[str, tuple[type, str]] = {
    "beam_size": (int, "hypotheses kept per sentence; 1 is greedy"),
    "length_penalty": (float, "divide scores by length to this power; above 1 favors long hypotheses"),
    "groups": (int, "diverse beam search with so many groups"),
    "diversity": (float, "diverse beam search: what a group pays for saying the same as an earlier one"),
    "num_best": (int, "hypotheses (or samples) written per line"),
    "top_k": (int, "sampling: only the k best tokens"),
    "top_p": (float, "sampling: only the smallest set of tokens with more than this mass"),
    "seed": (int, "sampling: decides the draws"),
    "temperature": (float, "divide logits by this"),
    "min_length": (int, "tokens before EOS, at least"),
    "max_length_ratio": (float, "tokens before EOS, at most: ratio x source length + offset"),
    "max_length_offset": (int, "see --max-length-ratio"),
    "no_repeat_ngram": (int, "never say an n-gram of this size twice; 0 for no limit"),
    "unk_penalty": (float, "subtracted from the log-probability of <unk>"),
    "max_tokens": (int, "size of a batch: hypotheses x source length"),
}


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """BUNDLE and all options; those not given follow the recipe in the bundle."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle directory, for example RUN/bundles/best")
    parser.add_argument("--format", choices=("text", "jsonl", "fairseq"), default="text", help="of the output (default: text)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto, a GPU where there is one (default: auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--truncate", action="store_true", help="cut lines longer than the model reads instead of refusing them")
    group = parser.add_argument_group("method, by default as in the bundle's recipe")
    group.add_argument("--sampling", dest="kind", action="store_const", const="sampling", help="draw instead of searching")
    for name, (kind, text) in OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=text)


def load_translator(args: argparse.Namespace) -> tuple[Model, MethodConfig, Callable[[Answer], str]]:
    """The model, how it generates, and what turns an answer into output lines."""
    import torch

    from dstrain.api import load
    from dstrain.generation.formats import formatter
    from dstrain.ops.allocator import keep_freed_memory

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = load(args.bundle, args.device)
    if model.device == "cpu":
        keep_freed_memory()
    config = model.generation_config({name: getattr(args, name) for name in ("kind", *OPTIONS)})
    return model, config, formatter(args.format, model.tokenizer.target, num_best=config.num_best)
