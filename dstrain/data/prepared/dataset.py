"""A prepared split: rows by number, lengths of all rows at once.

Shards stay on the disk and are mapped when they are touched (`storage/mapped_shards.py`); the lengths are mapped too, from one
array of 8 bytes a pair that `prepare` took from the shards' list offsets. Opening hundreds of millions of pairs in 10,000 shards
therefore reads the manifest and a directory, and all ranks of a node share the pages.

Checked at opening: the manifest's version and fields, that the tokenizer beside it is the one that made the ids, and the size of
every file. The SHA-256 of a shard is checked when it is first touched; at opening already if the split is small, at most 1 GiB in
at most 64 shards, or on request. So training on a small set does not begin with an altered byte, and no set is trained on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dstrain.data.batching.permutation import IntArray
from dstrain.data.config import DataConfig, corpus_names
from dstrain.data.directions import start_ids
from dstrain.data.lengths import StoredLengths
from dstrain.data.prepared.corpora import CorpusRanges, CorpusRun, NamedCorpora
from dstrain.data.prepared.location import prepared_files
from dstrain.data.prepared.manifest import TOKENIZER_DIRECTORY, DataManifest, SplitRecord, data_remedy, load_manifest
from dstrain.data.prepared.open_shards import OpenShards
from dstrain.data.prepared.shard import BatchView
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tokenizers.tokenizer import load_tokenizers
from dstrain.errors import DataError
from dstrain.storage.document import FileRecord
from dstrain.storage.listed_files import ListedFiles
from dstrain.storage.mapped_shards import ALWAYS_HASHED_BYTES


class Example(NamedTuple):
    """Ids of one pair, each side with its final EOS: views of the mapped file, uint16 or int32, read-only.

    start: what a decoder reads in front of the target; None = as the tokenizer says.
    """

    source: npt.NDArray[Any]
    target: npt.NDArray[Any]
    start: int | None = None


class Dataset:
    """Pairs in the order of the corpora. source_lengths, target_lengths: (rows,) int32 with EOS, mapped from the disk.

    runs: the corpora that the rows come from; None if the data does not say, so that all seem to be of the first. start_ids: of
    the examples of each corpus.
    document_starts: the first row of every document, mapped from the disk; None if each row is one.
    """

    def __init__(
        self,
        shards: OpenShards,
        lengths: npt.NDArray[np.int32],
        runs: Sequence[CorpusRun] | None = None,
        *,
        start_ids: Sequence[int | None] = (None,),
        document_starts: IntArray | None = None,
    ) -> None:
        self._shards = shards
        self._start_ids = start_ids if any(start is not None for start in start_ids) else None
        self.knows_corpora = runs is not None
        self.document_starts = document_starts
        self.source_lengths, self.target_lengths = np.asarray(lengths)
        self.lengths = StoredLengths(self.source_lengths, self.target_lengths)
        self.corpora = CorpusRanges([(0, len(self))] if runs is None else runs)

    def __len__(self) -> int:
        return len(self.target_lengths)

    def __getitem__(self, index: int) -> Example:
        batch, row = self._locate(index)
        start = None if self._start_ids is None else self._start_ids[int(self.corpora.of(np.array([index]))[0])]
        return Example(batch.source.row(row), batch.target.row(row), start)

    def read(self, epoch: int, rows: IntArray) -> list[Example]:
        """Some pairs, which are the same in every epoch."""
        return [self[row] for row in rows]

    def corpus_of(self, rows: IntArray) -> IntArray:
        """The corpus of each row, by its number in the split's list of the recipe. (n,) -> (n,)"""
        return self.corpora.of(rows)

    def source_column(self, position: int) -> Iterator[npt.NDArray[np.int64]]:
        """The id at one position of every source, -1 for a shorter one; (rows,) each, in the order of the rows."""
        for batch in chain.from_iterable(shard.batches for shard in self._shards):
            starts, ends = batch.source.offsets[:-1].astype(np.int64) + position, batch.source.offsets[1:]
            inside = starts < ends
            yield np.where(inside, batch.source.values[np.where(inside, starts, 0)], -1)

    def source_text(self, index: int) -> str:
        """The raw source line. Only evaluation splits keep texts."""
        batch, row = self._locate(index)
        return _text(batch.source_text, row)

    def target_text(self, index: int) -> str:
        """The raw target line. Only evaluation splits keep texts."""
        batch, row = self._locate(index)
        return _text(batch.target_text, row)

    @property
    def has_references(self) -> bool:
        """Whether a corpus of the split names references beside its targets."""
        return len(self) > 0 and self._locate(0)[0].references is not None  # shards of a split have the same columns

    def references(self, index: int) -> tuple[str, ...]:
        """The raw lines that generated text is compared with, one or more: the target, unless the corpus names others."""
        batch, row = self._locate(index)
        return (_text(batch.target_text, row),) if batch.references is None else tuple(batch.references[row].as_py())

    def _locate(self, index: int) -> tuple[BatchView, int]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a data set of {len(self)}")
        return self._shards.locate_pair(index)


def _text(column: Any, row: int) -> str:
    if column is None:
        raise DataError("a training split keeps no raw text; only evaluation splits do")
    return str(column[row].as_py())


def open_dataset(directory: Path, split: str, *, verify: bool = False) -> Dataset:
    """Open one split of a prepared directory.

    verify: read every byte and compare SHA-256, whatever the size. Raises DataError if the directory was not finished, has
    no such split, holds another tokenizer than its manifest says, or if a file is missing, truncated or altered; a large split
    raises for an altered shard when a row of it is read.
    """
    directory = Path(directory)
    return open_split(directory, load_manifest(directory), split, verify=verify)


def open_split(directory: Path, manifest: DataManifest, split: str, *, verify: bool = False) -> Dataset:
    """`open_dataset` of a directory whose manifest has been read."""
    record = manifest.require_split(split, directory)
    tokenizers = load_tokenizers(directory / TOKENIZER_DIRECTORY)
    if tokenizers.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{directory / TOKENIZER_DIRECTORY} is not the tokenizer that made the ids of {directory}; {data_remedy(directory)}"
        )
    files = prepared_files(directory)
    files.check_sizes(record.files)
    lengths = _map_lengths(files, record, verify=verify)
    shards = OpenShards(files, record.shards, lengths)
    shards.touch(verify=verify)
    starts = start_ids(DataConfig.model_validate(manifest.data), split, tokenizers)
    documents = None if record.documents is None else _map_array(files, record.documents, verify=verify)
    return Dataset(shards, lengths, record.runs(), start_ids=starts, document_starts=documents)


def named_corpora(manifest: DataManifest, split: str, dataset: Dataset) -> NamedCorpora | None:
    """The corpora of a split by name; None if it has but one name, or none. DataError if the data does not say whose a row is."""
    names = corpus_names(splits_of(DataConfig.model_validate(manifest.data))[split])
    if names and not dataset.knows_corpora:
        raise DataError(
            f"the data was prepared by {manifest.created_by}, which did not note whose rows of {split} are: prepare it again to "
            f"tell the corpora {', '.join(dict.fromkeys(names))} apart"
        )
    return NamedCorpora(names, dataset.corpora) if names else None


def _map_lengths(files: ListedFiles, record: SplitRecord, *, verify: bool) -> npt.NDArray[np.int32]:
    """(2, rows); those of a split that is not hashed here are compared with each shard when it is touched."""
    lengths = _map_array(files, record.lengths, verify=verify)
    if lengths.shape != (2, record.rows):
        path = files.directory / record.lengths.file
        raise DataError(f"{path} describes {lengths.shape[-1]} pairs, the manifest says {record.rows}; {files.remedy}")
    return lengths


def _map_array(files: ListedFiles, file: FileRecord, *, verify: bool) -> npt.NDArray[Any]:
    path = files.keep(file, content=verify or file.size <= ALWAYS_HASHED_BYTES)
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); {files.remedy}") from error
    return array
