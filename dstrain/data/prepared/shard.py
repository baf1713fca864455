"""One Arrow IPC file of encoded pairs, written once and read through the page cache.

Columns `source` and `target` are lists of ids, each with its final EOS: uint16 if the vocabulary fits, else int32.
Evaluation splits also carry `source_text` and `target_text`, and `references`, lists of strings, if a corpus names some.
A record batch holds at most 16,384 rows, so list offsets are int32 and the writer's memory is bounded. Reading maps the file: ids
and lengths are views into it, nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dstrain.data.prepared.corpora import CorpusRun, merged_runs
from dstrain.data.prepared.manifest import ShardRecord
from dstrain.data.prepared.rows import Rows
from dstrain.errors import DataError
from dstrain.storage.document import Count
from dstrain.storage.hashing import HashingWriter
from dstrain.storage.sharded_job import Sidecar

MAX_BATCH_ROWS = 16_384
MAX_BATCH_TOKENS = 1 << 22
MAX_ITEMS = (1 << 31) - 1
"""Of one list column of a record batch: Arrow's list offsets have 32 bits."""
SIDES = ("source", "target")


class PairSidecar(Sidecar):
    """Describes a shard of pairs. pairs_read: before filtering; dropped: how many of these were left out, by reason.

    truncated: sources that were cut.
    document_starts: the rows before which a document begins, if the corpora of the split tell; perhaps the next shard's first.
    """

    record: ShardRecord
    pairs_read: Count
    dropped: dict[str, Count]
    truncated: Count = 0
    document_starts: tuple[Count, ...] = ()


def shard_schema(
    source_dtype: np.dtype[Any], target_dtype: np.dtype[Any], *, with_text: bool, with_references: bool = False
) -> Any:
    """The Arrow schema of every shard of a split."""
    fields: list[Any] = [
        pa.field(side, pa.list_(pa.from_numpy_dtype(dtype)), nullable=False)
        for side, dtype in zip(SIDES, (source_dtype, target_dtype), strict=True)
    ]
    if with_text:
        fields += [pa.field(f"{side}_text", pa.string(), nullable=False) for side in SIDES]
    if with_references:
        fields.append(pa.field("references", pa.list_(pa.string()), nullable=False))
    return pa.schema(fields)


class ShardWriter:
    """Collects rows into record batches. The bytes depend only on the rows and on how `add` groups them.

    unk_ids: of source and target, which are counted.
    """

    def __init__(self, writer: HashingWriter, schema: Any, *, unk_ids: tuple[int, int]) -> None:
        self._unk_ids = unk_ids
        self._unknown = [0, 0]
        self._sink = writer
        self._schema = schema
        self._stream = pa.ipc.new_file(pa.PythonFile(writer, mode="w"), schema)
        self._pending: list[Rows] = []
        self._pending_rows = self._pending_tokens = 0
        self.rows = self.source_tokens = self.target_tokens = 0
        self._runs: list[CorpusRun] = []

    def add(self, rows: Rows, runs: Sequence[CorpusRun]) -> None:
        """Append pairs. runs: the corpora that they come from."""
        self._runs += runs
        count, tokens = len(rows.source_lengths), len(rows.source) + len(rows.target)
        if self._pending_rows + count > MAX_BATCH_ROWS or self._pending_tokens + tokens > MAX_BATCH_TOKENS:
            self._flush()
        self._pending.append(rows)
        self._pending_rows += count
        self._pending_tokens += tokens
        self.rows += count
        self.source_tokens += len(rows.source)
        self.target_tokens += len(rows.target)
        for side, (ids, unk_id) in enumerate(zip((rows.source, rows.target), self._unk_ids, strict=True)):
            self._unknown[side] += int(np.count_nonzero(ids == unk_id))

    def finish(self, file: str) -> ShardRecord:
        """Write the rest and the footer; `file` is the shard's name in the manifest."""
        self._flush()
        self._stream.close()
        return ShardRecord(
            file=file,
            size=self._sink.size,
            sha256=self._sink.sha256,
            rows=self.rows,
            source_tokens=self.source_tokens,
            target_tokens=self.target_tokens,
            source_unknown=self._unknown[0],
            target_unknown=self._unknown[1],
            runs=tuple(merged_runs(self._runs)),
        )

    def _flush(self) -> None:
        if self._pending_rows:
            self._stream.write_batch(pa.record_batch(self._columns(), schema=self._schema))
        self._pending = []
        self._pending_rows = self._pending_tokens = 0

    def _columns(self) -> list[Any]:
        source = list_array([rows.source for rows in self._pending], [rows.source_lengths for rows in self._pending])
        target = list_array([rows.target for rows in self._pending], [rows.target_lengths for rows in self._pending])
        columns = [source, target]
        if len(self._schema) > len(SIDES):
            columns += [pa.array([text for rows in self._pending for text in rows.source_text or ()], pa.string())]
            columns += [pa.array([text for rows in self._pending for text in rows.target_text or ()], pa.string())]
        if "references" in self._schema.names:
            references = [own for rows in self._pending for own in _references(rows)]
            columns.append(pa.array(references, pa.list_(pa.string())))
        return columns


def _references(rows: Rows) -> Sequence[Sequence[str]]:
    return [[text] for text in rows.target_text or ()] if rows.references is None else rows.references


def list_array(values: Sequence[npt.NDArray[Any]], lengths: Sequence[npt.NDArray[Any]]) -> Any:
    """An Arrow list column. values: the items of all rows, in pieces; lengths: items of each row, in pieces.

    Raises DataError if there are more items than its offsets can count.
    """
    counts = np.concatenate(lengths)
    items = int(counts.sum(dtype=np.int64))
    if items > MAX_ITEMS:
        raise DataError(
            f"{len(counts):,} rows have {items:,} items, a column of a file holds at most {MAX_ITEMS:,}: make smaller shards "
            "(--tokens-per-shard, --pairs-per-shard)"
        )
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    starts: Any = pa.array(offsets)
    return pa.ListArray.from_arrays(starts, pa.array(np.concatenate(values)))


@dataclass(frozen=True)
class ListView:
    """One list column of one record batch. offsets: (rows + 1,) int32; values: ids of all rows. Both are views of the file."""

    offsets: npt.NDArray[np.int32]
    values: npt.NDArray[Any]

    def row(self, index: int) -> npt.NDArray[Any]:
        """Ids of one row, without a copy."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class BatchView(NamedTuple):
    """One record batch; the texts are Arrow string arrays, None in training splits.

    references: an Arrow array of lists of strings; None if targets are the only ones.
    """

    source: ListView
    target: ListView
    source_text: Any
    target_text: Any
    references: Any = None


def read_shard(path: Path) -> list[BatchView]:
    """Map a shard into memory. Raises DataError naming the file if it is not a complete shard.

    The file is closed: the mapping lasts as long as a view of it, without an open file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source.read_buffer())  # of a buffer, no other thread reads the footer
            return [_batch_view(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} cannot be read as a shard ({str(error).splitlines()[0]}); prepare the data again") from error


def write_lengths(shards: Sequence[Path], rows: int, writer: HashingWriter) -> None:
    """Write the lengths of all rows as a (2, rows) int32 `.npy` file, source first, only from the shards' offsets."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False, "shape": (2, rows)}
    np.lib.format.write_array_header_1_0(writer, header)
    for side in range(len(SIDES)):
        for path in shards:
            for batch in read_shard(path):
                view: ListView = batch[side]
                writer.write(np.diff(view.offsets).tobytes())


def write_documents(shards: Sequence[PairSidecar], writer: HashingWriter) -> None:
    """Write the first row of every document of a split as an int64 `.npy` file. Each corpus begins with a document."""
    records = [shard.record for shard in shards]
    before = np.cumsum([0, *(record.rows for record in records)])
    of_shards = [start + np.array(shard.document_starts, np.int64) for start, shard in zip(before, shards, strict=False)]
    of_corpora = np.cumsum([0, *(rows for _, rows in merged_runs(run for record in records for run in record.runs or ()))])
    starts = np.union1d(np.concatenate(of_shards), of_corpora)
    np.lib.format.write_array(writer, starts[starts < before[-1]], allow_pickle=False)


def _batch_view(batch: Any) -> BatchView:
    with_text = len(batch.schema) > len(SIDES)
    return BatchView(
        source=list_view(batch.column("source")),
        target=list_view(batch.column("target")),
        source_text=batch.column("source_text") if with_text else None,
        target_text=batch.column("target_text") if with_text else None,
        references=batch.column("references") if "references" in batch.schema.names else None,
    )


def list_view(column: Any) -> ListView:
    """A list column of a mapped record batch as numpy arrays, without a copy."""
    # not to_numpy, which imports pandas where it is installed: half a second of CPU time
    offsets: Any = np.from_dlpack(column.offsets)
    return ListView(offsets, np.from_dlpack(column.values))
