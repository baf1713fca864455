"""The benches that print what is promised of memory, bytes and a GPU's speed, on a small scale."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the resident memory is read from Linux's /proc")
def test_distillation_prints_its_memory_and_its_bytes() -> None:
    command = [sys.executable, ROOT / "tools" / "bench_kd.py", "--tokens", "1024", "--vocab-size", "8192", "--chunk-tokens", "32"]
    run = subprocess.run([*command, "--limit-percent", "15"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    memory = {way: float(share) for way, share in re.findall(r"^(\w+) +\d+ MiB +([\d.]+)%", run.stdout, re.MULTILINE)}
    assert memory.pop("naive") == 100
    assert set(memory) == {"dense", "sampled", "top", "cross_entropy"}
    assert max(memory.values()) < 15
    size = {
        name: float(size) for name, size in re.findall(r"^(.+?)  .* entries +([\d.]+) bytes a token", run.stdout, re.MULTILINE)
    }
    assert 20 < size["sampled, 50 draws"] <= 40
    assert 180 < size["top 64"] <= 200


GPU_ROWS = {
    *(f"{shape}_{way}" for shape in ("big_4k", "big_32k", "deep_16k", "lm_125m", "lm_1300m") for way in ("kernels", "plain")),
    *("kd_online", "kd_stored", "kd_on_policy", "generation", "random_shapes"),
}


def test_the_bench_of_a_gpu_runs_every_row_at_toy_size() -> None:
    command = [sys.executable, ROOT / "tools" / "bench_gpu.py", "--steps", "1", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {row.pop("row"): row for row in map(json.loads, filter(lambda line: line.startswith("{"), run.stdout.splitlines()))}
    assert rows.keys() >= GPU_ROWS
    for row in rows.values():
        assert row["tokens_per_second"] > 0
        assert row["gib"] > 0
        assert "mfu" not in row, "of a CPU no peak is known"
