"""The options of the perplexity of a text, and the checks of them that cost nothing: no torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dstrain.arguments import CheckedOptions
from dstrain.checkpoint.directories import require_bundle
from dstrain.config_base import PrecisionChoice
from dstrain.data.sources.opening import STANDARD
from dstrain.errors import ArgumentError, DataError

Document = Literal["line", "file"]
"""What is read as one text, at whose beginning a model knows nothing."""


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions(CheckedOptions):
    """The options of `dstrain perplexity`.

    file: text, `-` for standard input. document: line = lines have nothing to do with one another, as in training; file = one
    follows the other. context_window: tokens that the model reads at once, None for as many as it can. stride: of windows in a
    longer document, None for half a window. max_tokens: padded tokens of a batch. base: of an adapter bundle, if it has moved.
    precision: auto = bf16 on a GPU that has it, else fp32.
    """

    bundle: Path
    file: str = STANDARD
    base: Path | None = None
    document: Document = "line"
    context_window: int | None = None
    stride: int | None = None
    max_tokens: int = 4096
    device: str = "auto"
    precision: PrecisionChoice = "auto"


def check_perplexity(options: PerplexityOptions) -> None:
    """Raise a DstrainError for every mistake in arguments and paths that shows before anything is loaded."""
    for name in ("context_window", "stride", "max_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArgumentError(f"{name} = {value} is not a number of tokens; choose one from 1 on")
    if options.context_window is not None:
        check_stride(options.stride, options.context_window)
    require_bundle(options.bundle, options.base)
    if options.file != STANDARD:
        try:
            Path(options.file).stat()
        except OSError as error:
            raise DataError(f"{options.file}: {error.strerror}; check the path") from error


def check_stride(stride: int | None, context_window: int) -> None:
    """ArgumentError if windows would leave tokens between them."""
    if stride is not None and stride > context_window:
        raise ArgumentError(
            f"stride = {stride} (--stride) exceeds context_window = {context_window} (--context-window), so that tokens between "
            f"windows would have no score; lower --stride to {context_window}"
        )
