"""One process writes into an output directory at a time.

The lock is a POSIX record lock on `DIRECTORY/.lock`. It disappears with the process, however that ends, is not inherited by
worker processes, and works on network file systems. The file names the holder. Two traps of record locks: the same process gets
the lock twice (so held directories are remembered here), and closing any descriptor of the file releases it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import IO
from weakref import WeakValueDictionary

from dstrain.errors import DstrainError, StorageError
from dstrain.log import logger

LOCK_FILE = ".lock"


class OutputLock:
    """A lock that is held until `release`, or until this object is collected."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path

    def release(self) -> None:
        """Let other processes write into the directory. Calling it again does nothing."""
        with _GUARD:
            if not self._file.closed:
                _held.pop(self._path, None)
                self._path.unlink(missing_ok=True)  # while it is still locked: a process that waits for this file opens a new one
                self._file.close()


_held: WeakValueDictionary[Path, OutputLock] = WeakValueDictionary()
_GUARD = RLock()
"""Record locks are those of a process: its threads take turns by this one."""


def lock_output(directory: Path, *, busy: Callable[[str], DstrainError]) -> OutputLock:
    """Make the directory and lock it.

    busy: the error to raise if another process holds the lock, from a description of that process. Raises StorageError if the
    directory cannot be made or written.
    """
    with _GUARD:
        return _lock_output(directory, busy)


def _lock_output(directory: Path, busy: Callable[[str], DstrainError]) -> OutputLock:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory.resolve() / LOCK_FILE
        if path in _held:
            raise busy(_own())
        while True:
            file = path.open("a+", encoding="utf-8")
            if not _try_lock(file, path):
                file.seek(0)
                holder = file.read().strip() or "unknown process"
                file.close()
                raise busy(holder)
            if _is_current(file, path):
                break
            file.close()  # the last holder has removed it in between
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise StorageError(f"--output {directory}: {error.strerror}; choose a directory that can be written") from error
    lock = _held[path] = OutputLock(file, path)
    return lock


def lock_holder(directory: Path) -> str | None:
    """A description of the process that holds the lock of a directory, None if none does.

    Asking takes the lock for a moment, shared: those who ask do not disturb one another.
    """
    path = directory.resolve() / LOCK_FILE
    with _GUARD:
        if path in _held:
            return _own()
        try:
            with path.open(encoding="utf-8") as file:
                return None if _try_lock(file, path, fcntl.LOCK_SH) else file.read().strip() or "unknown process"
        except OSError:  # no file to lock, or none that may be read
            return None


@contextmanager
def locked_output(directory: Path, *, busy: Callable[[str], DstrainError]) -> Iterator[None]:
    """`lock_output` for the length of a block."""
    lock = lock_output(directory, busy=busy)
    try:
        yield
    finally:
        lock.release()


def _own() -> str:
    return f"process {os.getpid()}, this one"


def _try_lock(file: IO[str], path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        logger.warning("%s cannot be locked (%s): make sure that no other process writes there", path.parent, error.strerror)
    return True


def _is_current(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
