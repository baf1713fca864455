"""Copies within a limit: whole or absent, downloaded once by many, removed only if nobody uses them."""

import errno
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import BinaryIO

import pytest

from dstrain.errors import StorageError
from dstrain.storage.file_cache import FileCache, Hold, cache_directory, cache_limit

SIZE = 100


def write(content: bytes = b"x" * SIZE) -> Callable[[BinaryIO], None]:
    return lambda file: (file.write(content), None)[1]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path: Path) -> FileCache:
    return FileCache(tmp_path, limit=3.5 * SIZE)


def copied(cache: FileCache, name: str) -> Hold:
    time.sleep(0.002)  # the clock of a file system may tick slowly
    return cache.open(cache.directory / "data" / name, SIZE, write())


def test_a_copy_is_written_once_and_then_there(cache: FileCache) -> None:
    copied(cache, "a.arrow")
    cache.open(cache.directory / "data/a.arrow", SIZE, lambda file: pytest.fail("it is there"))
    assert (cache.directory / "data/a.arrow").read_bytes() == b"x" * SIZE
    assert names(cache.directory) == {"a.arrow"}


def test_many_that_need_a_file_download_it_once(cache: FileCache) -> None:
    path, downloads, holds = cache.directory / "a.arrow", [], []

    def slow(file: BinaryIO) -> None:
        downloads.append(file.write(b"x" * 50))
        time.sleep(0.1)
        file.write(b"x" * 50)

    threads = [Thread(target=lambda: holds.append(FileCache(cache.directory, 1e6).open(path, SIZE, slow))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(holds), downloads, path.read_bytes()) == (5, [50], b"x" * SIZE)


def test_a_download_that_fails_halfway_leaves_nothing_and_the_next_one_begins_anew(cache: FileCache) -> None:
    path = cache.directory / "a.arrow"

    def breaks(file: BinaryIO) -> None:
        file.write(b"y" * 50)
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        cache.open(path, SIZE, breaks)
    assert names(cache.directory) == set()
    path.with_name("a.arrow.part").write_bytes(b"of a process that was killed" * 100)
    cache.open(path, SIZE, write())
    assert path.read_bytes() == b"x" * SIZE
    assert names(cache.directory) == {"a.arrow"}


def test_the_first_of_two_fails_and_the_second_downloads(cache: FileCache) -> None:
    path, attempts = cache.directory / "a.arrow", []

    def fails_once(file: BinaryIO) -> None:
        attempts.append(len(attempts))
        time.sleep(0.05)
        if attempts == [0]:
            raise ConnectionError("lost")
        file.write(b"x" * SIZE)

    def swallow() -> None:
        with pytest.raises(ConnectionError):
            cache.open(path, SIZE, fails_once)

    first = Thread(target=swallow)
    first.start()
    time.sleep(0.02)
    cache.open(path, SIZE, fails_once)
    first.join(20)
    assert (attempts, path.read_bytes()) == ([0, 1], b"x" * SIZE)


def test_the_copy_that_was_opened_longest_ago_makes_room(cache: FileCache) -> None:
    (cache.directory / "data").mkdir()
    (cache.directory / "data/manifest.json").write_bytes(b"z" * 1000)
    for name in ("a.arrow", "b.npy", "c.arrow", "a.arrow", "d.arrow"):
        copied(cache, name)
    assert names(cache.directory) == {"a.arrow", "c.arrow", "d.arrow", "manifest.json"}


def test_what_somebody_holds_is_not_removed(cache: FileCache, caplog: pytest.LogCaptureFixture) -> None:
    held = [copied(cache, name) for name in ("a.arrow", "b.arrow")]
    for name in ("c.arrow", "d.arrow"):
        copied(cache, name)
    assert names(cache.directory) == {"a.arrow", "b.arrow", "d.arrow"}
    held += [copied(cache, name) for name in ("e.arrow", "f.arrow")]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert names(cache.directory) == {"a.arrow", "b.arrow", "e.arrow", "f.arrow"}
    assert len([text for text in caplog.messages if "DSTRAIN_CACHE_GIB allows" in text and "shard_window" in text]) == 1
    held.clear()  # an order that reads fewer shards at a time
    copied(cache, "g.arrow")
    assert names(cache.directory) == {"e.arrow", "f.arrow", "g.arrow"}


def _hold_until_told(path: str, ready: "multiprocessing.synchronize.Event", end: "multiprocessing.synchronize.Event") -> None:
    hold = FileCache(Path(path).parent, SIZE).open(Path(path), SIZE, write())
    ready.set()
    end.wait(60)
    del hold


def test_another_process_s_hold_counts_until_it_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=_hold_until_told, args=(str(tmp_path / "a.arrow"), ready, end))
    process.start()
    assert ready.wait(60)
    cache = FileCache(tmp_path, SIZE)
    cache.open(tmp_path / "b.arrow", SIZE, write())
    assert names(tmp_path) == {"a.arrow", "b.arrow"}
    process.kill()
    process.join()
    cache.open(tmp_path / "c.arrow", SIZE, write())
    assert names(tmp_path) == {"c.arrow"}


def test_a_full_disk_is_named(cache: FileCache) -> None:
    def full(file: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"no space left to write .*a\.arrow .*free some space and run the same command"):
        cache.open(cache.directory / "a.arrow", SIZE, full)
    assert names(cache.directory) == set()


def test_limit_and_directory_of_the_environment() -> None:
    assert cache_limit({}) == 100 * 2**30
    assert cache_limit({"DSTRAIN_CACHE_GIB": "0.5"}) == 2**29
    assert cache_directory({"DSTRAIN_CACHE": "/scratch/c", "XDG_CACHE_HOME": "/x"}) == Path("/scratch/c")
    assert cache_directory({"XDG_CACHE_HOME": "/x"}) == Path("/x/dstrain")
    assert cache_directory({}) == Path.home() / ".cache/dstrain"
    for text in ("many", "0", "-1", "inf", "nan"):
        with pytest.raises(StorageError, match=rf"DSTRAIN_CACHE_GIB='{text}' is no number above 0; set it to the GiB"):
            cache_limit({"DSTRAIN_CACHE_GIB": text})
