"""Files of consecutive rows, mapped when they are touched.

The manifest says which rows are in which shard, so none is opened to find a row. What has been touched stays mapped, up to
`max_open`; a mapped shard needs no open file. One that was touched longest ago is dropped, and mapped again in 0.2 to 0.4 ms
if it is needed again: an order that stays near the shards (`batching.shuffle`) rarely needs that.

At the first touch the SHA-256 of a shard is checked: of few small ones already at the start. So work on a small set does not
begin with an altered byte, and no set is used with one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Generic, TypeVar

from dstrain.storage.document import FileRecord
from dstrain.storage.listed_files import ListedFiles

MAX_OPEN_SHARDS = 256
ALWAYS_HASHED_BYTES = 1 << 30
ALWAYS_HASHED_SHARDS = 64

Shard = TypeVar("Shard")


class MappedShards(Generic[Shard]):
    """Looks rows up. files: where the shards lie. records, rows: of each shard. read: number and path -> what is mapped.
    max_open: shards that stay mapped, None for `MAX_OPEN_SHARDS`.
    """

    def __init__(
        self,
        files: ListedFiles,
        records: Sequence[FileRecord],
        rows: Iterable[int],
        read: Callable[[int, Path], Shard],
        *,
        max_open: int | None = None,
    ) -> None:
        self.starts = [0, *accumulate(rows)]
        """(shards + 1,) rows before each shard, and all."""
        self._files = files
        self._records = records
        self._read = read
        self._open = lru_cache(max_open or MAX_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Shard]:
        """Each in turn. Raises DataError naming a shard that is damaged."""
        return (self._open(number)[0] for number in range(len(self)))

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and its number there. Raises DataError naming a shard that is damaged."""
        number = bisect_right(self.starts, row) - 1
        return self._open(number)[0], row - self.starts[number]

    def touch(self, *, verify: bool = False) -> None:
        """Check them all now if they are few and small, or if `verify`. Raises DataError naming the first that is damaged."""
        size = sum(record.size for record in self._records)
        if verify or (len(self) <= ALWAYS_HASHED_SHARDS and size <= ALWAYS_HASHED_BYTES):
            for _ in self:  # each is checked at its first touch, which is now
                pass

    def _map(self, number: int) -> tuple[Shard, object]:
        """With the hold of the file, see `OpenedFile`."""
        opened = self._files.open(self._records[number])
        return self._read(number, opened.path), opened.hold
