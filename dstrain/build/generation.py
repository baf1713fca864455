"""Text files in, generated text out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from dstrain.arguments import require_type
from dstrain.build.bundle_model import BundleModel, load
from dstrain.build.device import open_device
from dstrain.build.generation_options import GenerateOptions, check_generation
from dstrain.data.sources.opening import STANDARD
from dstrain.data.tokenizers.unknown import UnknownTokens, log_unknown
from dstrain.generation.config import BeamSearchConfig, SamplingConfig
from dstrain.generation.files import Chunk, check_texts, count_lines, translate_file
from dstrain.generation.formats import Answer, formatter
from dstrain.generation.generator import TextHypothesis
from dstrain.log import logger
from dstrain.progress import Progress


class Translator(NamedTuple):
    """A model, how it generates, and the function that turns an answer into output lines."""

    model: BundleModel
    config: BeamSearchConfig | SamplingConfig
    render: Callable[[Answer], str]


class GenerationReport(NamedTuple):
    """lines, tokens: read and generated. seconds: without loading the model."""

    lines: int
    tokens: int
    seconds: float


def open_translator(options: GenerateOptions) -> Translator:
    """Load the bundle. RecipeError for an option that the method does not have."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = open_device(options.device)
    model = load(options.bundle, device, base=options.base, adapter=options.adapter, precision=options.precision)
    if model.precision != "fp32":
        logger.info("%s computes in %s on %s", options.bundle, model.precision, model.device)
    config = model.generation_config(options.method)
    render = formatter(options.format, model.tokenizer.target, num_best=config.num_best, score_only=options.score_only)
    return Translator(model, config, render)


def generate_file(options: GenerateOptions) -> GenerationReport:
    """Answer every line of the input, or score the lines of the reference, chunk by chunk.

    Raises DataError for a file that cannot be read or does not fit, StorageError for an output that is an input, or that exists
    without `overwrite`, BundleError and RecipeError as `load` and `generate` do.

    >>> from pathlib import Path
    >>> from dstrain.api import GenerateOptions, generate_file
    >>> method = {"beam_size": 2, "max_length_ratio": 1.0}
    >>> options = GenerateOptions(bundle=Path("run/bundles/best"), input="in.txt", output="out.txt", method=method)
    >>> generate_file(options).lines == len(Path("out.txt").read_text().splitlines())
    True
    """
    require_type("options", options, GenerateOptions)
    check_texts(
        bundle=options.bundle,
        input=options.input,
        output=options.output,
        reference=options.reference,
        prefix=options.prefix,
        score_only=options.score_only,
        overwrite=options.overwrite,
    )
    check_generation(options)
    model, config, render = open_translator(options)
    tokenizer, unknown = model.tokenizer.target if model.continues else model.tokenizer.source, UnknownTokens()
    start = time.monotonic()
    own_output = options.output == STANDARD and sys.stdout.isatty()  # the answers themselves say how far it is
    with Progress("generating", count_lines(options.input), "lines", shown=not own_output) as bar:

        def answer(chunk: Chunk) -> list[list[TextHypothesis]]:
            unknown.add(tokenizer.encode(chunk.lines), tokenizer.unk_id)
            return _answer(model, config, options, chunk, bar.advance)

        lines, tokens = translate_file(
            answer, options.input, options.output, render, reference=options.reference, prefix=options.prefix
        )
    log_unknown(unknown, tokenizer)
    return GenerationReport(lines, tokens, max(time.monotonic() - start, 1e-9))


def _answer(
    model: BundleModel,
    config: BeamSearchConfig | SamplingConfig,
    options: GenerateOptions,
    chunk: Chunk,
    progress: Callable[[int], object],
) -> list[list[TextHypothesis]]:
    """The hypotheses of each line of a chunk: the model's, or with score_only the references."""
    if chunk.references is not None and options.score_only:
        scored = model.score_texts(
            chunk.lines,
            chunk.references,
            config,
            direction=options.direction,
            truncate=options.truncate,
            first_line=chunk.first,
            progress=progress,
        )
        return [[hypothesis] for hypothesis in scored]
    return model.translate(
        chunk.lines,
        config,
        direction=options.direction,
        prefixes=chunk.prefixes,
        truncate_source=options.truncate,
        first_line=chunk.first,
        progress=progress,
    )
