"""A teacher's distributions on a split, written to the disk: the offline half of distillation.

The main thread only runs the teacher and selects the kept values; another packs, puts rows in order and writes. Batches
are cut within one shard, so a shard's bytes depend only on the job and on `max_tokens`, not on the number of workers nor on
interruptions. (Another `max_tokens` moves the last bits of the teacher's logits, and so, now and then, a draw.) Memory:
chunk_tokens x V logits and one shard. A kill, a full disk and Ctrl-C lose the shard under way and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.config_base import Precision
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import evaluation_batches
from dstrain.data.prepared.dataset import Dataset
from dstrain.data.prepared.manifest import DataManifest
from dstrain.data.prepared.shard import MAX_ITEMS, list_array
from dstrain.distillation.store.codec import Array, Codec, TokenKeys, build_codec
from dstrain.distillation.store.manifest import (
    DENSE_VOCABULARY,
    DUMP,
    DenseMethod,
    DumpJob,
    LogitSidecar,
    Method,
    TopKMethod,
    logit_shard_file,
)
from dstrain.distillation.store.store import shard_starts
from dstrain.errors import DataError
from dstrain.models.config import VocabularySizes
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.ops.chunked_projection import logits_in_chunks
from dstrain.ops.device_time import Timestamp, seconds_between, timestamp
from dstrain.protocols import TeacherForced
from dstrain.storage.atomic import atomic_writer
from dstrain.storage.document import FileRecord
from dstrain.storage.hashing import HashingWriter
from dstrain.storage.sharded_job import Worker, write_sidecar

SHARD_BYTES = 1 << 26
SMALLEST_SHARD = 4096


def plan_dump(
    method: Method,
    dataset: Dataset,
    manifest: DataManifest,
    split: str,
    teacher: str,
    *,
    vocabulary: VocabularySizes,
    tokens_per_shard: int | None,
    precision: Precision = "fp32",
) -> DumpJob:
    """The job of a dump.

    teacher: its fingerprint; precision: of its parameters. tokens_per_shard: None for a 64th of the split, no more than 64 MiB
    and no less than 4096 tokens. Raises DataError if the vocabulary is too small for k, or too large to be kept whole.
    """
    vocab_size = vocabulary.target
    if isinstance(method, TopKMethod) and method.k > vocab_size:
        raise DataError(f"k = {method.k} exceeds the {vocab_size} entries of the vocabulary; lower --k")
    if isinstance(method, DenseMethod) and vocab_size > DENSE_VOCABULARY:
        raise DataError(
            f"method dense would keep {2 * vocab_size:,} bytes a token of a vocabulary of {vocab_size:,}; it is for at "
            f"most {DENSE_VOCABULARY:,}: use --method sample, which keeps about 40 and is unbiased"
        )
    codec = build_codec(method, vocab_size)
    tokens = int(dataset.target_lengths.sum(dtype=np.int64))
    per_shard = tokens_per_shard or max(min(tokens // 64, SHARD_BYTES // codec.bytes_per_token), SMALLEST_SHARD)
    widest = (per_shard + int(dataset.target_lengths.max())) * codec.bytes_per_token
    if widest > MAX_ITEMS:
        raise DataError(f"{per_shard:,} tokens a shard make files of {widest:,} bytes; lower --tokens-per-shard")
    return DumpJob(
        method=method,
        teacher=teacher,
        data=manifest.splits[split].fingerprint,
        tokenizer=manifest.tokenizer_fingerprint,
        split=split,
        vocab_size=vocab_size,
        rows=len(dataset),
        tokens=tokens,
        shards=len(shard_starts(dataset.target_lengths, per_shard)) - 1,
        tokens_per_shard=per_shard,
        precision=precision,
    )


@dataclass
class DumpReport:
    """Counts of one process. seconds: in all; teacher_seconds: of these, its device with the teacher and softmax."""

    shards: int = 0
    finished_before: int = 0
    tokens: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0

    def line(self) -> str:
        """One line of text."""
        before = f", {self.finished_before} were finished before" if self.finished_before else ""
        if not self.shards:
            return f"nothing to do: {self.finished_before} shards were finished before"
        share = 100 * self.teacher_seconds / self.seconds
        rate = self.tokens / self.seconds
        return (
            f"wrote {self.shards} shards, {self.tokens:,} tokens in {self.seconds:.1f} s: {rate:,.0f} tokens/s, "
            f"{share:.0f} % of the time in the teacher{before}"
        )


@dataclass(frozen=True)
class Dumper:
    """Writes shards of `job` into `output`.

    teacher: in evaluation mode, on `device`. max_tokens: padded tokens of a batch. chunk_tokens: those whose logits exist at one
    time.
    """

    teacher: TeacherForced
    dataset: Dataset
    job: DumpJob
    output: Path
    vocabulary: VocabularySizes
    device: str
    max_tokens: int = 4096
    chunk_tokens: int = 256

    @cached_property
    def _starts(self) -> list[int]:
        return shard_starts(self.dataset.target_lengths, self.job.tokens_per_shard)

    def tokens_of(self, worker: Worker) -> int:
        """How many there are to do for `worker`, finished ones included."""
        starts, lengths = self._starts, self.dataset.target_lengths
        return sum(int(lengths[starts[number] : starts[number + 1]].sum()) for number in worker.shards(self.job.shards))

    def run(self, worker: Worker, progress: Callable[[int], object]) -> DumpReport:
        """Every shard of `worker` that is not complete yet. progress: called with the number of finished tokens.

        Raises DataError if `output` belongs to another job, StorageError if the disk is full; finished shards stay.
        """
        starts = self._starts
        report, start = DumpReport(), time.perf_counter()

        def skip(sidecar: LogitSidecar) -> None:
            report.finished_before += 1
            progress(sidecar.tokens)

        def write(number: int) -> None:
            self._write_shard(number, range(starts[number], starts[number + 1]), report, progress)

        DUMP.run(self.output, self.job, worker, write, skip)
        report.seconds = time.perf_counter() - start
        return report

    def _write_shard(self, number: int, rows: range, report: DumpReport, progress: Callable[[int], object]) -> None:
        path = self.output / logit_shard_file(number)
        draft = ShardDraft(build_codec(self.job.method, self.job.vocab_size))
        with atomic_writer(path) as sink, ThreadPoolExecutor(1) as writer:
            pending: Future[float] | None = None
            for batch in self._batches(rows):
                selected = self._select(batch, draft.codec)
                if pending is not None:
                    report.teacher_seconds += pending.result()
                pending = writer.submit(self._keep, batch, selected, draft)
                report.tokens += batch.num_targets
                progress(batch.num_targets)
            if pending is not None:
                report.teacher_seconds += pending.result()
            tokens = writer.submit(draft.finish, sink).result()
            record = FileRecord(file=path.name, size=sink.size, sha256=sink.sha256)
            sidecar = LogitSidecar(record=record, number=number, first_row=rows.start, rows=len(rows), tokens=tokens)
            write_sidecar(self.output, sidecar)
        report.shards += 1

    def _batches(self, rows: range) -> Iterator[Batch]:
        shard = slice(rows.start, rows.stop)
        sizes = self.vocabulary
        collator = Collator(self.teacher.kind, pad_id=sizes.pad_id, eos_id=sizes.eos_id, start_id=sizes.start_id)
        sources, targets = self.dataset.source_lengths[shard], self.dataset.target_lengths[shard]
        groups = evaluation_batches(sources, targets, self.max_tokens, kind=self.teacher.kind)
        for group in groups:
            examples = group + rows.start
            yield collator([self.dataset[row] for row in examples], examples)

    @torch.inference_mode()
    def _select(self, batch: Batch, codec: Codec) -> Selected:
        """The kept values of the batch's targets, on the teacher's device."""
        keys, device = token_keys(batch), torch.device(self.device)
        begin, batch = timestamp(device), batch.to(device)
        choose = partial(
            select_in_chunks, codec=codec, keys=keys, temperature=self.job.method.temperature, size=self.chunk_tokens
        )
        kept = self.teacher.reduce_projection(target_hidden(self.teacher, batch), choose)
        return Selected(kept, begin, timestamp(device))

    def _keep(self, batch: Batch, selected: Selected, draft: ShardDraft) -> float:
        """Put it into the draft: only the writer's thread waits for the device, whose seconds this returns.

        Raises DataError if the teacher's logits are not finite.
        """
        kept = [tensor.cpu().numpy() for tensor in selected.kept]
        broken = np.flatnonzero(~draft.codec.is_whole(kept))
        if broken.size:
            row = int(batch.targets.example_id[broken[0]])
            raise DataError(
                f"the logits of teacher {self.job.teacher[:12]} are not finite for row {row} of the split {self.job.split!r}: "
                "choose another --precision (fp32 has the widest range), or check the bundle"
            )
        draft.add(batch, kept)
        return seconds_between(selected.begin, selected.end)


class Selected(NamedTuple):
    """kept: of a batch's scored tokens; begin, end: of the work that the device had with it."""

    kept: tuple[Tensor, ...]
    begin: Timestamp
    end: Timestamp


def select_in_chunks(
    features: Tensor, weight: Tensor, *, codec: Codec, keys: TokenKeys, temperature: float, size: int, vocabulary: None
) -> tuple[Tensor, ...]:
    """`codec.select` of the logits `features @ weight.T / temperature`, `size` tokens at a time. vocabulary: the whole one."""
    chunks = []
    for tokens, logits in logits_in_chunks(features, weight, size):
        if temperature != 1.0:
            logits.div_(temperature)
        chunks.append(codec.select(logits, TokenKeys(keys.examples[tokens], keys.positions[tokens])))
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def token_keys(batch: Batch) -> TokenKeys:
    """Line of the data and position of each target."""
    return TokenKeys(batch.targets.example_id.numpy(), batch.targets.position.numpy())


class Piece(NamedTuple):
    """One column of a batch: items of all its rows one after another, and items of each row."""

    values: Array
    lengths: Array


class ShardDraft:
    """The signals of a shard's rows as they come, written in the order of rows."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._examples: list[Array] = []
        self._pieces: dict[str, list[Piece]] = {name: [] for name in codec.columns}
        self._tokens = 0

    def add(self, batch: Batch, selected: Sequence[Array]) -> None:
        """Take the selected values of a batch."""
        lengths = batch.examples.target_length.numpy()  # (b,)
        row_starts = np.cumsum(lengths) - lengths
        for name, column in self.codec.pack(selected).items():
            self._pieces[name].append(Piece(column.values, np.add.reduceat(column.widths, row_starts)))
        self._examples.append(batch.examples.ids.numpy())
        self._tokens += int(lengths.sum())

    def finish(self, sink: HashingWriter) -> int:
        """Write one record batch; returns its tokens."""
        order = np.argsort(np.concatenate(self._examples))
        columns: dict[str, Any] = {}
        for name, pieces in self._pieces.items():
            lengths = np.concatenate([piece.lengths for piece in pieces])
            rows = [row for piece in pieces for row in np.split(piece.values, np.cumsum(piece.lengths)[:-1])]
            columns[name] = list_array([rows[index] for index in order], [lengths[order]])
            pieces.clear()
        dtypes = {name: pa.list_(pa.from_numpy_dtype(dtype)) for name, dtype in self.codec.columns.items()}
        schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in dtypes.items()])
        with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as stream:
            stream.write_batch(pa.record_batch(list(columns.values()), schema=schema))
        return self._tokens
