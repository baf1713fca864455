"""Numbered parts: each belongs to one share, however shares are cut again; processes that meet do not disturb each other."""

from pathlib import Path

import pytest

from dstrain.config_base import Config
from dstrain.data.files import atomic_writer
from dstrain.data.parts import Share, settle_job
from dstrain.data.prepared.manifest import PARTS_FILE
from dstrain.errors import DataError


class Job(Config):
    number: int


@pytest.mark.parametrize("parts", [0, 1, 5, 17])
@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_the_parts_of_a_share_are_those_of_its_ranks(parts: int, count: int, ranks: int) -> None:
    seen = []
    for index in range(count):
        share = Share(index, count)
        pieces = [share.part(rank, ranks) for rank in range(ranks)]
        assert sorted(number for piece in pieces for number in piece.of(parts)) == list(share.of(parts))
        seen += [number for piece in pieces for number in piece.of(parts)]
    assert sorted(seen) == list(range(parts))


def test_a_job_that_another_process_settles_at_the_same_moment_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def missed(path: Path) -> bytes:
        """Not there yet; an instant later it is, and the other process has begun its first part."""
        monkeypatch.setattr(Path, "read_bytes", read)
        settle_job(tmp_path, Job(number=1), "dump-logits")
        (tmp_path / "00000.arrow.tmp").touch()
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_bytes", missed)
    settle_job(tmp_path, Job(number=1), "dump-logits")
    with pytest.raises(DataError, match="number: 1 -> 2"):
        settle_job(tmp_path, Job(number=2), "dump-logits")
    (tmp_path / PARTS_FILE).unlink()
    with pytest.raises(DataError, match=r"holds files that `dstrain dump-logits` did not make \(00000.arrow.tmp\)"):
        settle_job(tmp_path, Job(number=1), "dump-logits")


def test_two_processes_at_one_file_are_told_so(tmp_path: Path) -> None:
    path = tmp_path / "00000.arrow"
    with (
        pytest.raises(DataError, match=r"another process has written .*00000.arrow at the same time"),
        atomic_writer(path) as one,
    ):
        one.write(b"same")
        with atomic_writer(path) as twin:
            twin.write(b"same")
    assert path.read_bytes() == b"same"
