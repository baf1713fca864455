"""Shards: each belongs to one worker, however workers are divided; processes that meet do not disturb each other."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock

import pytest

from dstrain.config_base import Config
from dstrain.errors import DataError, StorageError
from dstrain.storage.atomic import atomic_writer
from dstrain.storage.document import DocumentFormat
from dstrain.storage.sharded_job import PARTS_FILE, ShardedJob, Sidecar, Worker


class Job(Config):
    number: int


WORK = ShardedJob("dump-logits", DocumentFormat(Job, "job", DataError, "start again"), Sidecar, str, lambda job: job.number)


@pytest.mark.parametrize("shards", [0, 1, 5, 17])
@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_the_shards_of_a_worker_are_those_of_its_ranks(shards: int, count: int, ranks: int) -> None:
    seen = []
    for index in range(count):
        worker = Worker(index, count)
        divided = [worker.divide(rank, ranks) for rank in range(ranks)]
        assert sorted(number for one in divided for number in one.shards(shards)) == list(worker.shards(shards))
        seen += [number for one in divided for number in one.shards(shards)]
    assert sorted(seen) == list(range(shards))


def test_a_job_that_another_process_starts_at_the_same_moment_is_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardedJob.read

    def missed(work: ShardedJob[Job, Sidecar], directory: Path) -> Job | None:
        """Not there yet; an instant later it is, and the other process has started its first shard."""
        monkeypatch.setattr(ShardedJob, "read", read)
        WORK.start(directory, Job(number=1))
        (tmp_path / "00000.arrow.tmp").touch()
        return None

    monkeypatch.setattr(ShardedJob, "read", missed)
    WORK.start(tmp_path, Job(number=1))
    with pytest.raises(DataError, match="number: 1 -> 2"):
        WORK.start(tmp_path, Job(number=2))
    (tmp_path / PARTS_FILE).unlink()
    with pytest.raises(DataError, match=r"holds files that `dstrain dump-logits` did not make \(00000.arrow.tmp\)"):
        WORK.start(tmp_path, Job(number=1))


def test_two_processes_at_one_file_get_an_error(tmp_path: Path) -> None:
    path = tmp_path / "00000.arrow"
    with (
        pytest.raises(StorageError, match=r"another process has written .*00000.arrow at the same time"),
        atomic_writer(path) as one,
    ):
        one.write(b"same")
        with atomic_writer(path) as twin:
            twin.write(b"same")
    assert path.read_bytes() == b"same"


def test_processes_of_a_new_job_replace_the_old_one_once_and_lose_nothing_of_their_own(tmp_path: Path) -> None:
    WORK.start(tmp_path, Job(number=1))
    for name in ("00000.arrow", "00000.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "train").mkdir()
    together, one_draft = Barrier(4), Lock()

    def work(number: int) -> None:
        together.wait()
        WORK.discard_other(tmp_path, Job(number=2))
        with one_draft:  # the draft of parts.json is named after the process
            WORK.start(tmp_path, Job(number=2))
        (tmp_path / f"{number:05d}.arrow").write_text("new")
        WORK.discard_other(tmp_path, Job(number=2))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert WORK.read(tmp_path) == Job(number=2)
    shards = [f"{number:05d}.arrow" for number in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*shards, PARTS_FILE]
    assert [(tmp_path / name).read_text() for name in shards] == ["new"] * 4


def test_a_removal_that_was_cut_short_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WORK.start(tmp_path, Job(number=1))
    (tmp_path / "00000.arrow").touch()
    (tmp_path / "00001.arrow").touch()
    unlink, seen = Path.unlink, []

    def cut(path: Path, missing_ok: bool = False) -> None:
        seen.append(path.name)
        if path.name.endswith(".arrow") and len(seen) == 2:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", cut)
    with pytest.raises(KeyboardInterrupt):
        WORK.discard_other(tmp_path, Job(number=2))
    monkeypatch.setattr(Path, "unlink", unlink)
    assert WORK.read(tmp_path) == Job(number=1)
    WORK.discard_other(tmp_path, Job(number=2))
    assert list(tmp_path.iterdir()) == []
