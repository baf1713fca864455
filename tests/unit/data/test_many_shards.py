"""A data set of 10,000 shards: opened in a moment, little memory, few files open at a time."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dstrain.data.prepared.dataset import open_dataset
from dstrain.storage import document, mapped_shards
from dstrain.storage.hashing import sha256_of_file
from tests.paths import ROOT
from tools.bench_shards import make

SHARDS = 10_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "data"
    make(folder, SHARDS, rows=3)
    return folder


def test_opening_takes_seconds_and_little_memory(data: Path) -> None:
    command = [sys.executable, ROOT / "tools/bench_shards.py", "--data", data, "--read", "2000", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200, cwd=ROOT)
    figures = json.loads(result.stdout)
    assert figures["shards"] == SHARDS
    assert figures["open_cpu_seconds"] < 2
    assert figures["open_mib"] < 100
    assert figures["peak_mib"] - figures["start_mib"] < 200


def test_opening_hashes_no_shard_and_1024_open_files_are_enough(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(document, "sha256_of_file", lambda path: (hashed.append(path.name), sha256_of_file(path))[1])
    split = open_dataset(data, "train")
    assert hashed == ["lengths.npy"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, soft), hard))
    try:
        rows = split.read(1, np.arange(0, 3 * 1500, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(rows) == len(hashed) - 1 == 1500
    assert len({tuple(row.target) for row in rows}) == 1  # the shards are links to one
    del rows
    assert len([line for line in Path("/proc/self/maps").read_text().splitlines() if str(data / "train/0") in line]) <= (
        mapped_shards.MAX_OPEN_SHARDS
    )
