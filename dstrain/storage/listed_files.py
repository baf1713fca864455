"""The files that a document lists, each checked when it is first touched.

A file is compared with its record whenever it is opened: its size every time, its SHA-256 once a process. So a directory of
10,000 files is opened by listing it, and no byte is used before it was checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dstrain.storage.document import FileRecord


class OpenedFile(NamedTuple):
    """A file that may be read. hold: keeps a cached copy from being removed as long as it is referenced; None needs no hold."""

    path: Path
    hold: object = None


class ListedFiles:
    """Those in a directory on this machine. remedy: how a damaged one is made again, for messages."""

    def __init__(self, directory: Path, *, remedy: str) -> None:
        self.directory = directory
        self.remedy = remedy
        self._checked: set[str] = set()
        self._holds: list[object] = []

    def check_sizes(self, records: Iterable[FileRecord]) -> None:
        """Raise DataError for the first file that is missing or of another size. Lists each directory once."""
        sizes: dict[str, dict[str, int]] = {}
        for record in records:
            path = PurePosixPath(record.file)
            folder = str(path.parent)
            if folder not in sizes:
                sizes[folder] = _sizes_in(self.directory / folder)
            if sizes[folder].get(path.name) != record.size:
                record.check(self.directory, content=False, remedy=self.remedy)

    def open(self, record: FileRecord, *, content: bool = True) -> OpenedFile:
        """A file, checked. content: read every byte, unless this process has. Raises DataError naming the file."""
        path = record.check(self.directory, content=content and record.file not in self._checked, remedy=self.remedy)
        if content:
            self._checked.add(record.file)
        return OpenedFile(path)

    def keep(self, record: FileRecord, *, content: bool = True) -> Path:
        """`open` for as long as this object lives."""
        path, hold = self.open(record, content=content)
        self._holds.append(hold)
        return path


def _sizes_in(folder: Path) -> dict[str, int]:
    """Size of each file by name; empty if there is no such directory."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
