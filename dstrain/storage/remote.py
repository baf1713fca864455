"""Directories in object stores (`s3://`, `gs://`, `file://` ...): the only door to fsspec.

A directory is read through its copy in the cache (`file_cache.py`). Its small files are fetched when the copy is made, those that
its manifest lists when they are touched. A copy is that of one manifest: if the store gets another one, the next process makes
another copy.

A store that fails is asked again, after 1, 2, 4 and 8 seconds. What it sends is compared with the manifest on its way to the
disk, by size and SHA-256.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from dstrain.config_base import Config
from dstrain.errors import DataError, DstrainError, ExtraError
from dstrain.extras import import_extra
from dstrain.log import logger
from dstrain.storage.atomic import named_if_full
from dstrain.storage.document import DocumentFormat, FileRecord, path_inside
from dstrain.storage.file_cache import FileCache
from dstrain.storage.hashing import BLOCK_BYTES, HashingWriter, sha256_of_bytes, sha256_of_text
from dstrain.storage.listed_files import ListedFiles, OpenedFile

ORIGIN_FILE = "remote.json"
DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before another attempt."""
_T = TypeVar("_T")


class Origin(Config):
    """Where a copy comes from."""

    format_version: int = 1
    url: str


ORIGIN = DocumentFormat(
    Origin, "origin of a copy", DataError, "remove the directory, which is a copy", version_field="format_version"
)


def is_remote(location: str) -> bool:
    """Whether this is a URL, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def is_shortened_url(location: str) -> bool:
    """Whether this is a URL of which a `Path` was made, which takes one of its slashes."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", location) is not None


class RemoteDirectory:
    """A directory in a store. Raises DataError for a URL of no known store, ExtraError if its package is missing."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        core = import_extra("fsspec.core", extra="fsspec", purpose=f"reading {url}")
        try:
            self._store, self._root = core.url_to_fs(self.url)
        except ImportError as error:
            raise ExtraError(f"{url} needs another package: {error}; install it beside dstrain, for s3:// as s3fs") from error
        except ValueError as error:
            raise DataError(f"{url} is of no store that fsspec knows ({error}); correct the URL") from error

    def names(self, folder: str = "") -> list[str]:
        """The names of the files and directories in a folder."""
        path = f"{self._root}/{folder}".rstrip("/")
        listed: list[str] = self._attempt(folder, lambda: self._store.ls(path, detail=False))
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in listed)

    def read(self, name: str) -> bytes:
        """A small file."""

        def content() -> bytes:
            path = f"{self._root}/{name}"
            result: bytes = self._store.cat_file(path)
            if (size := self._store.size(path)) != len(result):
                raise EOFError(f"it ended after {len(result):,} of {size:,} bytes")
            return result

        return self._attempt(name, content)

    def download(self, record: FileRecord, file: BinaryIO) -> None:
        """Write a listed file into an open one, once what was sent is as the record says. Raises DataError if it never is."""
        self._attempt(record.file, partial(self._copy, record, file))

    def _copy(self, record: FileRecord, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate()
        writer = HashingWriter(file)
        with self._store.open(f"{self._root}/{record.file}", "rb") as source:
            while block := source.read(BLOCK_BYTES):
                with named_if_full(Path(file.name)):
                    writer.write(block)
        if writer.size != record.size:
            raise EOFError(f"it sent {writer.size:,} bytes, the manifest says {record.size:,}")
        if writer.sha256 != record.sha256:
            raise ValueError("it sent other bytes than the manifest's SHA-256 is of")

    def _attempt(self, name: str, action: Callable[[], _T]) -> _T:
        """`action`, again after an error of the store. Raises DataError naming the file."""
        url, began = f"{self.url}/{name}".rstrip("/"), time.monotonic()
        for attempt, delay in enumerate([*DELAYS, None], 1):
            try:
                return action()
            except DstrainError:
                raise
            except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
                raise DataError(
                    f"{url} cannot be read ({_words(error)}); correct the URL or the credentials, or upload the prepared "
                    "directory again"
                ) from error
            except Exception as error:  # every store has errors of its own: of the network, of a server
                if delay is None:
                    raise DataError(
                        f"{url} cannot be read: {attempt} attempts in {time.monotonic() - began:.0f} s failed, the last one "
                        f"with {_words(error)}; check the network and the store, then run the same command again: files that "
                        "were fetched are kept"
                    ) from error
                logger.warning("%s: attempt %d failed with %s; the next one is in %g s", url, attempt, _words(error), delay)
                time.sleep(delay)
        raise AssertionError("the last attempt returns or raises")


def make_copy(remote: RemoteDirectory, cache: FileCache, *, manifest: str, files: Sequence[str], folders: Sequence[str]) -> Path:
    """The directory in the cache for a remote one with this manifest; the files that it lists are fetched when touched.

    files, folders: what else is small, and fetched now if it is there.
    """
    content = remote.read(manifest)
    key = sha256_of_text(f"{remote.url} {sha256_of_bytes(content)}")
    directory = cache.directory / f"{remote.url.rsplit('/', 1)[-1]}-{key[:16]}"
    if directory.is_dir():
        return directory
    cache.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.directory) as folder:
        draft = Path(folder, "copy")
        draft.mkdir()
        present = set(remote.names())
        inner = [f"{name}/{file}" for name in folders if name in present for file in remote.names(name)]
        for name in (*present.intersection(files), *inner):
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(remote.read(name))
        (draft / manifest).write_bytes(content)
        ORIGIN.write(draft / ORIGIN_FILE, Origin(url=remote.url))
        try:
            draft.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another rank was faster, with the same content
                raise
    return directory


class CopiedFiles(ListedFiles):
    """The listed files of a copy: fetched when they are touched, removed when the cache needs the space."""

    def __init__(self, directory: Path, remote: RemoteDirectory, cache: FileCache, *, remedy: str) -> None:
        super().__init__(directory, remedy=remedy)
        self._remote = remote
        self._cache = cache

    def check_sizes(self, records: Iterable[FileRecord]) -> None:
        """Nothing yet: each is checked on its way from the store."""

    def open(self, record: FileRecord, *, content: bool = True) -> OpenedFile:
        """A file, checked, here until the result is collected. Raises DataError naming what the store does not send whole."""
        path = path_inside(self.directory, record.file, error=DataError, remedy=self.remedy)
        hold = self._cache.open(path, record.size, partial(self._download, record))
        try:
            return super().open(record, content=content)._replace(hold=hold)
        except DataError as error:
            logger.warning("%s; it is fetched again", str(error).partition(";")[0])
            path.unlink(missing_ok=True)
            hold = self._cache.open(path, record.size, partial(self._download, record))
            return super().open(record, content=content)._replace(hold=hold)

    def _download(self, record: FileRecord, file: BinaryIO) -> None:
        self._remote.download(record, file)
        self._checked.add(record.file)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
