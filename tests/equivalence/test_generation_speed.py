"""Beam search is at least 1.5 times as fast as Transformers' `generate` on the same shape, side by side in one process."""

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.slow
def test_beam_search_beats_transformers_by_half() -> None:
    command = [sys.executable, "tools/bench_generate.py", "--sentences", "128", "--rounds", "3", "--at-least", "1.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ratio" in result.stdout
