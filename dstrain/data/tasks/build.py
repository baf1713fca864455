"""From the configuration of a task to the task."""

from __future__ import annotations

from dstrain.data.tasks.config import (
    Denoising,
    LanguageModeling,
    Mass,
    PrefixLanguageModeling,
    SpanCorruption,
    TextTask,
)
from dstrain.data.tasks.denoising import DenoisingTask
from dstrain.data.tasks.mass import MassTask
from dstrain.data.tasks.span_corruption import SpanCorruptionTask
from dstrain.data.tasks.symbols import Symbols
from dstrain.data.tasks.task import ExampleTask, LanguageModelingTask, PrefixTask
from dstrain.protocols import TextTokenizer


def build_task(config: TextTask, tokenizer: TextTokenizer, key: str) -> ExampleTask:
    """The task of a corpus. key: its place in the recipe, for messages.

    Raises DataError if the tokenizer lacks a symbol of the task, or has no token that ends a sentence for a task that needs them.
    """
    match config:
        case LanguageModeling():
            return LanguageModelingTask()
        case PrefixLanguageModeling():
            return PrefixTask()
        case Denoising():
            return DenoisingTask(config, Symbols(tokenizer, key))
        case SpanCorruption():
            return SpanCorruptionTask(config, Symbols(tokenizer, key))
        case Mass():
            return MassTask(config, Symbols(tokenizer, key))
