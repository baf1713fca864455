"""What a prepared data directory holds: `manifest.json`, the last file that `prepare` writes.

A directory without a manifest is unfinished. Every file stands in it with its size and SHA-256, so that truncation is seen
from the size alone and an altered byte by reading.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dstrain.config_base import Config
from dstrain.data.files import sha256_of, write_file
from dstrain.errors import DataError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
PARTS_FILE = "parts.json"
"""Stands where the work is done in parts (`data/parts.py`)."""
TOKENIZER_DIRECTORY = "tokenizer"


class FileRecord(Config):
    """A file under the data directory, by its relative path."""

    file: str
    size: int
    sha256: str

    def check(self, directory: Path, *, content: bool, remedy: str = "prepare the data again") -> None:
        """Compare the file with this record: its size, and with `content` its SHA-256. Raises DataError naming the file."""
        path = directory / self.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; the manifest lists this file: {remedy}") from error
        if size != self.size:
            raise DataError(f"{path} holds {size} bytes, the manifest says {self.size}: it is truncated or altered; {remedy}")
        if content and sha256_of(path) != self.sha256:
            raise DataError(f"{path}: the SHA-256 differs from the manifest's: the file was altered; {remedy}")


class ShardRecord(FileRecord):
    """One Arrow file; tokens count the final EOS of every sentence."""

    rows: int
    source_tokens: int
    target_tokens: int


class SplitRecord(Config):
    """One split. pairs_read: pairs of the corpus; dropped: how many of these were left out, by reason."""

    shards: tuple[ShardRecord, ...]
    lengths: FileRecord
    pairs_read: int
    dropped: dict[str, int]

    @property
    def rows(self) -> int:
        """Pairs kept."""
        return sum(shard.rows for shard in self.shards)

    @property
    def source_tokens(self) -> int:
        """Over all shards."""
        return sum(shard.source_tokens for shard in self.shards)

    @property
    def target_tokens(self) -> int:
        """Over all shards."""
        return sum(shard.target_tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of all shards in order: what row numbers of this split stand for."""
        return hashlib.sha256(" ".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Everything on the disk."""
        return (*self.shards, self.lengths)


class Manifest(Config):
    """The whole directory. data: the recipe's data section; job: fingerprint of that section and of the corpora's content.

    pseudo_labels: how a teacher made the targets of `train` (`data/derived.py`); `job` covers that, too. None: the corpus's own.
    """

    format_version: int
    created_by: str
    job: str
    tokenizer_fingerprint: str
    data: dict[str, Any]
    splits: dict[str, SplitRecord]
    pseudo_labels: dict[str, Any] | None = None

    def require_tokenizer(self, fingerprint: str, owner: str) -> None:
        """Raise DataError where `owner` (a bundle, a run) reads ids of another tokenizer than this data's."""
        if fingerprint != self.tokenizer_fingerprint:
            raise DataError(
                f"the data was prepared with tokenizer {self.tokenizer_fingerprint[:12]}, {owner} has {fingerprint[:12]}: ids "
                f"would mean other words; prepare the data with the tokenizer of {owner}"
            )


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write `directory`/manifest.json atomically; the same manifest always gives the same bytes."""
    write_file(directory / MANIFEST_FILE, (manifest.model_dump_json(indent=2) + "\n").encode())


def load_manifest(directory: Path) -> Manifest:
    """Read `directory`/manifest.json. Raises DataError where it is missing, of another version or not valid."""
    path = Path(directory) / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if (path.parent / PARTS_FILE).is_file():
            raise DataError(
                f"{path} is missing: not all parts are done or merged; run `dstrain pseudo-label` again, then with --merge"
            ) from error
        what = "the preparation was not finished" if path.parent.is_dir() else "there is no such directory"
        raise DataError(f"{path} is missing: {what}; run `dstrain prepare RECIPE --output {directory}`") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; make it readable") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): it was altered; prepare the data again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(f"{path} has format_version {version!r}, this dstrain reads {FORMAT_VERSION}; prepare the data again")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {field}: {first['msg']}; the manifest was altered: prepare the data again") from error
