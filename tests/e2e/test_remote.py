"""A run on data in a store that fails halfway ends with one message; the same command goes on to the losses of a local run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.support import RECIPE, SMALL_DATA, SMALL_TRAINING, Ranks, curve, dstrain, events, settings, succeeds

DATA = (*SMALL_DATA, "data.pairs_per_shard=3")  # 80 shards: so many are fetched when they are touched, not at the start
NEAR = "batching={tokens_per_step: 300, max_tokens: 400, shuffle_window: 20, shuffle: {kind: shard_window, shards: 4}}"


def train(run: Path, data: Path | str, log: Path) -> Ranks:
    chosen = settings(*DATA, *SMALL_TRAINING, NEAR)
    return Ranks(["train", RECIPE, "--data", data, "--output", run, "--device", "cpu", *chosen], 2, log)


@pytest.mark.slow
def test_a_store_that_fails_halfway_and_the_same_command_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    monkeypatch.setenv("DSTRAIN_CACHE", str(cache))
    succeeds(dstrain("prepare", RECIPE, "--output", data, "--workers", "1", *settings(*DATA)))
    whole = train(tmp_path / "whole", data, tmp_path / "whole.log")
    assert whole.wait() == [0, 0], whole.output()

    shard = data / "train/00040.arrow"
    content = shard.read_bytes()
    shard.unlink()
    run, url = tmp_path / "run", f"file://{data}"
    broken = train(run, url, tmp_path / "broken.log")
    assert broken.wait() == [1, 1], broken.output()
    assert f"{url}/train/00040.arrow cannot be read" in broken.output()
    assert "Traceback" not in broken.output()
    assert not any(path.suffix == ".part" for path in cache.rglob("*"))
    assert len(events(run, "end")) == 0

    shard.write_bytes(content)
    for other in (data / "train").glob("*.arrow"):  # what was fetched is not asked for again
        if any(cache.rglob(f"train/{other.name}")):
            other.unlink()
    again = train(run, url, tmp_path / "again.log")
    assert again.wait() == [0, 0], again.output()
    assert curve(run) == curve(tmp_path / "whole")
