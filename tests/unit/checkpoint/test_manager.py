"""Checkpoints are whole or absent: round trip, order of candidates, damage of every kind, full disks, several ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.checkpoint.manager import CheckpointManager
from dstrain.errors import CheckpointError
from dstrain.log import logger
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.training.fakes import ALONE

NUMBERS = {"step": 3, "loss": 0.1 + 0.2, "tiny": 5e-324, "none": None, "nested": {"list": [1, 2.5]}}


class Shards:
    """An engine whose whole state is one text per rank, in a folder as DeepSpeed makes them."""

    def __init__(self, text: str = "", rank: int = 0) -> None:
        self.text, self.rank = text, rank
        self.loads = 0

    def save_shards(self, directory: Path) -> None:
        folder = directory / "deep"
        folder.mkdir(exist_ok=True)
        (folder / f"rank_{self.rank}.txt").write_text(self.text)
        if self.rank == 0:
            (directory / "common.txt").write_text("common to all ranks")

    def load_shards(self, directory: Path) -> None:
        self.loads += 1
        self.text = (directory / "deep" / f"rank_{self.rank}.txt").read_text()


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="dstrain")
    return caplog


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A directory with checkpoints 10, 20 and 30."""
    manager = CheckpointManager(tmp_path / "checkpoints", ALONE, keep=3)
    for step in (10, 20, 30):
        manager.save(step, Shards(f"weights of {step}"), {"step": step})
    return manager.directory


def load(directory: Path) -> tuple[int, str] | None:
    engine = Shards()
    found = CheckpointManager(directory, ALONE, keep=3).load_latest(engine)
    return None if found is None else (found.step, engine.text)


def test_state_and_shards_come_back_bit_for_bit(tmp_path: Path) -> None:
    CheckpointManager(tmp_path, ALONE, keep=2).save(3, Shards("weights"), NUMBERS)
    engine = Shards()
    found = CheckpointManager(tmp_path, ALONE, keep=2).load_latest(engine)
    assert found is not None
    assert (found.step, found.world_size, found.state, engine.text) == (3, 1, NUMBERS, "weights")


def test_nothing_there_is_none_and_makes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_the_newest_are_kept_and_the_pointer_names_the_last(three: Path) -> None:
    CheckpointManager(three, ALONE, keep=2).save(40, Shards("weights of 40"), {})
    assert sorted(path.name for path in three.iterdir()) == ["latest", "step_00000030", "step_00000040"]
    assert (three / "latest").read_text() == "step_00000040\n"


def test_the_manifest_lists_every_file_with_size_and_hash(three: Path) -> None:
    manifest = json.loads((three / "step_00000010" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == ["common.txt", "deep/rank_0.txt"]
    assert manifest["files"][1]["size"] == len("weights of 10")
    assert manifest["files"][1]["sha256"] == hashlib.sha256(b"weights of 10").hexdigest()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "why"),
    [
        (truncate, "deep/rank_0.txt", "truncated file deep/rank_0.txt: 9 of 13 bytes"),
        (flip, "deep/rank_0.txt", "hash mismatch in deep/rank_0.txt"),
        (Path.unlink, "deep/rank_0.txt", "missing file deep/rank_0.txt"),
        (Path.unlink, "manifest.json", "missing manifest.json"),
        (truncate, "manifest.json", "manifest.json is damaged"),
        (flip, "manifest.json", "manifest.json is damaged"),
        (lambda path: path.write_text("[]"), "manifest.json", "manifest.json is damaged"),
        (lambda path: path.write_text(path.read_text() + "x"), "common.txt", "file common.txt has grown"),
    ],
)
def test_damage_steps_back_with_a_warning_that_says_why(
    three: Path, heard: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str, why: str
) -> None:
    damage(three / "step_00000030" / name)
    assert load(three) == (20, "weights of 20")
    assert f"skipping checkpoint {three}/step_00000030: {why}" in heard.text


def test_every_flipped_byte_of_a_checkpoint_is_noticed(three: Path) -> None:
    for path in (three / "step_00000030").rglob("*"):
        if path.is_file():
            original = path.read_bytes()
            for place in range(0, len(original), 7):
                path.write_bytes(original[:place] + bytes([original[place] ^ 0x10]) + original[place + 1 :])
                assert load(three) == (20, "weights of 20"), (path, place)
            path.write_bytes(original)
    assert load(three) == (30, "weights of 30")


@pytest.mark.parametrize("content", ["", "\x00\x00", "step_00000099\n", "../../etc"])
def test_a_broken_pointer_is_named_and_the_newest_taken(three: Path, heard: pytest.LogCaptureFixture, content: str) -> None:
    (three / "latest").write_text(content)
    assert load(three) == (30, "weights of 30")
    assert f"the pointer {three}/latest names no checkpoint" in heard.text


def test_a_missing_pointer_is_named(three: Path, heard: pytest.LogCaptureFixture) -> None:
    (three / "latest").unlink()
    assert load(three) == (30, "weights of 30")
    assert "latest is missing" in heard.text


def test_the_pointer_comes_before_newer_folders(three: Path) -> None:
    (three / "latest").write_text("step_00000020\n")
    assert load(three) == (20, "weights of 20")


def test_checkpoints_of_which_none_is_usable_are_an_error_and_nothing_is_loaded(three: Path) -> None:
    for path in three.glob("step_*"):
        flip(path / "common.txt")
    engine = Shards()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable .* restore one .* or choose another --output"):
        CheckpointManager(three, ALONE, keep=3).load_latest(engine)
    assert engine.loads == 0


def test_a_pointer_without_checkpoints_is_an_error(three: Path) -> None:
    for path in three.glob("step_*"):
        path.rename(path.with_name("moved_" + path.name))
    with pytest.raises(CheckpointError, match="usable"):
        load(three)


def test_after_stepping_back_the_damaged_one_does_not_count_as_kept(three: Path) -> None:
    flip(three / "step_00000030" / "common.txt")
    manager = CheckpointManager(three, ALONE, keep=2)
    manager.load_latest(Shards())
    manager.save(35, Shards("weights of 35"), {})
    assert sorted(path.name for path in three.glob("step_*")) == ["step_00000020", "step_00000035"]


def test_a_step_saved_again_replaces_the_damaged_one(three: Path) -> None:
    flip(three / "step_00000030" / "common.txt")
    manager = CheckpointManager(three, ALONE, keep=2)
    manager.load_latest(Shards())
    manager.save(30, Shards("weights of 30 again"), {})
    assert load(three) == (30, "weights of 30 again")


def test_another_format_is_named(three: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.checkpoint.manager.FORMAT", 2)
    with pytest.raises(CheckpointError):
        load(three)
    assert "manifest.json has format 1; this dstrain reads 2" in heard.text


def test_leftovers_of_a_killed_save_are_removed(three: Path) -> None:
    (three / "step_00000040.tmp" / "deep").mkdir(parents=True)
    (three / "latest.tmp").write_text("step_000")
    assert load(three) == (30, "weights of 30")
    assert sorted(path.name for path in three.iterdir()) == ["latest", "step_00000010", "step_00000020", "step_00000030"]


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(three: Path) -> None:
    manager = CheckpointManager(three, ALONE, keep=3)
    manager.load_latest(Shards())

    class Full(Shards):
        def save_shards(self, directory: Path) -> None:
            super().save_shards(directory)
            raise OSError(errno.ENOSPC, "No space left on device", str(directory / "deep"))

    with pytest.raises(CheckpointError, match=r"No space left on device.*last complete checkpoint is .*step_00000030.*make room"):
        manager.save(40, Full("x"), {})
    assert not list(three.glob("*.tmp"))
    assert load(three) == (30, "weights of 30")


def test_an_error_of_torch_while_writing_is_explained_too(tmp_path: Path) -> None:
    class Broken(Shards):
        def save_shards(self, directory: Path) -> None:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    with pytest.raises(
        CheckpointError, match=r"saving .*step_00000001 failed: PytorchStreamWriter.*no checkpoint was complete before"
    ):
        CheckpointManager(tmp_path, ALONE, keep=1).save(1, Broken(), {})


def test_a_state_that_json_cannot_hold_exactly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        CheckpointManager(tmp_path, ALONE, keep=1).save(1, Shards("x"), {"loss": float("nan")})


def test_three_ranks_save_and_load_together(tmp_path: Path) -> None:
    def save(ranks: ThreadRanks) -> Path:
        return CheckpointManager(tmp_path, ranks, keep=1).save(
            5, Shards(f"of rank {ranks.rank}", ranks.rank), {"rank": ranks.rank}
        )

    def load_all(ranks: ThreadRanks) -> tuple[object, ...]:
        engine = Shards(rank=ranks.rank)
        found = CheckpointManager(tmp_path, ranks, keep=1).load_latest(engine)
        return found and found.step, found and found.world_size, found and found.state, engine.text

    assert on_ranks(3, save) == [tmp_path / "step_00000005"] * 3
    assert on_ranks(3, load_all) == [(5, 3, {"rank": 0}, f"of rank {rank}") for rank in range(3)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_of_one_rank_is_the_same_error_on_all(tmp_path: Path, failing: int) -> None:
    class Fails(Shards):
        def save_shards(self, directory: Path) -> None:
            super().save_shards(directory)
            if self.rank == failing:
                raise OSError(errno.ENOSPC, "No space left on device")

    results = on_ranks(3, lambda ranks: CheckpointManager(tmp_path, ranks, keep=1).save(5, Fails("x", ranks.rank), {}))
    assert all(isinstance(result, CheckpointError) for result in results)
    assert len({str(result) for result in results}) == 1
    assert f"failed on rank {failing}: [Errno 28] No space left on device" in str(results[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["common.txt", "deep/rank_0.txt", "deep/rank_1.txt"])
def test_damage_that_one_rank_finds_moves_all_ranks_back(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        on_ranks(
            2, lambda ranks, step=step: CheckpointManager(tmp_path, ranks, keep=2).save(step, Shards(f"{step}", ranks.rank), {})
        )
    flip(tmp_path / "step_00000002" / name)

    def load_all(ranks: ThreadRanks) -> str:
        engine = Shards(rank=ranks.rank)
        CheckpointManager(tmp_path, ranks, keep=2).load_latest(engine)
        return engine.text

    assert on_ranks(2, load_all) == ["1", "1"]


def test_an_engine_that_refuses_a_sound_checkpoint_is_heard(three: Path) -> None:
    class Refuses(Shards):
        def load_shards(self, directory: Path) -> None:
            raise CheckpointError("it was saved with world_size = 2")

    with pytest.raises(CheckpointError, match="world_size = 2"):
        CheckpointManager(three, ALONE, keep=3).load_latest(Refuses())
