"""From the tasks of a recipe to the examples of a split."""

from __future__ import annotations

from collections.abc import Sequence

from dstrain.data.batching.loader import Examples
from dstrain.data.prepared.dataset import Dataset
from dstrain.data.tasks.config import (
    Denoising,
    LanguageModeling,
    Mass,
    PrefixLanguageModeling,
    SpanCorruption,
    TextTask,
)
from dstrain.data.tasks.denoising import DenoisingTask
from dstrain.data.tasks.examples import TaskExamples
from dstrain.data.tasks.mass import MassTask
from dstrain.data.tasks.span_corruption import SpanCorruptionTask
from dstrain.data.tasks.symbols import Symbols
from dstrain.data.tasks.task import ExampleTask, PrefixTask
from dstrain.errors import DataError
from dstrain.protocols import TextTokenizer

EVALUATION_SEED = 0
"""Of the noise of evaluation splits: scores of any two runs are of the same examples."""


def build_task(config: TextTask | None, tokenizer: TextTokenizer, key: str) -> ExampleTask | None:
    """The task of a corpus; None if its examples are read as they are stored: pairs, and text for language modeling.

    config: None for pairs. key: its place in the recipe, for messages.
    Raises DataError if the tokenizer lacks a symbol of the task, or has no token that ends a sentence for a task that needs them.
    """
    match config:
        case None | LanguageModeling():
            return None
        case PrefixLanguageModeling():
            return PrefixTask()
        case Denoising():
            return DenoisingTask(config, Symbols(tokenizer, key))
        case SpanCorruption():
            return SpanCorruptionTask(config, Symbols(tokenizer, key))
        case Mass():
            return MassTask(config, Symbols(tokenizer, key))


def build_examples(
    dataset: Dataset, tasks: Sequence[TextTask | None], tokenizer: TextTokenizer, *, split: str, seed: int = EVALUATION_SEED
) -> Examples:
    """The examples of a split. tasks: of its corpora by number. seed: of the noise.

    Raises DataError as `build_task` does, or if the data does not say which corpus a row is of.
    """
    built = [build_task(config, tokenizer, f"data.{split}.{number}.task") for number, config in enumerate(tasks)]
    if not any(built):
        return dataset
    if len(built) > 1 and not dataset.knows_corpora:
        raise DataError(
            f"the data was prepared by a version that did not note whose rows of {split} are: prepare it again for the tasks of "
            "its corpora"
        )
    return TaskExamples(dataset, built, seed=seed, eos_id=tokenizer.eos_id)
