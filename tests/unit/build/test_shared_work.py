"""Work under a launcher: who does what, who finishes, and what a launcher cannot be told. Real ranks: e2e/test_logits.py."""

from __future__ import annotations

import pytest

from dstrain.build.shared_work import Task, do_work
from dstrain.errors import DataError, TrainingError
from dstrain.storage.sharded_job import Worker


@pytest.mark.parametrize(("share", "finishes"), [(Worker(0, 1), True), (Worker(0, 2), False), (Worker(1, 2), False)])
def test_without_a_launcher_it_is_the_share_itself(share: Worker, finishes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    tasks: list[Task] = []

    def work(task: Task) -> str:
        tasks.append(task)
        return "done"

    lines: list[str] = []
    assert do_work(share, "cpu", work, lines.append) is finishes
    assert tasks == [Task(share, "cpu")]
    assert lines == ["done"]


def test_one_device_is_not_for_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"--device cuda:1 is one device, but every rank needs its own; use --device cuda"):
        do_work(Worker(0, 1), "cuda:1", lambda task: "", print)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(TrainingError, match=r"WORLD_SIZE='two' in the environment is not a number"):
        do_work(Worker(0, 1), "cpu", lambda task: "", print)
