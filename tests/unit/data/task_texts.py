"""Texts of a small dictionary for tests of tasks, and draws that are written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray
from dstrain.data.ragged import Ragged
from dstrain.data.tasks.build import build_task
from dstrain.data.tasks.config import TextTask
from dstrain.data.tasks.draws import Draws
from dstrain.data.tasks.task import ExampleTask
from dstrain.data.tokenizers.tokenizer import DictionaryTokenizer

PIECES = [
    *(f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    *"abcdefghijklmnopqrstuvwxyz.!",
    "<mask>",
    *(f"<{number}>" for number in range(40)),
]
"""Beginnings of words, letters that go on with one, marks of punctuation, the mask, sentinels."""


def dictionary(pieces: Sequence[str]) -> DictionaryTokenizer:
    return DictionaryTokenizer("".join(f"{piece} 1\n" for piece in pieces).encode())


TOKENIZER = dictionary(PIECES)
KEY = "data.train.0.task"


def make(config: TextTask) -> ExampleTask:
    return build_task(config, TOKENIZER, KEY)


def read(*texts: str) -> Ragged:
    """Texts of pieces between blanks; `_` stands for the beginning of a word."""
    return Ragged.of(TOKENIZER.encode([text.replace("_", "▁") for text in texts]))


def spelled(ragged: Ragged) -> list[str]:
    return [" ".join(TOKENIZER.tokens(row.tolist())).replace("▁", "_") for row in ragged.rows()]


def random_texts(number: int, longest: int, seed: int = 1) -> Ragged:
    """Of 1 to `longest` pieces, none of which is a mask or a sentinel."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, number)
    return Ragged(random.integers(4, 4 + 54, lengths.sum()), lengths)


def draws(number: int, *, seed: int = 1, epoch: int = 1) -> Draws:
    return Draws(seed, epoch, np.arange(number))


class Written:
    """Draws that are written out: purpose -> the numbers of all examples one after another."""

    def __init__(self, numbers: Mapping[int, Sequence[float]]) -> None:
        self._numbers = numbers

    def uniform(self, purpose: int, counts: IntArray) -> npt.NDArray[np.float64]:
        numbers = np.array(self._numbers[purpose])
        assert len(numbers) == counts.sum(), f"purpose {purpose} draws {counts.tolist()}"
        return numbers

    def one(self, purpose: int) -> npt.NDArray[np.float64]:
        return np.array(self._numbers[purpose])


def apply(config: TextTask, texts: Ragged, numbers: Mapping[int, Sequence[float]]) -> tuple[list[str], list[str]]:
    """Sources and targets, spelled, with written draws."""
    source, target = make(config)(texts, cast("Draws", Written(numbers)))
    return spelled(source), spelled(target)
