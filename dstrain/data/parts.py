"""Work in numbered parts, each a file of its own, that any number of processes do without talking to one another.

Of n shares, share i has the parts i, i + n, i + 2n, ... A part is a file and a note beside it that says what the file holds;
which job they belong to stands in `parts.json`, written before any work. The note comes first and the file is renamed into
place, so a part is whole or absent, and whoever comes again does those of its parts that are not whole by checksum. Two
processes at one part cannot pass off a wrong file as a whole one: its checksum would differ.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from dstrain.config_base import Config
from dstrain.data.files import write_file
from dstrain.data.prepared.manifest import PARTS_FILE, FileRecord
from dstrain.errors import DataError


@dataclass(frozen=True)
class Share:
    """The share `index` (from 0) of the work among `count`."""

    index: int
    count: int

    def of(self, parts: int) -> range:
        """Its numbers among 0..parts-1."""
        return range(self.index, parts, self.count)

    def part(self, index: int, count: int) -> Share:
        """The part `index` of `count` of this share."""
        return Share(self.index + index * self.count, self.count * count)


class Note(Config):
    """What stands beside a part's file; each kind of work adds what it has to say."""

    record: FileRecord


J = TypeVar("J", bound=Config)
N = TypeVar("N", bound=Note)


def read_job(directory: Path, kind: type[J], maker: str) -> J | None:
    """The job that a directory belongs to; None where there is none yet.

    maker: the verb whose directory it must be. Raises DataError where it holds something else.
    """
    path = directory / PARTS_FILE
    # Looked at before the job is: where another process begins in between, its first file is younger than its job.
    strangers = sorted(item.name for item in directory.iterdir() if PARTS_FILE not in item.name) if directory.is_dir() else []
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        if strangers:
            raise DataError(
                f"{directory} holds files that `dstrain {maker}` did not make ({', '.join(strangers[:3])}); choose another place"
            ) from None
        return None
    except (ValidationError, NotADirectoryError) as error:
        raise DataError(
            f"{path} was not made by this version of `dstrain {maker}`, or was altered; choose another place"
        ) from error


def settle_job(directory: Path, job: J, maker: str) -> None:
    """Make the directory belong to `job`. Raises DataError, which says what differs, where it belongs to another.

    Of processes that come at the same time each writes the same bytes, and each looks at what is there in the end.
    """
    known = read_job(directory, type(job), maker)
    if known is None:
        draft = directory / f".{PARTS_FILE}.{socket.gethostname()}.{os.getpid()}"
        write_file(draft, (job.model_dump_json(indent=2) + "\n").encode())
        draft.replace(directory / PARTS_FILE)
        known = read_job(directory, type(job), maker)
    if known != job and known is not None:
        old, new = known.model_dump(mode="json"), job.model_dump(mode="json")
        changes = "; ".join(f"{name}: {_short(old[name])} -> {_short(new[name])}" for name in old if old[name] != new[name])
        raise DataError(f"{directory} was begun with another job ({changes}); choose another --output, or remove the directory")


def finished_part(directory: Path, file: str, kind: type[N]) -> N | None:
    """The note of a part whose file is whole, by its checksum; None where the part has to be done."""
    try:
        note = kind.model_validate_json(note_path(directory / file).read_bytes())
        note.record.check(directory, content=True)
    except (OSError, ValidationError, DataError):
        return None
    return note


def write_note(path: Path, note: Note) -> None:
    """Put the note beside the file `path`; called within the `atomic_writer` of that file, so before it appears."""
    write_file(note_path(path), (note.model_dump_json() + "\n").encode())


def note_path(path: Path) -> Path:
    """Where the note of a part's file stands."""
    return path.with_suffix(".json")


def _short(value: object) -> str:
    """A value in an error; of a fingerprint the first digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
