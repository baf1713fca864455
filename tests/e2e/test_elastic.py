"""A run goes on with sequence ranks, another ZeRO stage and other reports; its checkpoints become bundles without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, dstrain, events, fails, settings, succeeds

CHOSEN = settings(*SMALL_DATA, *SMALL_TRAINING, "model.dropout=0.0", "training.ema={decay: 0.8}")


def train(run: Path, data: Path, num_ranks: int, *overrides: str) -> str:
    words = ["train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *CHOSEN, *settings(*overrides)]
    ranks = Ranks(words, num_ranks, run.with_suffix(".log"))
    assert ranks.wait() == [0] * num_ranks, ranks.output()
    return ranks.output()


def test_a_run_continues_on_sequence_ranks_and_its_checkpoint_becomes_the_same_bundle(data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, data, 1)
    train(broken, data, 1, "training.max_steps=7")
    moved = train(broken, data, 2, "engine={deepspeed: zero3, parallel: {sequence: 2}}", "checkpoint.keep_bundles=2")
    line = next(line for line in moved.splitlines() if "resuming" in line)
    assert "resuming at step 7 from " in line
    assert line.endswith(
        ": 1 rank zero1 fp32 -> 2 ranks sequence 2 zero3 fp32; checkpoint.keep_bundles: 3 -> 2; "
        "engine.parallel.sequence: 1 -> 2; training.max_steps: 7 -> 14"
    )
    (resume,) = events(broken, "resume")
    assert (resume["layout_before"], resume["layout"]) == ("1 rank zero1 fp32", "2 ranks sequence 2 zero3 fp32")
    found, expected = (events(run, "train") for run in (broken, whole))
    assert [(event["step"], event["num_targets"]) for event in found] == [(e["step"], e["num_targets"]) for e in expected]
    assert [event["loss"] for event in found[:7]] == [event["loss"] for event in expected[:7]]
    assert [event["loss"] for event in found] == pytest.approx([event["loss"] for event in expected], rel=1e-5)

    for run in (whole, broken):
        (checkpoint,) = (run / "checkpoints").glob("step_00000014")
        moved_away = tmp_path / f"{run.name}_checkpoint"
        shutil.move(checkpoint, moved_away)
        done = succeeds(dstrain("consolidate", moved_away, "--output", tmp_path / f"{run.name}_bundle"))
        assert done.stdout.startswith("averaged weights of ")
        for path in (run / "bundles" / "last").rglob("*"):
            twin = tmp_path / f"{run.name}_bundle" / path.relative_to(run / "bundles" / "last")
            assert path.is_dir() or path.name == "recipe.yaml" or path.read_bytes() == twin.read_bytes(), path
        shutil.move(moved_away, checkpoint)


def test_what_decides_the_result_is_refused_with_its_key(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, data, 1, "training.max_steps=3")
    words = ["train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *CHOSEN]
    message = fails(
        dstrain(*words, *settings("engine.clip_norm=0.5", "engine.precision=bf16")), "was started with another recipe"
    )
    assert "-> 0.5 (clips other gradients)" in message
    assert "engine.precision" not in message
    other = tmp_path / "other"
    train(other, data, 1, "training.max_steps=4")
    shutil.copytree(other / "checkpoints" / "step_00000004", run / "checkpoints" / "step_00000004")
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    fails(dstrain(*words), f"{run}/checkpoints/step_00000004 was written by run ", "move it out of the folder")
