"""Sixteen bits: curves near fp32, faults, overflows, and a resume that is still exact."""

from pathlib import Path

import pytest

from tests.parallel.launch import run_ranks

others = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3")]


@pytest.mark.parametrize("name", ["zero1", *others])
def test_bf16_follows_fp32_stops_at_faults_and_resumes(name: str, tmp_path: Path) -> None:
    run = {"steps": 12, "parts": 2, "deepspeed": name}
    scenarios = {
        "curves": ["curves", {"runs": [{**run, "precision": precision} for precision in ("fp32", "bf16")]}],
        "loss": ["guarded", {"deepspeed": name, "precision": "bf16", "fault": "loss"}],
        "gradient": ["guarded", {"deepspeed": name, "precision": "bf16", "fault": "gradient"}],
        "resumed": ["resumed", {"deepspeed": name, "precision": "bf16", "shards": str(tmp_path)}],
    }
    for rank in run_ranks("several", 2, tmp_path, scenarios=scenarios):
        full, half = ([report["loss"] for report in curve] for curve in rank["curves"])
        assert half == pytest.approx(full, rel=0.02)
        assert half[-1] < 0.95 * half[0]
        assert half != full
        for guard in (rank["loss"], rank["gradient"]):
            assert guard["error"].startswith("step 2: ")
            assert guard["unchanged"]
        assert rank["resumed"]["found"] == rank["resumed"]["expected"]
        assert rank["resumed"]["found_weights"] == rank["resumed"]["expected_weights"]
