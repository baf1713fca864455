"""Text in, its perplexity under a language model out."""

from __future__ import annotations

import math
from typing import Any

import torch

from dstrain.arguments import require_type
from dstrain.build.bundle_model import BundleModel, load
from dstrain.build.device import open_device
from dstrain.build.perplexity_options import PerplexityOptions, check_perplexity, check_stride
from dstrain.data.batching.collate import Collator
from dstrain.data.sources.opening import input_name
from dstrain.data.tokenizers.unknown import log_unknown
from dstrain.errors import ArgumentError, BundleError, DataError
from dstrain.evaluation.perplexity import PerplexityScorer
from dstrain.generation.files import count_lines, read_chunks
from dstrain.models.position_config import NoScaling, RotaryPosition
from dstrain.progress import Progress

LINES_READ = 256


def perplexity(options: PerplexityOptions) -> dict[str, Any]:
    """Score every line of a file: `TextScore.figures` by name, and context_window, stride and precision.

    ArgumentError for windows that the model cannot read or that leave gaps, BundleError for an encoder-decoder, DataError for a
    file that cannot be read or holds no text.

    >>> from pathlib import Path
    >>> from dstrain.api import PerplexityOptions, perplexity
    >>> figures = perplexity(PerplexityOptions(bundle=Path("lm/bundles/best"), file="in.txt", context_window=16, stride=8))
    >>> figures["num_lines"], figures["perplexity"] > 1
    (2, True)
    """
    require_type("options", options, PerplexityOptions)
    check_perplexity(options)
    model = load(options.bundle, open_device(options.device), base=options.base, precision=options.precision)
    if model.bundle.model_config.kind == "encoder_decoder":
        raise BundleError(
            f"{options.bundle} is an encoder-decoder, whose targets depend on sources: text alone has no perplexity; "
            "`dstrain validate BUNDLE --data DATA` gives that of pairs"
        )
    tokenizer, sizes, length = model.tokenizer.target, model.bundle.vocabulary, _context_window(model, options)
    check_stride(options.stride, length)
    stride = options.stride or max(1, length // 2)
    collator = Collator("decoder_only", pad_id=sizes.pad_id, eos_id=sizes.eos_id, start_id=sizes.start_id)
    scorer = PerplexityScorer(
        model.bundle.model,
        tokenizer,
        collator,
        torch.device(model.device),
        length=length,
        stride=stride,
        max_tokens=options.max_tokens,
    )
    with Progress("scoring", count_lines(options.file), "lines") as bar:
        chunks = read_chunks(options.file, LINES_READ)
        score = scorer(chunks, across_lines=options.document == "file", progress=bar.advance)
    if not score.num_tokens:
        raise DataError(f"{input_name(options.file)} has no line of text ({score.blank_lines} blank ones); name another file")
    log_unknown(score.unknown, tokenizer)
    return {**score.figures(), "context_window": length, "stride": stride, "precision": model.precision}


def _context_window(model: BundleModel, options: PerplexityOptions) -> int:
    """How many tokens the model reads at once. ArgumentError if it cannot."""
    config = model.bundle.model_config
    limit = config.limits.target
    length = options.context_window or limit
    if length > limit:
        extends = isinstance(config.position, RotaryPosition) and isinstance(config.position.scaling, NoScaling)
        factor = math.ceil(length / limit)
        remedy = f", or extend it: `dstrain extend BUNDLE --factor {factor} --kind yarn --output LONGER`" if extends else ""
        raise ArgumentError(
            f"context_window = {length}, but {options.bundle} reads {limit} tokens at most; lower --context-window{remedy}"
        )
    return length
