"""The examples of a split as the tasks of its corpora make them, anew in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dstrain.data.batching.permutation import IntArray
from dstrain.data.lengths import Lengths, Longest, Side, StoredLengths
from dstrain.data.prepared.dataset import Dataset, Example
from dstrain.data.ragged import BoolArray, Ragged
from dstrain.data.tasks.draws import Draws
from dstrain.data.tasks.task import ExampleTask

CHUNK = 1 << 20
"""Rows whose lengths are summed together."""


class TaskLengths:
    """Lengths for plans, computed from the stored ones where they are needed; see `TaskExamples`."""

    def __init__(self, dataset: Dataset, tasks: Sequence[ExampleTask | None], seed: int) -> None:
        self._dataset = dataset
        self._tasks = tasks
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset)

    def of(self, epoch: int, rows: IntArray) -> tuple[Lengths, Lengths]:
        """A source may turn out shorter; targets are exact."""
        sources, targets = self._dataset.lengths.of(epoch, rows)
        for task, chosen, draws in self.by_task(epoch, rows):
            lengths = task.lengths(targets[chosen].astype(np.int64) - 1, draws)
            sources[chosen], targets[chosen] = (side + 1 for side in lengths)
        return sources, targets

    def longest(self, side: Side) -> Longest:
        """The longest of any corpus. Raises DataError if a task cannot make the longest text into an example."""
        stored = self._dataset.lengths
        candidates = []
        for number, task in enumerate(self._tasks):
            for rows in self._dataset.corpora.rows([number]):
                part = StoredLengths(stored.source[rows.start : rows.stop], stored.target[rows.start : rows.stop])
                row, tokens = part.longest(side if task is None else "target")
                candidates.append(Longest(rows.start + row, tokens if task is None else _most_tokens(task, tokens, side)))
        return max(candidates, key=lambda longest: longest.tokens)

    def num_targets(self, epoch: int) -> int:
        """Counted in chunks."""
        chunks = (np.arange(start, min(start + CHUNK, len(self))) for start in range(0, len(self), CHUNK))
        return sum(int(self.of(epoch, rows)[1].sum(dtype=np.int64)) for rows in chunks)

    def by_task(self, epoch: int, rows: IntArray) -> Iterator[tuple[ExampleTask, BoolArray, Draws]]:
        """Every task with those of the rows that are its own, and their draws."""
        corpora = self._dataset.corpus_of(rows)
        for number in np.unique(corpora):
            task, chosen = self._tasks[number], corpora == number
            if task is not None:
                yield task, chosen, Draws(self._seed, epoch, rows[chosen])


class TaskExamples:
    """Examples for loaders.

    tasks: by number of the corpus, None for one whose examples are read as they are stored. seed: of all noise. eos_id: behind
    every source and target.
    """

    def __init__(self, dataset: Dataset, tasks: Sequence[ExampleTask | None], *, seed: int, eos_id: int) -> None:
        self.lengths = TaskLengths(dataset, tasks, seed)
        self._dataset = dataset
        self._eos_id = eos_id

    def read(self, epoch: int, rows: IntArray) -> list[Example]:
        """Sources and targets of some rows."""
        examples = self._dataset.read(epoch, rows)
        for task, chosen, draws in self.lengths.by_task(epoch, rows):
            own = np.flatnonzero(chosen).tolist()
            texts = Ragged.of([examples[index].target[:-1] for index in own])
            sides = (side.with_end(self._eos_id).rows() for side in task(texts, draws))
            for index, source, target in zip(own, *sides, strict=True):
                examples[index] = Example(source, target, examples[index].start)
        return examples


def _most_tokens(task: ExampleTask, text: int, side: Side) -> int:
    """Of a side of the longest example, with EOS. text: tokens of the longest text, with EOS."""
    most = task.longest(text - 1)
    return {"source": most.source, "target": most.target, "source and target": most.both}[side] + 1
