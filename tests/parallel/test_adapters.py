"""Adapters train alike under every ZeRO stage and on any number of ranks, leave the base as it was, and resume bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks

MODELS = [{"factorized": False}, {"factorized": True, "dora": True, "bias": "lora_only"}]
STEPS = 4
Runs = list[dict[str, Any]]


def runs(*stages: str) -> Runs:
    return [{"deepspeed": stage, "model": model} for model in MODELS for stage in stages]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both models under stages 0 to 3, one process."""
    stages = ("zero0", "zero1", "zero2", "zero3")
    found: Runs = run_ranks("adapted_curves", 1, tmp_path_factory.mktemp("one"), runs=runs(*stages), steps=STEPS)[0]
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        curves = [[report[name] for report in run["reports"]] for run in (found, expected)]
        assert curves[0] == pytest.approx(curves[1], rel=tolerance), name
    assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
    assert found["logits"] == pytest.approx(expected["logits"], rel=1e-4, abs=1e-4)


def test_only_adapters_are_trained_and_gathered(one_rank: Runs) -> None:
    plain, dora = one_rank[0], one_rank[4]
    for run in one_rank:
        assert run["kept"]
        assert run["moved"]
    assert all(name.rpartition(".")[2] in {"lora_a", "lora_b"} for name in plain["names"])
    assert "source_embedding.tokens.lora_b" in plain["names"]
    assert not any(name.startswith(("projection", "target_embedding")) for name in plain["names"]), "one adapter for tied tables"
    assert not any(".layers.1." in name for name in plain["names"]), "one adapter for a layer that runs twice"
    assert {name.rpartition(".")[2] for name in dora["names"]} == {"lora_a", "lora_b", "lora_magnitude", "bias"}
    assert "encoder.layers.0.self_attention.q_proj.bias" in dora["names"]
    assert not any("norm" in name for name in dora["names"])


def test_the_adapters_learn(one_rank: Runs) -> None:
    for run in one_rank:
        assert run["reports"][-1]["loss"] < run["reports"][0]["loss"]


@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_zero_stages_are_equal(one_rank: Runs, model: int, stage: int) -> None:
    assert_same(one_rank[4 * model + stage], one_rank[4 * model])


def test_two_ranks_equal_one(one_rank: Runs, tmp_path: Path) -> None:
    for rank in run_ranks("adapted_curves", 2, tmp_path, runs=runs("zero0", "zero2", "zero3"), steps=STEPS):
        for number, found in enumerate(rank):
            assert_same(found, one_rank[0 if number < 3 else 4])


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [
        (2, "zero3"),
        pytest.param(1, "zero0", marks=pytest.mark.slow),
        pytest.param(2, "zero1", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(world_size: int, stage: str, tmp_path: Path) -> None:
    ranks = run_ranks("adapted_resume", world_size, tmp_path, shards=str(tmp_path), deepspeed=stage)
    for rank in ranks:
        assert rank["found"] == rank["expected"]
        assert rank["same"]
    assert ranks[0]["averaged_apart"]
    assert ranks[0]["stored"] == ranks[0]["trained"] != [], "no frozen weight is in a checkpoint"


def test_another_base_is_refused(tmp_path: Path) -> None:
    for said in run_ranks("other_base", 2, tmp_path, shards=str(tmp_path)):
        assert (
            f"was saved with base = {'f' * 64}, but this run has base = {'0' * 64}; resume with the settings it was saved with"
            in said
        )
