"""Shards: what goes in comes out, and what is wrong with a file is said in words."""

import pickle
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dstrain.engine.shard_file import read_shard, write_shard
from dstrain.errors import CheckpointError

CONTENT = {"step": 3, "masters": [torch.randn(5), torch.randn(2, 3).bfloat16()], "optimizer": [{"exp_avg": torch.ones(4)}, {}]}


def test_round_trip(tmp_path: Path) -> None:
    write_shard(tmp_path / "shard.pt", CONTENT)
    found = read_shard(tmp_path / "shard.pt")
    assert found["step"] == 3
    assert all(torch.equal(a, b) for a, b in zip(found["masters"], CONTENT["masters"], strict=True))
    assert [list(state) for state in found["optimizer"]] == [["exp_avg"], []]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a writer."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    with files_of_at_most(10_000), pytest.raises(CheckpointError) as error:
        write_shard(path, {"masters": [torch.randn(100_000)]})
    assert str(error.value).startswith(f"{path} cannot be written: ")
    assert str(error.value).endswith("make room on the disk, or choose another --output")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_shard(tmp_path / "missing" / "shard.pt", CONTENT)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*No such file"):
        read_shard(tmp_path / "missing" / "shard.pt")


@pytest.mark.parametrize("kept", [0, 1, 1000])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.pt"
    write_shard(path, CONTENT)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as error:
        read_shard(path)
    assert str(error.value).startswith(f"{path} cannot be read: ")
    assert str(error.value).endswith("delete its folder to resume from the checkpoint before")


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import tests.unit.engine.test_shard_file as t; t.Trap.sprung = True",)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    torch.save({"masters": Trap()}, tmp_path / "torch.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"masters": Trap()}, protocol=2))
    for name in ("torch.pt", "pickle.pt"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_shard(tmp_path / name)
    assert not Trap.sprung
