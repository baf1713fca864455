"""Output of `fairseq-preprocess`, mapped into memory: PREFIX.bin holds the ids of one side, PREFIX.idx the bounds of sentences.

Two formats, distinguished by the first bytes of the index. `MMIDIDX`: lengths (int32) and byte offsets (int64); the ids have the
type that a code names. `TNTIDX` (the older lazy and cached ones): offsets count ids, and every id is stored plus one. All numbers
are little-endian. The whole index is checked when it is opened: sentences are contiguous and fill the .bin exactly, which
costs one pass over 12 to 24 bytes a sentence. Memory does not grow with the corpus.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.sources.text import MAX_BLOCK_BYTES, MAX_BLOCK_LINES, FileScan
from dstrain.errors import DataError
from dstrain.storage.hashing import sha256_of_file

MMAP_MAGIC, LEGACY_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
VERSION = 1
ID_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4", 10: "<u8"}
"""Integers by type code; 6 and 7 are floating point, which no ids are."""
CHECKED_SENTENCES = 1 << 20


class Sentences(NamedTuple):
    """Consecutive sentences of one side. ids: of all in a row; lengths: (sentences,) int32."""

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]


class IdBlock(NamedTuple):
    """Consecutive pairs of one corpus. first: number of the first, from 0. source: None if the corpus has none."""

    first: int
    num_lines: int
    source: Sentences | None
    target: Sentences


class _Index(NamedTuple):
    """dtype: of a stored id. shift: subtracted from it. lengths: (n,). offsets: (n,) bytes or (n + 1,) ids."""

    dtype: np.dtype[Any]
    shift: int
    lengths: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]


class IndexedIds:
    """One side of a corpus. Raises DataError naming the file if the two are incomplete or do not belong together."""

    def __init__(self, prefix: Path) -> None:
        index_path, ids_path = files_of_prefix(prefix)
        self._index = _read_index(index_path)
        size = _size(ids_path)
        _check_layout(self._index, index_path, ids_path, size)
        self._ids: npt.NDArray[Any] = np.memmap(ids_path, self._index.dtype, "r") if size else np.empty(0, self._index.dtype)

    def __len__(self) -> int:
        return len(self._index.lengths)

    def read(self, start: int, count: int) -> Sentences:
        """`count` sentences from number `start` on, copied."""
        lengths = self._index.lengths[start : start + count].astype(np.int32)
        begin = self._start(start)
        ids = self._ids[begin : begin + int(lengths.sum(dtype=np.int64))]
        return Sentences(ids - ids.dtype.type(self._index.shift), lengths)

    def fitting(self, start: int, count: int) -> int:
        """How many of the next `count` sentences make a block of the usual size; at least one."""
        ends = np.cumsum(self._index.lengths[start : start + count], dtype=np.int64) * self._index.dtype.itemsize
        return max(1, int(np.searchsorted(ends, MAX_BLOCK_BYTES, "right")))

    def _start(self, sentence: int) -> int:
        if sentence == len(self):
            return len(self._ids)
        offset = int(self._index.offsets[sentence])
        return offset if self._index.shift else offset // self._index.dtype.itemsize


class IdReader:
    """Both sides of a corpus, or only a target, open at pair `start`."""

    def __init__(self, source: Path | None, target: Path, *, start: int = 0) -> None:
        self._source = None if source is None else IndexedIds(source)
        self._target = IndexedIds(target)
        self._next = start

    def read(self, max_lines: int) -> IdBlock:
        """The next pairs, at most `max_lines`; fewer if they are long."""
        count = min(max_lines, MAX_BLOCK_LINES)
        count = min(side.fitting(self._next, count) for side in (self._source, self._target) if side is not None)
        source = None if self._source is None else self._source.read(self._next, count)
        block = IdBlock(self._next, count, source, self._target.read(self._next, count))
        self._next += count
        return block

    def __enter__(self) -> IdReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def files_of_prefix(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.idx and PREFIX.bin."""
    return prefix.with_name(f"{prefix.name}.idx"), prefix.with_name(f"{prefix.name}.bin")


def scan_binary(path: Path) -> FileScan:
    """Check one of the two files whole and hash it; `lines` are the sentences of an index, 0 for a .bin."""
    sentences = len(IndexedIds(path.with_suffix(""))) if path.suffix == ".idx" else 0
    return FileScan(sentences, sha256_of_file(path))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; both files of a prefix are needed, .idx and .bin") from error


def _read_index(path: Path) -> _Index:
    size = _size(path)
    with path.open("rb") as file:
        head = file.read(48)
    if head.startswith(MMAP_MAGIC):
        return _read_mmap_index(path, size, head[len(MMAP_MAGIC) :])
    if head.startswith(LEGACY_MAGIC):
        return _read_legacy_index(path, size, head[len(LEGACY_MAGIC) :])
    raise DataError(
        f"{path} begins with {head[:9]!r}, which is no index of fairseq's; give the files that fairseq-preprocess wrote"
    )


def _read_mmap_index(path: Path, size: int, head: bytes) -> _Index:
    version, code, number = _unpack("<QBQ", head, path)
    dtype = _id_type(path, version, code)
    start = len(MMAP_MAGIC) + struct.calcsize("<QBQ")
    _require_size(path, size, start + 12 * number, number)
    lengths = _mapped(path, "<i4", start, number)
    return _Index(dtype, 0, lengths, _mapped(path, "<i8", start + 4 * number, number))


def _read_legacy_index(path: Path, size: int, head: bytes) -> _Index:
    version, code, item_size, number, dimensions = _unpack("<QQQQQ", head, path)
    dtype = _id_type(path, version, code)
    start = len(LEGACY_MAGIC) + struct.calcsize("<QQQQQ")
    _require_size(path, size, start + 8 * (2 * (number + 1) + dimensions), number)
    if dtype.itemsize != item_size or dimensions != number:
        raise DataError(
            f"{path} describes items of {item_size} bytes and {dimensions} dimensions for {number} sentences, not "
            f"one-dimensional rows of {dtype.name}; it was altered or holds something else than sentences"
        )
    offsets = _mapped(path, "<i8", start + 8 * (number + 1), number + 1)
    return _Index(dtype, 1, _mapped(path, "<i8", start + 16 * (number + 1), number), offsets)


def _unpack(form: str, head: bytes, path: Path) -> tuple[int, ...]:
    if len(head) < struct.calcsize(form):
        raise DataError(f"{path} ends inside its header: it is truncated; copy it again")
    return struct.unpack_from(form, head)


def _id_type(path: Path, version: int, code: int) -> np.dtype[Any]:
    if version != VERSION:
        raise DataError(
            f"{path} is an index of version {version}, known is {VERSION}; binarize the text with fairseq 0.9 or later"
        )
    if code not in ID_TYPES:
        raise DataError(f"{path} has type code {code}, which is no integer type; known are {', '.join(map(str, ID_TYPES))}")
    return np.dtype(ID_TYPES[code])


def _require_size(path: Path, size: int, expected: int, number: int) -> None:
    if size != expected:
        raise DataError(
            f"{path} holds {size:,} bytes, an index of {number:,} sentences has {expected:,}: it is truncated or altered; "
            "copy it again"
        )


def _mapped(path: Path, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
    return np.memmap(path, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)


def _check_layout(index: _Index, index_path: Path, ids_path: Path, size: int) -> None:
    """Raise DataError unless the sentences are contiguous and fill the .bin exactly."""
    unit = index.dtype.itemsize
    end = 0
    for first, lengths, offsets in _chunks(index):
        ends = end + np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        wrong = np.flatnonzero((lengths < 0) | (offsets != (starts if index.shift else starts * unit)))
        if len(wrong):
            raise DataError(
                f"{index_path}: sentence {first + int(wrong[0]) + 1:,} does not begin where the one before ends; the index was "
                "altered: copy it again"
            )
        end = int(ends[-1])
    if end * unit != size:
        fault = "overrun it" if end * unit > size else "leave a rest of it"
        raise DataError(
            f"{ids_path} holds {size:,} bytes, the lengths of {index_path.name} add up to {end * unit:,} and {fault}: the files "
            "are truncated or not of one another; copy both again"
        )


def _chunks(index: _Index) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.int64]]]:
    for first in range(0, len(index.lengths), CHECKED_SENTENCES):
        chosen = slice(first, first + CHECKED_SENTENCES)
        lengths = index.lengths[chosen]
        yield first, lengths, index.offsets[chosen][: len(lengths)]
