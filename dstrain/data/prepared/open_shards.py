"""The shards of a split: the record batches of each, mapped when they are touched (`storage/mapped_shards.py`).

At the first touch the lengths that the plan has read are compared with the shard.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.prepared.manifest import ShardRecord
from dstrain.data.prepared.shard import BatchView, read_shard
from dstrain.errors import DataError
from dstrain.storage.listed_files import ListedFiles
from dstrain.storage.mapped_shards import MappedShards


class OpenShard(NamedTuple):
    """A mapped shard. starts: (batches + 1,) rows of it before each record batch, and all."""

    starts: list[int]
    batches: list[BatchView]


class OpenShards(MappedShards[OpenShard]):
    """Of pairs. lengths: (2, rows) of sources and targets, with EOS."""

    def __init__(self, files: ListedFiles, records: Sequence[ShardRecord], lengths: npt.NDArray[Any]) -> None:
        super().__init__(files, records, [record.rows for record in records], self._read_batches)
        self._lengths = lengths
        self._compared: set[int] = set()

    def locate_pair(self, row: int) -> tuple[BatchView, int]:
        """The record batch of a row, and its number there. Raises DataError naming a shard that is damaged."""
        shard, row = self.locate(row)
        batch = bisect_right(shard.starts, row) - 1
        return shard.batches[batch], row - shard.starts[batch]

    def _read_batches(self, number: int, path: Path) -> OpenShard:
        batches = read_shard(path)
        starts = [0, *accumulate(len(batch.source.offsets) - 1 for batch in batches)]
        if number not in self._compared:
            lengths = [np.concatenate([[], *(np.diff(batch[side].offsets) for batch in batches)]) for side in range(2)]
            if not np.array_equal(lengths, self._lengths[:, self.starts[number] : self.starts[number + 1]]):
                raise DataError(f"{path} holds pairs of other lengths than lengths.npy says; {self._files.remedy}")
            self._compared.add(number)
        return OpenShard(starts, batches)
