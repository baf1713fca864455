"""Sixteen bits: curves near fp32, faults, overflows, and a resume that is still exact."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks
from tests.paths import ROOT

others = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3")]


@pytest.mark.parametrize("name", ["zero1", *others])
def test_bf16_follows_fp32_stops_at_faults_and_resumes(name: str, tmp_path: Path) -> None:
    run = {"steps": 12, "parts": 2, "deepspeed": name}
    scenarios = {
        "curves": ["curves", {"runs": [{**run, "precision": precision} for precision in ("fp32", "bf16")]}],
        "loss": ["guarded", {"deepspeed": name, "precision": "bf16", "fault": "loss"}],
        "gradient": ["guarded", {"deepspeed": name, "precision": "bf16", "fault": "gradient"}],
        "resumed": ["resumed", {"deepspeed": name, "precision": "bf16", "shards": str(tmp_path)}],
        "start": ["masters_at_start", {"deepspeed": name}],
    }
    for rank in run_ranks("several", 2, tmp_path, scenarios=scenarios):
        full, half = ([report["loss"] for report in curve] for curve in rank["curves"])
        assert rank["start"], "the fp32 masters must be the weights themselves, not their bf16 roundings"
        assert half == pytest.approx(full, rel=0.02)
        assert half[-1] < 0.95 * half[0]
        assert half != full
        for fault, message in (("loss", "the loss is nan; "), ("gradient", "gradient")):
            assert message in rank[fault]["error"]
            assert rank[fault]["unchanged"]
        assert rank["resumed"]["found"] == rank["resumed"]["expected"]
        assert rank["resumed"]["found_weights"] == rank["resumed"]["expected_weights"]


def test_bf16_is_alike_under_every_stage_and_adds_up_in_fp32(tmp_path: Path) -> None:
    """64 times a 64th of a gradient is the gradient: fp32 holds the sums on the way. bf16 does not: of its 257th addend less than
    a digit fits, so 320 show it.
    """
    rough = tmp_path / "rough.json"
    rough.write_text(json.dumps({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}}))
    runs = [{"steps": 12, "parts": 4, "precision": "bf16", "deepspeed": name} for name in ("zero1", "zero2", "zero3")]
    scenarios = {
        "repeated": ["repeated", {"files": ["zero1", "zero2", "zero3"], "precision": "bf16"}],
        "rough": ["repeated", {"files": [str(rough)], "precision": "bf16", "times": 320}],
        "curves": ["curves", {"runs": runs}],
        "dtypes": ["gradient_dtypes", {"files": ["zero1", "zero2", str(rough)]}],
        "linear": ["linear_map", {}],
    }
    (rank,) = run_ranks("several", 1, tmp_path, scenarios=scenarios)
    for one, many in rank["repeated"]:
        assert many == pytest.approx(one, rel=1e-6)
    (rounded,) = rank["rough"]
    assert rounded[1] != pytest.approx(rounded[0], rel=5e-3)
    for name in ("loss", "grad_norm"):
        first, second, third = ([report[name] for report in curve] for curve in rank["curves"])
        assert third == pytest.approx(second, rel=1e-6), name
        # ZeRO-1 takes each gradient in fp32, the others round it to bf16.
        assert first == pytest.approx(second, rel=2e-3), name
    assert rank["dtypes"] == {"zero1": ["torch.float32"], "zero2": ["torch.bfloat16"], "rough": ["torch.bfloat16"]}
    assert rank["linear"]


@pytest.mark.parametrize("name", ["zero1", *others])
def test_fp16_skips_overflows_and_goes_on(name: str, tmp_path: Path) -> None:
    """A loss scale of 2**24 overflows until it has been halved often enough; skipped steps change nothing and do not count."""
    content = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    content["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    path = tmp_path / "scaled.json"
    path.write_text(json.dumps(content))
    run: dict[str, Any] = {"steps": 20, "parts": 2, "deepspeed": str(path)}
    scenarios = {
        "refusal": ["fp16_refusal", {}],
        "curve": ["fp16_curve", run],
        "resumed": ["resumed", {"deepspeed": str(path), "precision": "fp16", "shards": str(tmp_path)}],
    }
    (rank,) = run_ranks("several", 1, tmp_path, scenarios=scenarios)
    assert rank["refusal"] == "engine.precision = fp16 is not supported by this cpu; use fp32, bf16"
    skipped = [report["skipped"] for report in rank["curve"]]
    count = sum(skipped)
    assert 2 < count < 12
    assert skipped[:2] == [True, True]
    assert [report["step"] for report in rank["curve"] if not report["skipped"]] == list(range(1, 21 - count))
    assert {report["step"] for report in rank["curve"][:2]} == {1}
    assert all(math.isinf(report["grad_norm"]) == report["skipped"] for report in rank["curve"])
    assert rank["curve"][-1]["loss"] < 0.95 * rank["curve"][0]["loss"]
    assert rank["resumed"]["found"] == rank["resumed"]["expected"]


def test_three_ranks_share_weights_whose_sizes_they_do_not_divide(tmp_path: Path) -> None:
    """Under ZeRO-3 each share is padded; the masters of 16-bit training start from the whole weights all the same."""
    assert run_ranks("masters_at_start", 3, tmp_path, deepspeed="zero3") == [True, True, True]
