"""The contents of a prepared data directory: `manifest.json`, the last file that `prepare` writes.

A directory without a manifest is unfinished. Every file is listed in it with its size and SHA-256, so that truncation is seen
from the size only and an altered byte by reading.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from pydantic import FailFast, model_validator

from dstrain.config_base import Config
from dstrain.data.prepared.corpora import CorpusRun, merged_runs
from dstrain.errors import DataError
from dstrain.storage.directory_kind import directory_kind, instead_of
from dstrain.storage.document import Count, DocumentFormat, FileRecord
from dstrain.storage.hashing import sha256_of_text
from dstrain.storage.remote import ORIGIN_FILE
from dstrain.storage.sharded_job import PARTS_FILE

DATA_FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_VALUES = 600_000
"""Enough for 45,000 shards, or 10,000 of which each holds rows of 15 corpora."""
TOKENIZER_DIRECTORY = "tokenizer"


class ShardRecord(FileRecord):
    """One Arrow file; tokens count the final EOS of every sentence.

    source_unknown, target_unknown: how many of them are <unk>; None if it was written before these were counted. runs: the
    corpora that its rows come from, see `corpora.py`; None if it was written before these were noted.
    """

    rows: Count
    source_tokens: Count
    target_tokens: Count
    source_unknown: Count | None = None
    target_unknown: Count | None = None
    runs: tuple[CorpusRun, ...] | None = None

    @model_validator(mode="after")
    def _runs_are_its_rows(self) -> ShardRecord:
        if self.runs is not None and sum(rows for _, rows in self.runs) != self.rows:
            raise ValueError(f"the runs of corpora do not add up to its {self.rows} rows")
        return self


class SplitRecord(Config):
    """One split. pairs_read: pairs of the corpus; dropped: how many of these were left out, by reason.

    truncated: sources that were cut.
    documents: the file with the first row of every document; None if the corpora do not tell documents.
    """

    shards: Annotated[tuple[ShardRecord, ...], FailFast()]
    lengths: FileRecord
    documents: FileRecord | None = None
    pairs_read: Count
    dropped: dict[str, Count]
    truncated: Count = 0

    @property
    def rows(self) -> int:
        """Pairs kept."""
        return sum(shard.rows for shard in self.shards)

    def shard_rows(self) -> list[range]:
        """The rows of each shard."""
        ends = list(accumulate(shard.rows for shard in self.shards))
        return [range(end - shard.rows, end) for shard, end in zip(self.shards, ends, strict=True)]

    @property
    def source_tokens(self) -> int:
        """Over all shards."""
        return sum(shard.source_tokens for shard in self.shards)

    @property
    def target_tokens(self) -> int:
        """Over all shards."""
        return sum(shard.target_tokens for shard in self.shards)

    def unknown_shares(self) -> dict[str, float]:
        """The share of <unk> among the tokens but EOS, by side; none for a side that has no other tokens or was not counted."""
        sides = {
            "source": (self.source_tokens, [shard.source_unknown for shard in self.shards]),
            "target": (self.target_tokens, [shard.target_unknown for shard in self.shards]),
        }
        return {
            side: sum(count or 0 for count in counts) / (tokens - self.rows)
            for side, (tokens, counts) in sides.items()
            if tokens > self.rows and None not in counts
        }

    def runs(self) -> list[CorpusRun] | None:
        """The corpora that the rows come from; None if a shard does not say."""
        runs = [shard.runs for shard in self.shards]
        return None if None in runs else merged_runs(run for shard in runs for run in shard or ())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all shards in order, which row numbers of this split refer to."""
        return sha256_of_text(" ".join(shard.sha256 for shard in self.shards))

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Everything on the disk."""
        return (*self.shards, self.lengths, *filter(None, [self.documents]))


class DataManifest(Config):
    """The whole directory. data: the recipe's data section; job: fingerprint of that section and of the corpora's content.

    pseudo_labels: how a teacher made the targets of `train` (`derived.py`); `job` covers that, too. None: the corpus's own.
    """

    format_version: int
    created_by: str
    job: str
    tokenizer_fingerprint: str
    data: dict[str, Any]
    splits: dict[str, SplitRecord]
    pseudo_labels: dict[str, Any] | None = None

    def require_split(self, name: str, directory: Path) -> SplitRecord:
        """A split by name. Raises DataError if the data in `directory` has none of that name."""
        if name not in self.splits:
            raise DataError(f"{directory} has no split {name!r}; it holds {', '.join(self.splits)}")
        return self.splits[name]

    @property
    def content(self) -> str:
        """SHA-256 over what a training reads: tokenizer, train and valid; neither paths nor test sets count."""
        splits = [self.splits[name] for name in ("train", "valid")]
        documents = [split.documents.sha256 for split in splits if split.documents is not None]
        return sha256_of_text(" ".join([self.tokenizer_fingerprint, *(split.fingerprint for split in splits), *documents]))

    def require_tokenizer(self, fingerprint: str, owner: str) -> None:
        """Raise DataError if `owner` (a bundle, a run) reads ids of another tokenizer than this data's."""
        if fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                f"the data was prepared with tokenizer {self.tokenizer_fingerprint[:12]}, {owner} has {fingerprint[:12]}: ids "
                f"would mean other words; prepare the data with the tokenizer of {owner}"
            )


DATA_MANIFEST = DocumentFormat(
    DataManifest,
    "manifest of prepared data",
    DataError,
    "prepare the data again",
    version_field="format_version",
    version=DATA_FORMAT_VERSION,
    max_values=MAX_MANIFEST_VALUES,
)


def write_data_manifest(manifest: DataManifest, directory: Path) -> None:
    """Write `directory`/manifest.json; the same manifest always gives the same bytes."""
    DATA_MANIFEST.write(directory / MANIFEST_FILE, manifest)


def load_manifest(directory: Path) -> DataManifest:
    """Read `directory`/manifest.json. Raises DataError if it is missing, of another version or not valid."""
    path = Path(directory) / MANIFEST_FILE
    if not path.exists() and (path.parent / PARTS_FILE).is_file():
        raise DataError(
            f"{path} is missing: shards are not done or not merged; run `dstrain pseudo-label` again, then with --merge"
        )
    if not path.exists() and directory_kind(path.parent) == "prepared data":
        raise DataError(f"{path} is missing: the preparation was not finished; run the same `dstrain prepare` again to go on")
    if not path.exists():
        reason = instead_of("prepared data", path.parent)
        raise DataError(
            f"{path} is missing, {directory} was never prepared: {reason}; `dstrain prepare RECIPE --output DATA` makes it"
        )
    return replace(DATA_MANIFEST, remedy=data_remedy(path.parent)).read(path)


def data_remedy(directory: Path) -> str:
    """How damaged files of a finished directory are made again, for messages."""
    if (directory / ORIGIN_FILE).is_file():
        return "upload the prepared directory again"
    if (directory / PARTS_FILE).is_file():
        return "run `dstrain pseudo-label` again as before, which writes what is damaged"
    return "prepare the data again"
