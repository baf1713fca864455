"""Losses that are no sum over tokens, and rates that differ by tensor: no stage, rank or cut into micro-batches moves a curve."""

from typing import Any

import pytest

from tests.parallel.launch import means, run_ranks
from tests.parallel.test_equivalence import STAGES, assert_same_curve

STABLE: dict[str, Any] = {"steps": 4, "optimizer": {"kind": "stable_adamw", "weight_decay": 0.1, "eps": 1e-6}}
SENTENCES: dict[str, Any] = {"steps": 4, "objective": {"average": "sentences"}}
R_DROP: dict[str, Any] = {"steps": 4, "dropout": 0.3, "objective": {"average": "sentences", "r_drop": {"alpha": 5.0}}}
KINDS = [{**kind, "parts": 4, "deepspeed": name} for kind in (STABLE, SENTENCES, R_DROP) for name in STAGES]
Curves = list[list[dict[str, Any]]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    """One rank: each kind under stages 0 to 3 in four micro-batches, then sentences in one and in twelve."""
    runs = [*KINDS, *({**SENTENCES, "parts": parts, "deepspeed": "zero1"} for parts in (1, 12))]
    found: Curves = run_ranks("curves", 1, tmp_path_factory.mktemp("alone"), runs=runs)[0]
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Curves]:
    """The same on two ranks, without the last two."""
    return run_ranks("curves", 2, tmp_path_factory.mktemp("together"), runs=KINDS)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["stable", "sentences", "r_drop"])
def test_all_zero_stages_are_equal(alone: Curves, together: list[Curves], kind: int) -> None:
    """With dropout, too: a step's masks depend on the rank, but not on the stage."""
    for curves in (alone, *together):
        for found in curves[4 * kind + 1 : 4 * kind + 4]:
            assert_same_curve(found, curves[4 * kind])


@pytest.mark.parametrize("kind", [0, 1], ids=["stable", "sentences"])
def test_two_ranks_equal_one(alone: Curves, together: list[Curves], kind: int) -> None:
    for curves in together:
        assert_same_curve(curves[4 * kind], alone[4 * kind])


@pytest.mark.parametrize("run", [-2, -1])
def test_the_cut_into_micro_batches_moves_no_mean_over_sentences(alone: Curves, run: int) -> None:
    assert_same_curve(alone[run], alone[4])


def test_each_kind_learns_and_differs_from_the_others(alone: Curves) -> None:
    for curve in (alone[0], alone[4], alone[8]):
        assert curve[-1]["loss"] < 0.99 * curve[0]["loss"]
    assert alone[0][0]["loss"] != pytest.approx(alone[4][0]["loss"], rel=1e-4)
    assert means(alone[4][0])["nll"] == pytest.approx(means(alone[0][0])["nll"], rel=1e-5), "what is per token stays so"
    assert {report["denominator"] for report in alone[4]} == {12}
    assert [report["denominator"] for report in alone[0]] == [report["num_targets"] for report in alone[0]]


def test_the_divergence_is_reported_separately(alone: Curves, together: list[Curves]) -> None:
    for curves in (alone, *together):
        divergences = [[means(report)["kl"] for report in curve] for curve in curves[8:12]]
        assert min(divergences[0]) > 0
        for found in divergences[1:]:
            assert found == pytest.approx(divergences[0], rel=1e-4)
    assert all(set(means(report)) == {"nll"} for report in alone[4])
