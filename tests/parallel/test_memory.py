"""A rank holds its share of a model, not the model: peak host memory from construction to the end of the first step."""

import json
import os
import subprocess
import sys

import pytest

from tests.paths import ROOT


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_a_rank_never_holds_the_whole_model(precision: str) -> None:
    """63 million parameters on two ranks under the shipped zero3; `tools/peak_memory.py` defines the figures.

    Building holds no optimizer moments yet, which the first step makes, so it needs less than the share by itself.
    """
    command = [sys.executable, str(ROOT / "tools/peak_memory.py"), "--precision", precision]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["parameters"] > 60e6
        assert rank["peak"] <= 1.35 * (rank["share"] + rank["largest"]), rank
        assert rank["built"] <= rank["share"], rank
