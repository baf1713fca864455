"""One engine under each ZeRO stage: weights as others see them, faults, empty micro-batches, torch's own loop."""

from typing import Any

import pytest


def test_gathered_weights_are_those_that_train(ranks: list[dict[str, Any]]) -> None:
    for views in (rank["views"] for rank in ranks):
        assert views["names"]
        assert views["plain_loss"] == pytest.approx(views["loss"], rel=1e-6)
        assert views["training"]


def test_average_equals_a_plain_loop(ranks: list[dict[str, Any]]) -> None:
    for views in (rank["views"] for rank in ranks):
        assert views["average_error"] < 1e-6
        assert views["moved"] > 1e-3
        assert views["average_loss"] == pytest.approx(views["plain_average_loss"], rel=1e-6)
        assert views["average_loss"] != pytest.approx(views["loss"], rel=1e-3)


def test_looking_at_the_average_changes_nothing(ranks: list[dict[str, Any]]) -> None:
    for views in (rank["views"] for rank in ranks):
        assert views["loss_afterwards"] == views["loss"]
        assert views["unchanged"]


def test_generation_sees_whole_weights_for_any_number_of_steps(ranks: list[dict[str, Any]]) -> None:
    for views in (rank["views"] for rank in ranks):
        assert views["generation_error"] < 1e-5
        assert views["average_generation_error"] < 1e-5


def test_empty_micro_batches_add_exactly_nothing(ranks: list[dict[str, Any]]) -> None:
    for empty in (rank["empty"] for rank in ranks):
        assert empty["with"] == empty["without"]
        assert empty["same_weights"]


def test_micro_batches_and_ranks_with_different_names_report_all_of_them(ranks: list[dict[str, Any]]) -> None:
    for mixed in (rank["mixed"] for rank in ranks):
        assert len(mixed["expected"]["sums"]) > 1
        assert mixed["found"]["counts"] == mixed["expected"]["counts"]
        assert mixed["found"]["sums"] == pytest.approx(mixed["expected"]["sums"], rel=1e-5)


def test_clipping_and_decay_groups_equal_torch(ranks: list[dict[str, Any]]) -> None:
    for torch_loop in (rank["torch"] for rank in ranks):
        found, expected = zip(*torch_loop["norms"], strict=True)
        assert found == pytest.approx(expected, rel=1e-4)
        assert min(expected[1:]) < 1.2 < max(expected), "the clip must matter, and not always"
        assert torch_loop["error"] < 1e-5


def test_stable_adamw_equals_a_loop_over_tensors_while_gradients_jump(ranks: list[dict[str, Any]]) -> None:
    for stable in (rank["stable"] for rank in ranks):
        found, expected = zip(*stable["norms"], strict=True)
        assert found == pytest.approx(expected, rel=1e-4)
        assert stable["largest"] > 2, "the gradients must outgrow their second moment; after n steps by at most sqrt(n)"
        assert stable["error"] < 1e-5
        assert stable["error_without_clipping"] > 0.02


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_fault_on_one_rank_stops_all_before_any_update(ranks: list[dict[str, Any]], fault: str) -> None:
    for guard in (rank[fault] for rank in ranks):
        assert ("the loss is nan" if fault == "loss" else "gradient") in guard["error"]
        assert "lower the learning rate" in guard["error"]
        assert guard["step"] == 1
        assert guard["unchanged"]


@pytest.mark.parametrize("scenario", ["resumed", "stable_resumed"])
def test_resume_is_bit_exact(ranks: list[dict[str, Any]], scenario: str) -> None:
    """Saved after two steps and continued by another engine: the same reports and the same weights."""
    for resumed in (rank[scenario] for rank in ranks):
        assert resumed["found"] == resumed["expected"]
        assert resumed["found_weights"] == resumed["expected_weights"]
    weights, average = ranks[0][scenario]["found_weights"]
    assert weights != average


def test_a_step_is_read_once(request: pytest.FixtureRequest, ranks: list[dict[str, Any]]) -> None:
    """Losses, metrics and norm in one copy, also by DeepSpeed; but for offloaded gradients, whose norms it reads one by one."""
    if "offload" in request.node.name:
        pytest.skip("DeepSpeed reads the norm of each offloaded gradient")
    for rank in ranks:
        for optimizer, reads in rank["readings"].items():
            assert len(reads) == 1, f"{optimizer}: {reads}"
