"""Bundles of a run appear whole, share their files, and survive a kill between any two operations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.errors import TrainingError
from dstrain.training.bundles import BundleStore, step_bundles
from tests.unit.checkpoint.ranks import ThreadRanks, on_ranks
from tests.unit.checkpoint.test_kill import KILLED, at_operation, in_child
from tests.unit.training.fakes import ONE_PROCESS, save_bundle


def store(directory: Path, value: float = 0.0, ranks: Any = ONE_PROCESS, keep: int = 2) -> BundleStore:
    weights = {"w": torch.tensor(value)} if ranks.rank == 0 else None
    return BundleStore(directory, ranks, gather=lambda: weights, save=save_bundle, keep=keep)


def content(directory: Path) -> str:
    return (directory / "weight.json").read_text()


def test_names_due_together_share_their_files(tmp_path: Path) -> None:
    store(tmp_path, 1.0).write(["step_00000010", "best", "last"], {"step": 10})
    assert content(tmp_path / "best") == content(tmp_path / "last") == '{"weight": 1.0, "step": 10}'
    assert (tmp_path / "best" / "weight.json").samefile(tmp_path / "step_00000010" / "weight.json")
    store(tmp_path, 2.0).write(["last"], {"step": 20})
    assert content(tmp_path / "best") == '{"weight": 1.0, "step": 10}', "replacing one name must not touch another"
    assert content(tmp_path / "last") == '{"weight": 2.0, "step": 20}'


def test_the_newest_steps_stay_in_the_order_of_numbers(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 20):
        store(tmp_path, keep=3).write([f"step_{step:08d}"], {"step": step})
    assert [path.name for path in step_bundles(tmp_path)] == ["step_00000005", "step_00000020", "step_100000000"]
    store(tmp_path, keep=2).write(["step_100000001"], {"step": 1})
    assert [path.name for path in step_bundles(tmp_path)] == ["step_100000000", "step_100000001"]


def test_a_kill_at_every_operation_leaves_whole_bundles(tmp_path: Path) -> None:
    for operation in range(1, 200):
        directory = tmp_path / str(operation)
        store(directory, 1.0).write(["step_00000001", "best"], {})

        def child(directory: Path = directory, operation: int = operation) -> int:
            at_operation(operation, lambda: os._exit(KILLED))
            store(directory, 2.0).write(["step_00000002", "best"], {})
            return 0

        code = in_child(child)
        store(directory).recover()
        names = sorted(path.name for path in directory.iterdir())
        assert names in (["best", "step_00000001"], ["best", "step_00000001", "step_00000002"])
        assert content(directory / "best") in ('{"weight": 1.0}', '{"weight": 2.0}')
        if code == 0:
            break
        assert code == KILLED
    assert code == 0
    assert operation > 10
    assert content(directory / "best") == '{"weight": 2.0}'


def test_file_systems_without_hard_links_get_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Any, **options: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store(tmp_path, 1.0).write(["last", "best"], {})
    assert content(tmp_path / "best") == content(tmp_path / "last") == '{"weight": 1.0}'


def test_only_rank_0_writes_and_a_failure_reaches_all(tmp_path: Path) -> None:
    on_ranks(3, lambda ranks: store(tmp_path, 1.0, ranks).write(["last"], {}))
    assert content(tmp_path / "last") == '{"weight": 1.0}'

    def fails(ranks: ThreadRanks) -> None:
        def full(directory: Path, weights: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
            raise OSError(28, "No space left on device")

        broken = store(tmp_path, 2.0, ranks)
        broken._save = full
        broken.write(["last"], {})

    errors = on_ranks(3, fails)
    assert all(isinstance(error, TrainingError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "No space left on device" in str(errors[2])
    assert content(tmp_path / "last") == '{"weight": 1.0}'
