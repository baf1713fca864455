"""What a DeepSpeed file may add does what it says."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks

pytestmark = pytest.mark.slow


def write(directory: Path, **content: Any) -> str:
    path = directory / "file.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "contiguous_gradients": False, "reduce_scatter": False, "overlap_comm": True},
        {"stage": 1, "reduce_bucket_size": 500, "allgather_bucket_size": 500},
        {"stage": 2, "overlap_comm": True, "use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 3000},
        {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 100,
        },
        {"stage": 3, "sub_group_size": 2000, "overlap_comm": False},
        {"stage": 3, "stage3_model_persistence_threshold": 100, "stage3_max_reuse_distance": 0},
    ],
    ids=lambda zero: "-".join([str(zero["stage"]), *list(zero)[1:2]]),
)
def test_buckets_and_overlap_move_no_curve(zero: dict[str, Any], tmp_path: Path) -> None:
    run = {"steps": 8, "parts": 4, "ema": {"decay": 0.5}}
    file = write(tmp_path, zero_optimization=zero)
    scenarios = {
        "curves": ["curves", {"runs": [{**run, "deepspeed": "zero1"}, {**run, "deepspeed": file}]}],
        "views": ["views", {"deepspeed": file}],
        "resumed": ["resumed", {"deepspeed": file, "shards": str(tmp_path)}],
        "stable": ["stable_adamw", {"deepspeed": file}],
    }
    for rank in run_ranks("several", 2, tmp_path, scenarios=scenarios):
        assert rank["stable"]["error"] < 1e-5
        expected, found = rank["curves"]
        for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            assert [report[name] for report in found] == pytest.approx([report[name] for report in expected], rel=tolerance)
        assert rank["views"]["average_error"] < 1e-6
        assert rank["views"]["generation_error"] < 1e-5
        assert rank["views"]["unchanged"]
        assert rank["resumed"]["found"] == rank["resumed"]["expected"]
        assert rank["resumed"]["found_weights"] == rank["resumed"]["expected_weights"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_second_partition_of_parameters_moves_no_curve(precision: str, tmp_path: Path) -> None:
    file = write(tmp_path, zero_optimization={"stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0})
    run = {"steps": 8, "parts": 4, "precision": precision}
    scenarios = {
        "curves": ["curves", {"runs": [{**run, "deepspeed": name} for name in ("zero3", file, "zero3")]}],
        "resumed": ["resumed", {"deepspeed": file, "precision": precision, "shards": str(tmp_path)}],
    }
    for rank in run_ranks("several", 4, tmp_path, scenarios=scenarios):
        expected, found, afterwards = ([report["loss"] for report in curve] for curve in rank["curves"])
        assert found == pytest.approx(expected, rel=1e-6)
        assert afterwards == expected, "the groups of one engine are not those of the next"
        assert rank["resumed"]["found"] == rank["resumed"]["expected"]
        assert rank["resumed"]["found_weights"] == rank["resumed"]["expected_weights"]


@pytest.mark.parametrize(
    ("section", "printed"),
    [
        ({"flops_profiler": {"enabled": True, "profile_step": 2}}, "DeepSpeed Flops Profiler"),
        ({"comms_logger": {"enabled": True}}, "Comm. Op"),
        ({"wall_clock_breakdown": True}, "bwd_microstep"),
    ],
    ids=["flops", "comms", "clock"],
)
def test_profilers_print_what_they_measure(section: dict[str, Any], printed: str, tmp_path: Path) -> None:
    file = write(tmp_path, zero_optimization={"stage": 1}, **section)
    run_ranks("curve", 2, tmp_path, steps=3, parts=2, deepspeed=file)
    assert printed in (tmp_path / "curve_2_0.log").read_text()
