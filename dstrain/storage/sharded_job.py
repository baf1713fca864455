"""Resumable work in numbered shards, done by any number of processes that do not communicate.

    OUTPUT/parts.json    the job: its computation and its inputs; written before any work
    OUTPUT/00000.arrow   one shard
    OUTPUT/00000.json    its sidecar: size, SHA-256 and counts of the shard beside it

Worker i of n does the shards i, i + n, i + 2n, ... The sidecar is written before the shard is renamed into place, so a shard is
complete or absent, and the next run does the shards that are not complete by their checksum. Two processes that write the same
shard cannot pass off a wrong file as a complete one: its checksum would differ.
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dstrain.config_base import Config
from dstrain.errors import DataError
from dstrain.log import logger
from dstrain.progress import with_progress
from dstrain.storage.atomic import write_file
from dstrain.storage.document import DocumentFormat, FileRecord
from dstrain.storage.lock import LOCK_FILE, locked_output

PARTS_FILE = "parts.json"
JOB_REMEDY = "remove the directory and run `dstrain {verb}` again, or choose another --output"
"""For the description of a job that is damaged, so that it is unknown what the directory holds."""


@dataclass(frozen=True)
class Worker:
    """Worker `index` (from 0) of `count`."""

    index: int
    count: int

    def shards(self, total: int) -> range:
        """Its numbers among 0..total-1."""
        return range(self.index, total, self.count)

    def divide(self, index: int, count: int) -> Worker:
        """Worker `index` of the `count` that do this worker's shards."""
        return Worker(self.index + index * self.count, self.count * count)


class Sidecar(Config):
    """Describes the shard beside it; each kind of work adds its counts."""

    record: FileRecord


J = TypeVar("J", bound=Config)
S = TypeVar("S", bound=Sidecar)


@dataclass(frozen=True)
class ShardedJob(Generic[J, S]):
    """The work that a verb does in shards.

    verb: its name on the command line. shard_file: the name of a shard in the output directory. num_shards: of a job.
    """

    verb: str
    job: DocumentFormat[J]
    sidecar: type[S]
    shard_file: Callable[[int], str]
    num_shards: Callable[[J], int]

    def read(self, directory: Path) -> J | None:
        """The job of a directory; None if it has none yet. Raises DataError if it holds something else."""
        path = directory / PARTS_FILE
        foreign: list[str] = []
        for _ in range(3):  # what is seen may be half of what another process removes or starts: then look again
            foreign = foreign_files(directory, known=PARTS_FILE)
            if path.exists() or path.is_symlink():
                try:
                    return self.job.read(path)
                except DataError:
                    if path.exists() or path.is_symlink():
                        raise
            elif not foreign:
                return None
            time.sleep(0.05)
        names = ", ".join(foreign[:3])
        raise DataError(f"{directory} holds files that `dstrain {self.verb}` did not make ({names}); choose another --output")

    def start(self, directory: Path, job: J) -> None:
        """Make the directory belong to `job`. Raises DataError that lists the differences if it belongs to another job.

        Processes that start at the same time write the same bytes, and each reads back the final file.
        """
        known = self.read(directory)
        if known is None:
            draft = directory / f".{PARTS_FILE}.{socket.gethostname()}.{os.getpid()}"
            write_file(draft, self.job.encode(directory / PARTS_FILE, job))
            draft.replace(directory / PARTS_FILE)
            known = self.read(directory)
        if known != job and known is not None:
            old, new = known.model_dump(mode="json"), job.model_dump(mode="json")
            changes = "; ".join(f"{name}: {_short(old[name])} -> {_short(new[name])}" for name in old if old[name] != new[name])
            raise DataError(
                f"{directory} was started with another job ({changes}); give its options, choose another --output, or --overwrite"
            )

    def discard_other(self, directory: Path, job: J) -> None:
        """Remove what another job has left in the directory. Processes of one job may all call it, at any time.

        parts.json is removed last, so that a removal that was cut short goes on with the next call.
        """
        while (known := self.read(directory)) is not None and known != job:
            try:
                with locked_output(directory, busy=_BusyError):
                    if self.read(directory) == known:  # no other process has done it meanwhile
                        _empty(directory)
            except _BusyError:
                time.sleep(0.1)

    def run(self, directory: Path, job: J, worker: Worker, write: Callable[[int], object], skip: Callable[[S], object]) -> None:
        """Do every shard of `worker` that is not complete.

        write: makes a shard, by number; skip: is called for a complete one. Raises DataError if the directory belongs to another
        job; complete shards stay after any error.
        """
        self.start(directory, job)
        try:
            for number in worker.shards(self.num_shards(job)):
                sidecar = finished_shard(directory, self.shard_file(number), self.sidecar)
                if sidecar is None:
                    write(number)
                else:
                    skip(sidecar)
        except KeyboardInterrupt:
            warn_of_interruption(directory)
            raise

    def collect(self, directory: Path) -> tuple[J, list[S]]:
        """The job and the sidecars of all shards, after a check of every byte.

        Raises DataError that lists the shards that are missing or damaged, or if the directory is not one of this verb.
        """
        job = self.read(directory) if (directory / PARTS_FILE).exists() else None
        if job is None:
            raise DataError(f"{directory} was not written by `dstrain {self.verb}` (it has no {PARTS_FILE}); name its --output")
        total = self.num_shards(job)
        sidecars = [
            finished_shard(directory, self.shard_file(number), self.sidecar)
            for number in with_progress(range(total), "checking", "shards")
        ]
        if missing := [number for number, sidecar in enumerate(sidecars) if sidecar is None]:
            numbers = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise DataError(
                f"{directory} is incomplete: {len(missing)} of {total} shards are missing or damaged ({numbers}); run `dstrain "
                f"{self.verb}` again, with the same --shard if it was interrupted: only missing shards are done"
            )
        return job, [sidecar for sidecar in sidecars if sidecar is not None]


class _BusyError(DataError):
    """Another process holds the directory."""


def _empty(directory: Path) -> None:
    """Remove everything but the lock, parts.json last."""
    for path in sorted(directory.iterdir(), key=lambda item: item.name == PARTS_FILE):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def foreign_files(directory: Path, *, known: str) -> list[str]:
    """Files of a directory but `known`, its drafts and the lock."""
    if not directory.is_dir():
        return []
    return sorted(item.name for item in directory.iterdir() if known not in item.name and item.name != LOCK_FILE)


def finished_shard(directory: Path, file: str, kind: type[S], *, content: bool = True) -> S | None:
    """The sidecar of a complete shard, by its size and, with `content`, its checksum; None if it has to be done."""
    try:
        sidecar = DocumentFormat(kind, "sidecar of a shard", DataError, "write the shard again").read(
            sidecar_path(directory / file)
        )
        sidecar.record.check(directory, content=content)
    except DataError:
        return None
    return sidecar if sidecar.record.file == file else None


def write_sidecar(directory: Path, sidecar: Sidecar) -> None:
    """Write it beside its shard; call this within the `atomic_writer` of the shard, before that appears."""
    write_file(sidecar_path(directory / sidecar.record.file), (sidecar.model_dump_json() + "\n").encode())


def sidecar_path(shard: Path) -> Path:
    """The sidecar of a shard's file."""
    return shard.with_suffix(".json")


def warn_of_interruption(directory: Path) -> None:
    """Log that Ctrl-C has lost nothing."""
    logger.warning("interrupted; finished shards stay in %s: run the same command again to go on", directory)


def _short(value: object) -> str:
    """A value in an error; of a fingerprint the first digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
