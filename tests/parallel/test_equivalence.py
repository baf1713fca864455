"""The same steps give the same curve under every ZeRO stage, on any number of ranks, in any number of micro-batches."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import means, run_ranks

STAGES = ["zero0", "zero1", "zero2", "zero3"]
STEPS = 12
ONE_RANK = [{"deepspeed": name, "parts": 4, "steps": STEPS} for name in STAGES]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """One rank: stages 0 to 3 in four micro-batches, then stages 1 and 2 in one."""
    runs = [*ONE_RANK, *({"deepspeed": name, "parts": 1, "steps": STEPS} for name in ("zero1", "zero2"))]
    found: list[list[dict[str, Any]]] = run_ranks("curves", 1, tmp_path_factory.mktemp("one"), runs=runs)[0]
    return found


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("learning_rate", 1e-15)):
        assert [report[name] for report in found] == pytest.approx([report[name] for report in expected], rel=tolerance), name
    assert [means(report)["nll"] for report in found] == pytest.approx([means(report)["nll"] for report in expected], rel=1e-5)
    assert [report["num_targets"] for report in found] == [report["num_targets"] for report in expected]
    assert [report["step"] for report in found] == list(range(1, len(expected) + 1))


def test_the_model_learns(curves: list[list[dict[str, Any]]]) -> None:
    assert curves[0][-1]["loss"] < 0.9 * curves[0][0]["loss"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_zero_stages_are_equal(curves: list[list[dict[str, Any]]], stage: int) -> None:
    assert_same_curve(curves[stage], curves[0])


@pytest.mark.parametrize("run", [4, 5])
def test_one_micro_batch_equals_four(curves: list[list[dict[str, Any]]], run: int) -> None:
    assert_same_curve(curves[run], curves[0])


def test_two_ranks_equal_one(curves: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    cluster = {"deepspeed": "zero1_cluster", "parts": 4, "steps": STEPS}
    for rank in run_ranks("curves", 2, tmp_path, runs=[*ONE_RANK, cluster]):
        for found in rank:
            assert_same_curve(found, curves[0])
    assert not (tmp_path / "compiled").exists(), "nothing is compiled on the CPU"
    assert [log.read_text() for log in tmp_path.glob("*.log")] == ["", ""], "DeepSpeed keeps quiet"


def test_four_ranks_equal_one(curves: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    for rank in run_ranks("curves", 4, tmp_path, runs=[{"deepspeed": "zero1", "parts": 4, "steps": STEPS}]):
        assert_same_curve(rank[0], curves[0])


@pytest.mark.slow
def test_four_ranks_equal_one_under_every_stage(curves: list[list[dict[str, Any]]], tmp_path: Path) -> None:
    runs = [{"deepspeed": name, "parts": parts, "steps": STEPS} for name in STAGES for parts in (4, 8)]
    for rank in run_ranks("curves", 4, tmp_path, runs=runs):
        for found in rank:
            assert_same_curve(found, curves[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero1_offload", "zero2_offload", "zero3_offload"])
def test_offloading_moves_no_curve(curves: list[list[dict[str, Any]]], name: str, tmp_path: Path) -> None:
    for rank in run_ranks("curves", 2, tmp_path, runs=[{"deepspeed": name, "parts": 4, "steps": STEPS}]):
        assert_same_curve(rank[0], curves[0])
