"""Shards: each belongs to one worker, however workers are divided; processes that meet do not disturb each other."""

from pathlib import Path

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
