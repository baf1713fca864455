"""The bench that prints what is promised of memory and of bytes, on a small scale."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


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
