"""The shards of a split, mapped when they are touched.

The manifest says which rows are in which shard, so none is opened to find a row. What has been touched stays mapped, up to
`MAX_OPEN_SHARDS`; a mapped shard needs no open file. One that was touched longest ago is dropped, and mapped again in 0.2 ms
if it is needed again: an order that stays near the shards (`batching.shuffle`) rarely needs that.

At the first touch the SHA-256 of a shard is checked, and the lengths that the plan has read are compared with it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.prepared.manifest import ShardRecord
from dstrain.data.prepared.shard import BatchView, read_shard
from dstrain.errors import DataError
from dstrain.storage.listed_files import ListedFiles

MAX_OPEN_SHARDS = 256


class OpenShard(NamedTuple):
    """A mapped shard. starts: (batches + 1,) rows of it before each record batch, and all. hold: see `OpenedFile`."""

    starts: list[int]
    batches: list[BatchView]
    hold: object


class OpenShards:
    """Looks rows up. files: where the shards lie. lengths: (2, rows) of sources and targets, with EOS."""

    def __init__(self, files: ListedFiles, records: Sequence[ShardRecord], lengths: npt.NDArray[Any]) -> None:
        self._files = files
        self._records = records
        self._lengths = lengths
        self._starts = [0, *accumulate(record.rows for record in records)]
        self._compared: set[int] = set()
        self._open = lru_cache(MAX_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[OpenShard]:
        """Each in turn. Raises DataError naming a shard that is damaged."""
        return map(self._open, range(len(self)))

    def locate(self, row: int) -> tuple[BatchView, int]:
        """The record batch of a row, and its number there. Raises DataError naming a shard that is damaged."""
        number = bisect_right(self._starts, row) - 1
        shard, row = self._open(number), row - self._starts[number]
        batch = bisect_right(shard.starts, row) - 1
        return shard.batches[batch], row - shard.starts[batch]

    def _map(self, number: int) -> OpenShard:
        opened = self._files.open(self._records[number])
        batches = read_shard(opened.path)
        starts = [0, *accumulate(len(batch.source.offsets) - 1 for batch in batches)]
        if number not in self._compared:
            lengths = [np.concatenate([[], *(np.diff(batch[side].offsets) for batch in batches)]) for side in range(2)]
            if not np.array_equal(lengths, self._lengths[:, self._starts[number] : self._starts[number + 1]]):
                raise DataError(f"{opened.path} holds pairs of other lengths than lengths.npy says; {self._files.remedy}")
            self._compared.add(number)
        return OpenShard(starts, batches, opened.hold)
