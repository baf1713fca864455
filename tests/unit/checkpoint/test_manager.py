"""Checkpoints are whole or absent: round trip, order of candidates, damage of every kind, full disks, several ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dstrain.checkpoint.manager import CheckpointManager
from dstrain.checkpoint.manifest import verify_files
from dstrain.checkpoint.snapshot import take_snapshot
from dstrain.errors import CheckpointError
from dstrain.fragment import Fragment, StoredState
from dstrain.log import logger
from dstrain.protocols import Ranks
from dstrain.storage.document import FileRecord
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.training.fakes import ONE_PROCESS

NUMBERS = {"step": 3, "loss": 0.1 + 0.2, "tiny": 5e-324, "none": None, "nested": {"list": [1, 2.5]}}


class Shards:
    """An engine whose whole state is one text per rank, and one that rank 0 writes for all."""

    layout = "as it is"

    def __init__(self, text: str = "", rank: int = 0) -> None:
        self.text, self.rank = text, rank
        self.loads = 0

    def fragments(self) -> list[Fragment]:
        content = torch.frombuffer(bytearray(self.text.encode()), dtype=torch.uint8)
        return [Fragment(f"text/{self.rank}", (len(content),), 0, content)]

    def scalars(self) -> dict[str, str]:
        return {"common": "to all ranks"}

    def load(self, stored: StoredState) -> None:
        self.loads += 1
        assert stored.scalars == self.scalars()
        self.text = bytes(stored.whole("text")[str(self.rank)].tolist()).decode()

    def sync(self) -> None:
        pass


def template(directory: Path) -> None:
    (directory / "common.txt").write_text("common to all ranks")


def manager_of(directory: Path, ranks: Ranks = ONE_PROCESS, *, keep: int, run_id: str = "run") -> CheckpointManager:
    return CheckpointManager(directory, ranks, keep=keep, run_id=run_id, template=template)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger="dstrain")
    return caplog


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A directory with checkpoints 10, 20 and 30."""
    manager = manager_of(tmp_path / "checkpoints", keep=3)
    for step in (10, 20, 30):
        manager.save(step, Shards(f"weights of {step}"), {"step": step})
    return manager.directory


def load(directory: Path) -> tuple[int, str] | None:
    engine = Shards()
    found = manager_of(directory, keep=3).load_latest(engine)
    return None if found is None else (found.step, engine.text)


def test_state_and_shards_come_back_bit_for_bit(tmp_path: Path) -> None:
    manager_of(tmp_path, keep=2).save(3, Shards("weights"), NUMBERS)
    engine = Shards()
    found = manager_of(tmp_path, keep=2).load_latest(engine)
    assert found is not None
    assert (found.step, found.world_size, found.state, engine.text) == (3, 1, NUMBERS, "weights")


def test_nothing_there_is_none_and_makes_nothing(tmp_path: Path) -> None:
    assert load(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_the_newest_are_kept_and_the_pointer_names_the_last(three: Path) -> None:
    manager_of(three, keep=2).save(40, Shards("weights of 40"), {})
    assert sorted(path.name for path in three.iterdir()) == ["latest", "step_00000030", "step_00000040"]
    assert (three / "latest").read_text() == "step_00000040\n"


def test_the_manifest_lists_every_file_with_size_and_hash(three: Path) -> None:
    manifest = json.loads((three / "step_00000010" / "manifest.json").read_text())
    assert [entry["file"] for entry in manifest["files"]] == ["rank_00000.json", "rank_00000.safetensors", "template/common.txt"]
    for entry in manifest["files"]:
        content = (three / "step_00000010" / entry["file"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert content == b"common to all ranks"


def test_a_file_of_tensors_is_what_safetensors_writes(three: Path) -> None:
    path = three / "step_00000010" / "rank_00000.safetensors"
    expected = {"text/0": torch.frombuffer(bytearray(b"weights of 10"), dtype=torch.uint8)}
    assert torch.equal(load_file(path)["text/0"], expected["text/0"])
    save_file(expected, path.with_name("expected"))
    assert path.read_bytes() == path.with_name("expected").read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "why"),
    [
        (truncate, "rank_00000.safetensors", "holds 81 bytes, the manifest says 85: it is truncated or altered"),
        (flip, "rank_00000.safetensors", "the SHA-256 differs from the manifest's"),
        (flip, "rank_00000.json", "the SHA-256 differs from the manifest's"),
        (Path.unlink, "rank_00000.safetensors", "No such file or directory; the manifest lists this file"),
        (Path.unlink, "manifest.json", "is missing"),
        (truncate, "manifest.json", "is not valid JSON"),
        (lambda path: path.write_text(path.read_text().replace("30", "31")), "manifest.json", "is damaged"),
        (lambda path: path.write_text("[]"), "manifest.json", "holds no mapping of fields but []"),
        (
            lambda path: path.write_text(path.read_text() + "x"),
            "template/common.txt",
            "holds 20 bytes, the manifest says 19: it is truncated or altered",
        ),
    ],
)
def test_damage_steps_back_with_a_warning_that_says_why(
    three: Path, heard: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str, why: str
) -> None:
    damage(three / "step_00000030" / name)
    assert load(three) == (20, "weights of 20")
    (line,) = (line for line in heard.text.splitlines() if "skipping" in line)
    directory = three / "step_00000030"
    assert f"skipping checkpoint {directory}: {directory / name}" in line
    assert why in line
    assert line.endswith(" use another checkpoint, or restore this one from a copy")


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
        flip(path / "template" / "common.txt")
    engine = Shards()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable .* restore one .* or choose another --output"):
        manager_of(three, keep=3).load_latest(engine)
    assert engine.loads == 0
    flip(three / "step_00000030" / "template" / "common.txt")
    assert load(three) == (30, "weights of 30")
    assert manager_of(three / "elsewhere", keep=3).load_latest(engine) is None


def test_a_pointer_without_checkpoints_is_an_error(three: Path) -> None:
    for path in three.glob("step_*"):
        path.rename(path.with_name("moved_" + path.name))
    with pytest.raises(CheckpointError, match="usable"):
        load(three)


def test_after_stepping_back_the_damaged_one_does_not_count_as_kept(three: Path) -> None:
    flip(three / "step_00000030" / "template" / "common.txt")
    manager = manager_of(three, keep=2)
    manager.load_latest(Shards())
    manager.save(35, Shards("weights of 35"), {})
    assert sorted(path.name for path in three.glob("step_*")) == ["step_00000020", "step_00000035"]


def test_a_step_saved_again_replaces_the_damaged_one(three: Path) -> None:
    flip(three / "step_00000030" / "template" / "common.txt")
    manager = manager_of(three, keep=2)
    manager.load_latest(Shards())
    manager.save(30, Shards("weights of 30 again"), {})
    assert load(three) == (30, "weights of 30 again")


def test_the_format_before_is_refused_with_the_remedy(three: Path) -> None:
    """It held pickles; nothing of it is read, and no older checkpoint is taken silently."""
    content: dict[str, Any] = {"format": 1, "step": 30, "world_size": 1, "state": {}, "files": []}
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (three / "step_00000030" / "manifest.json").write_text(json.dumps(content))
    engine = Shards()
    with pytest.raises(CheckpointError) as caught:
        manager_of(three, keep=3).load_latest(engine)
    assert str(caught.value) == (
        f"{three}/step_00000030/manifest.json has format 1, this dstrain reads 2: resume with the version that wrote it, or "
        "start a new run from its last bundle (--base RUN/bundles/last)"
    )
    assert engine.loads == 0


def test_a_checkpoint_of_another_run_is_refused_by_name(three: Path) -> None:
    manager_of(three, keep=9, run_id="other").save(40, Shards("weights of another run"), {})
    with pytest.raises(CheckpointError) as caught:
        load(three)
    assert str(caught.value) == (
        f"{three}/step_00000040 was written by run other, but this is run run: move it out of the folder, or choose the "
        "--output of its run"
    )
    assert manager_of(three, keep=9, run_id="other").load_latest(Shards()) is not None
    (three / "step_00000040").rename(three.parent / "of_another_run")
    assert load(three) == (30, "weights of 30")


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Change fields of a manifest, whose hash fits afterwards."""
    content = {**json.loads(path.read_text()), **change}
    del content["sha256"]
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def rewrite_index(checkpoint: Path, content: Any) -> None:
    """Replace the index of rank 0; all hashes fit afterwards."""
    text = json.dumps(content).encode()
    (checkpoint / "rank_00000.json").write_bytes(text)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    files[0] |= {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    rewrite(checkpoint / "manifest.json", {"files": files})


FRAGMENT = {"dtype": "U8", "shape": [13], "start": 0, "length": 13, "slice": None}


@pytest.mark.parametrize(
    ("index", "why"),
    [
        ([], "rank_00000.json holds no mapping of fields"),
        ({}, "rank_00000.json is not a valid index of fragments: fragments: missing; give it a value; use another"),
        ({"fragments": {"text/0": {**FRAGMENT, "dtype": "X"}}}, "fragments.text/0.dtype: string should match pattern"),
        ({"fragments": {"text/0": {**FRAGMENT, "start": -1}}}, "fragments.text/0.start: input should be greater than or equal"),
        ({"fragments": {"text/0": {**FRAGMENT, "shape": "13"}}}, "fragments.text/0.shape: input should be a valid array"),
        ({"fragments": {"text/0": {**FRAGMENT, "slice": [1, 0, 5]}}}, "leaves its tensor"),
        ({"fragments": {"text/0": {**FRAGMENT, "start": 2}}}, "leaves its tensor"),
        ({"fragments": {"text/0": {**FRAGMENT, "length": 5}}}, "text/0: element 5 is not stored"),
        (
            {"fragments": {"text/0": {**FRAGMENT, "shape": [1 << 50, 2], "length": 1 << 50, "slice": [1, 0, 1]}}},
            f"its fragments take {1 << 50} bytes, which rank_00000.safetensors does not hold",
        ),
        ({"fragments": {"text/1": FRAGMENT}}, "rank_00000.safetensors holds no tensor text/1"),
        ({"fragments": {"text/0": {**FRAGMENT, "dtype": "F16", "length": 6, "shape": [6]}}}, "which TensorInfo"),
    ],
)
def test_a_wrong_index_is_one_message(three: Path, index: Any, why: str) -> None:
    rewrite_index(three / "step_00000030", index)
    with pytest.raises(CheckpointError) as caught:
        load(three)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"step": -1},
            "manifest of a checkpoint: step: input should be greater than or equal to 0, not -1",
        ),
        (
            {"world_size": "two"},
            "manifest of a checkpoint: world_size: input should be a valid integer, not 'two'",
        ),
        (
            {"files": [{"file": "../x", "size": 1, "sha256": "0" * 64}]},
            "leads out of the directory",
        ),
        ({"files": [{"file": "/etc/hosts", "size": 1, "sha256": "0" * 64}]}, "is no relative path with `/`"),
        ({"state": None}, "state: input should be an object, not null"),
        ({"scalars": [1]}, "scalars: input should be an object, not [1]"),
    ],
)
def test_a_mistyped_manifest_is_one_message(
    three: Path, heard: pytest.LogCaptureFixture, change: dict[str, Any], why: str
) -> None:
    rewrite(three / "step_00000030" / "manifest.json", change)
    assert load(three) == (20, "weights of 20")
    assert why in heard.text


def test_a_link_out_of_the_checkpoint_is_not_followed(three: Path, heard: pytest.LogCaptureFixture) -> None:
    path = three / "step_00000030" / "rank_00000.safetensors"
    path.rename(three.parent / "elsewhere")
    path.symlink_to(three.parent / "elsewhere")
    assert load(three) == (20, "weights of 20")
    assert "rank_00000.safetensors leads out of" in heard.text


def test_leftovers_of_a_killed_save_are_removed(three: Path) -> None:
    (three / "step_00000040.tmp" / "template").mkdir(parents=True)
    (three / "latest.tmp").write_text("step_000")
    assert load(three) == (30, "weights of 30")
    assert sorted(path.name for path in three.iterdir()) == ["latest", "step_00000010", "step_00000020", "step_00000030"]


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(three: Path) -> None:
    manager = manager_of(three, keep=3)
    manager.load_latest(Shards())

    class Full(Shards):
        def fragments(self) -> list[Fragment]:
            raise OSError(errno.ENOSPC, "No space left on device", "rank_00000.safetensors")

    with pytest.raises(CheckpointError, match=r"No space left on device.*last complete checkpoint is .*00000030.*free space"):
        manager.save(40, Full("x"), {})
    assert not list(three.glob("*.tmp"))
    assert load(three) == (30, "weights of 30")


def test_an_error_of_torch_while_copying_is_explained_too(tmp_path: Path) -> None:
    class Broken(Shards):
        def fragments(self) -> list[Fragment]:
            raise RuntimeError("out of memory")

    with pytest.raises(CheckpointError, match=r"saving .*step_00000001 failed: out of memory; no checkpoint was complete before"):
        manager_of(tmp_path, keep=1).save(1, Broken(), {})


def test_a_state_that_json_cannot_hold_exactly_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        manager_of(tmp_path, keep=1).save(1, Shards("x"), {"loss": float("nan")})


def test_three_ranks_save_and_load_together(tmp_path: Path) -> None:
    def save(ranks: ThreadRanks) -> Path:
        return manager_of(tmp_path, ranks, keep=1).save(5, Shards(f"of rank {ranks.rank}", ranks.rank), {"rank": ranks.rank})

    def load_all(ranks: ThreadRanks) -> tuple[object, ...]:
        engine = Shards(rank=ranks.rank)
        found = manager_of(tmp_path, ranks, keep=1).load_latest(engine)
        return found and found.step, found and found.world_size, found and found.state, engine.text

    assert on_ranks(3, save) == [tmp_path / "step_00000005"] * 3
    assert on_ranks(3, load_all) == [(5, 3, {"rank": 0}, f"of rank {rank}") for rank in range(3)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_of_one_rank_is_the_same_error_on_all(tmp_path: Path, failing: int) -> None:
    class Fails(Shards):
        def fragments(self) -> list[Fragment]:
            if self.rank == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().fragments()

    results = on_ranks(3, lambda ranks: manager_of(tmp_path, ranks, keep=1).save(5, Fails("x", ranks.rank), {}))
    assert all(isinstance(result, CheckpointError) for result in results)
    assert len({str(result) for result in results}) == 1
    assert f"failed on rank {failing}: [Errno 28] No space left on device" in str(results[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["template/common.txt", "rank_00000.safetensors", "rank_00001.safetensors"])
def test_damage_that_one_rank_finds_moves_all_ranks_back(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        on_ranks(2, lambda ranks, step=step: manager_of(tmp_path, ranks, keep=2).save(step, Shards(f"{step}", ranks.rank), {}))
    flip(tmp_path / "step_00000002" / name)

    def load_all(ranks: ThreadRanks) -> str:
        engine = Shards(rank=ranks.rank)
        manager_of(tmp_path, ranks, keep=2).load_latest(engine)
        return engine.text

    assert on_ranks(2, load_all) == ["1", "1"]


def test_an_engine_that_refuses_a_sound_checkpoint_is_heard(three: Path) -> None:
    class Refuses(Shards):
        def load(self, stored: StoredState) -> None:
            raise CheckpointError("it was saved with world_size = 2")

    with pytest.raises(CheckpointError, match="world_size = 2"):
        manager_of(three, keep=3).load_latest(Refuses())


def test_a_snapshot_is_written_without_the_engine_and_the_other_ranks(tmp_path: Path) -> None:
    """The engine trains on, and is gone, before the snapshot reaches the disk, from a thread."""
    engine = Shards("before")
    values = engine.fragments()[0].values
    engine.fragments = lambda: [Fragment("text/0", (6,), 0, values)]  # type: ignore[method-assign]
    snapshot = take_snapshot(engine, 0, template)
    values.copy_(torch.frombuffer(bytearray(b"behind"), dtype=torch.uint8))
    del engine
    entries: list[FileRecord] = []
    thread = Thread(target=lambda: entries.extend(snapshot.write(tmp_path)))
    thread.start()
    thread.join(10)
    assert bytes(load_file(tmp_path / "rank_00000.safetensors")["text/0"].tolist()) == b"before"
    assert [entry.file for entry in entries] == ["rank_00000.safetensors", "rank_00000.json", "template/common.txt"]
    verify_files(tmp_path, entries)
