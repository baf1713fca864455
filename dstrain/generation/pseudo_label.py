"""Sequence-level distillation as data: a teacher's own translations of the training sources become the targets.

After Kim and Rush 2016, "Sequence-Level Knowledge Distillation": the student is trained on the best hypothesis of the teacher's
beam search. Outputs that would teach nonsense are left out and counted: those that the data's own filter drops (empty, too long,
ratio of lengths), those that repeat themselves, and those that the search has cut at its length limit (unfinished). Any process
can do any shard (`storage/sharded_job.py`); the bytes of a shard depend only on the job, up to rounding in the teacher.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray
from dstrain.data.filtering import FilterConfig
from dstrain.data.prepared.corpora import CorpusRun, merged_runs
from dstrain.data.prepared.dataset import Dataset
from dstrain.data.prepared.derived import LABELING, LabelJob, label_shard_file
from dstrain.data.prepared.encode import drop_reasons
from dstrain.data.prepared.rows import Rows, id_dtype
from dstrain.data.prepared.shard import PairSidecar, ShardWriter, shard_schema
from dstrain.generation.generator import Generator
from dstrain.storage.atomic import atomic_writer
from dstrain.storage.sharded_job import Worker, write_sidecar

LONGEST_GROUP = 4


@dataclass
class LabelReport:
    """Counts of one process. pairs: sources that it translated; dropped: of these, by reason."""

    shards: int = 0
    finished_before: int = 0
    pairs: int = 0
    seconds: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """One line of text."""
        if not self.shards:
            return f"nothing to do: {self.finished_before} shards were finished before"
        lost = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.items() if count) or "none"
        before = f"; {self.finished_before} shards were finished before" if self.finished_before else ""
        rate = self.pairs / self.seconds
        return (
            f"wrote {self.shards} shards: {self.pairs:,} sources in {self.seconds:.1f} s ({rate:,.1f} per second), "
            f"dropped {self.dropped.total():,}: {lost}{before}"
        )


@dataclass(frozen=True)
class Labeler:
    """Writes shards of `job` into `output`. limits: which outputs are dropped by their lengths. unk_ids: of source and target."""

    generator: Generator
    dataset: Dataset
    job: LabelJob
    limits: FilterConfig
    vocabulary: tuple[int, int]
    unk_ids: tuple[int, int]
    output: Path

    def run(self, worker: Worker, progress: Callable[[int], object]) -> LabelReport:
        """Every shard of `worker` that is not complete yet. progress: called with the number of finished sources.

        Raises DataError if `output` belongs to another job, StorageError if the disk is full; finished shards stay.
        """
        report, start = LabelReport(), time.perf_counter()

        def skip(sidecar: PairSidecar) -> None:
            report.finished_before += 1
            progress(sidecar.pairs_read)

        LABELING.run(self.output, self.job, worker, lambda number: self._write_shard(number, report, progress), skip)
        report.seconds = time.perf_counter() - start
        return report

    def _write_shard(self, number: int, report: LabelReport, progress: Callable[[int], object]) -> None:
        rows = self.job.rows(number)
        examples = [self.dataset[row] for row in rows]
        sources, starts = [example.source.tolist() for example in examples], [example.start for example in examples]
        answers = self.generator.translate_ids(sources, starts=starts, first_line=rows.start + 1, progress=progress)
        targets = [hypotheses[0].tokens for hypotheses in answers]
        reasons = self._reasons(sources, targets)
        keep = ~np.logical_or.reduce(list(reasons.values()))
        dropped = {reason: int(mask.sum()) for reason, mask in reasons.items()}
        dtypes = [id_dtype(size) for size in self.vocabulary]
        path = self.output / label_shard_file(number)
        with atomic_writer(path) as sink:
            writer = ShardWriter(sink, shard_schema(dtypes[0], dtypes[1], with_text=False), unk_ids=self.unk_ids)
            kept = list(compress(sources, keep)), list(compress(targets, keep))
            if kept[0]:
                writer.add(Rows(*_flat(kept[0], dtypes[0]), *_flat(kept[1], dtypes[1])), self._runs(np.array(rows)[keep]))
            record = writer.finish(label_shard_file(number))
            write_sidecar(self.output, PairSidecar(record=record, pairs_read=len(rows), dropped=dropped))
        report.shards += 1
        report.pairs += len(rows)
        report.dropped.update(dropped)

    def _runs(self, rows: IntArray) -> list[CorpusRun]:
        """The corpora of these rows of the original."""
        return merged_runs((int(corpus), 1) for corpus in self.dataset.corpus_of(rows))

    def _reasons(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[np.bool_]]:
        """Which outputs to drop, by reason; none has two. (N,) each"""
        source_lengths, target_lengths = (np.fromiter(map(len, rows), np.int32, len(rows)) for rows in (sources, targets))
        reasons = dict(drop_reasons(source_lengths, target_lengths, self.limits))
        limit = self.job.max_repeats
        repetitive = np.array([limit is not None and repeats(target) > limit for target in targets], np.bool_)
        cut = [len(target) > self.generator.max_length(len(source)) for source, target in zip(sources, targets, strict=True)]
        for reason, mask in (("repetition", repetitive), ("unfinished", np.array(cut, np.bool_))):
            reasons[reason] = mask & ~np.logical_or.reduce(list(reasons.values()))
        return reasons


def repeats(tokens: Sequence[int]) -> int:
    """The largest number of times that a group of 1 to 4 tokens is repeated in a row; 1 if none follows itself."""
    ids = np.asarray(tokens)
    most = 1
    for size in range(1, min(LONGEST_GROUP, len(ids) // 2) + 1):
        same = np.concatenate(([False], ids[size:] == ids[:-size], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])  # starts and ends of runs, in turn
        longest = int((edges[1::2] - edges[::2]).max(initial=0))
        most = max(most, longest // size + 1)
    return most


def _flat(rows: Sequence[Sequence[int]], dtype: np.dtype[np.generic]) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int32]]:
    """Ids of all rows one after another, and the rows' lengths."""
    return np.concatenate([np.asarray(row, dtype) for row in rows]), np.fromiter(map(len, rows), np.int32, len(rows))
