"""kill -9 and a full disk at every file operation of a save: what is found afterwards is whole.

Children are forked. An audit hook counts their file operations and ends the process, or fails the operation, at a given one.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dstrain.checkpoint.manager import CheckpointManager
from dstrain.errors import CheckpointError
from dstrain.fragment import Fragment, StoredState
from dstrain.storage.hashing import HashingWriter
from tests.unit.training.fakes import ONE_PROCESS

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}
KILLED = 137


class Blocks:
    """An engine with several tensors, and a template of several files."""

    layout = "1 rank"

    def __init__(self, number: int = 0, size: int = 100) -> None:
        self.number, self.size = number, size

    def fragments(self) -> list[Fragment]:
        values = torch.full((self.size,), self.number)
        return [Fragment(f"master/{name}", (self.size,), 0, values) for name in "abc"]

    def scalars(self) -> dict[str, int]:
        return {"number": self.number}

    def load(self, stored: StoredState) -> None:
        numbers = {number for values in stored.whole("master").values() for number in values.tolist()}
        self.number = stored.scalars["number"]
        assert numbers == {self.number}, f"tensors of different saves: {numbers}"

    def sync(self) -> None:
        pass


def template(directory: Path) -> None:
    (directory / "tokenizer").mkdir()
    for name in ("model.yaml", "tokenizer/vocabulary"):
        (directory / name).write_text(name)


@pytest.fixture(autouse=True)
def _blocks_are_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a file of tensors counts as an operation, so that a kill can fall between two of them."""

    write_at_once = HashingWriter.write

    def write(self: HashingWriter, data: bytes | memoryview) -> int:
        self._file.flush()
        sys.audit("os.remove", "before a block", -1)
        return write_at_once(self, data)

    monkeypatch.setattr(HashingWriter, "write", write)


def in_child(action: Callable[[], int]) -> int:
    """Exit code of a forked child that runs `action`."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_operation(number: int, strike: Callable[[], None]) -> None:
    """Let `strike` happen right before the child's file operation `number` (from 1)."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS:
            count += 1
            if count == number:
                strike()

    sys.addaudithook(hook)


def manager_of(directory: Path, keep: int = 1) -> CheckpointManager:
    return CheckpointManager(directory, ONE_PROCESS, keep=keep, run_id="run", template=template)


def save(directory: Path, number: int) -> None:
    manager_of(directory).save(number, Blocks(number), {"number": number})


def found(directory: Path) -> int | None:
    """The number that a fresh start finds; shards and state agree."""
    engine = Blocks()
    checkpoint = manager_of(directory).load_latest(engine)
    if checkpoint is None:
        return None
    assert checkpoint.state == {"number": engine.number}
    return engine.number


@pytest.mark.parametrize("before", [None, 1], ids=["first save", "second save"])
def test_a_kill_at_every_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, before: int | None) -> None:
    seen = []
    for operation in range(1, 200):
        directory = tmp_path / str(operation)
        if before is not None:
            save(directory, before)

        def child(directory: Path = directory, operation: int = operation) -> int:
            at_operation(operation, lambda: os._exit(KILLED))
            save(directory, 2)
            return 0

        code = in_child(child)
        seen.append(found(directory))
        assert seen[-1] in {before, 2}
        save(directory, 3)
        assert found(directory) == 3
        assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000003"]
        if code == 0:
            break
        assert code == KILLED
    assert code == 0, "the save never came to its end"
    assert len(seen) > 15
    assert seen[0] == before
    assert seen[-1] == 2


def test_a_full_disk_at_every_operation_of_a_save_is_one_clear_error(tmp_path: Path) -> None:
    codes = []
    for operation in range(1, 200):
        directory = tmp_path / str(operation)
        save(directory, 1)

        def child(directory: Path = directory, operation: int = operation) -> int:
            struck = False

            def strike() -> None:
                nonlocal struck
                struck = True
                raise OSError(errno.ENOSPC, "No space left on device")

            at_operation(operation, strike)
            try:
                save(directory, 2)
            except CheckpointError as error:
                return 1 if "No space left on device" in str(error) else 98
            return 2 if struck else 0

        codes.append(in_child(child))
        assert codes[-1] in {0, 1, 2}, f"operation {operation}"
        assert found(directory) in ({1, 2} if codes[-1] == 1 else {2})
        save(directory, 3)
        assert found(directory) == 3
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert codes.count(1) > 10


def test_kill_9_at_random_moments_of_endless_saving(tmp_path: Path) -> None:
    moments = random.Random(1)
    last = 0

    def child() -> int:
        engine = Blocks(size=20_000)
        manager = CheckpointManager(tmp_path, ONE_PROCESS, keep=2, run_id="run")
        manager.load_latest(engine)
        while True:
            engine.number += 1
            manager.save(engine.number, engine, {"number": engine.number})

    for _ in range(15):
        pid = os.fork()
        if pid == 0:
            try:
                child()
            finally:
                os._exit(99)
        time.sleep(moments.uniform(0.02, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        now = found(tmp_path) or 0
        assert now >= last
        last = now
    assert last > 5
