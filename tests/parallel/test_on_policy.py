"""Steps on the student's own samples: 1 = 2 processes, ranks of unequal samples go on together, exact resume."""

from typing import Any

import pytest

from tests.parallel.launch import means, run_ranks

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    directory = tmp_path_factory.mktemp("one")
    return run_ranks("on_policy", 1, directory, shards=str(directory), deepspeed="zero0", placement="replicated")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    directory = tmp_path_factory.mktemp("two")
    return run_ranks("on_policy", 2, directory, shards=str(directory), deepspeed="zero3", placement="sharded")


def test_two_ranks_with_a_sharded_teacher_under_zero3_equal_one(one: Ranks, two: Ranks) -> None:
    expected = one[0]["curve"]
    for rank in two:
        for found, step in zip(rank["curve"], expected, strict=True):
            assert found["sampled"] == step["sampled"]
            assert found["num_targets"] == found["denominator"] == step["num_targets"]
            assert found["loss"] == pytest.approx(step["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(step["grad_norm"], rel=1e-4)
            assert means(found) == pytest.approx(means(step), rel=1e-5)
        assert rank["queue"] == pytest.approx(one[0]["queue"], rel=1e-5)
    for number, step in enumerate(expected):
        samples = two[0]["curve"][number]["samples"] | two[1]["curve"][number]["samples"]
        assert samples == step["samples"]
        if step["sampled"]:
            assert sum(map(len, samples.values())) == step["num_targets"]
            assert means(step)["on_policy"] == 1


def test_ranks_of_unequal_samples_have_equally_many_micro_batches(two: Ranks) -> None:
    pairs = [steps for steps in zip(*(rank["curve"] for rank in two), strict=True) if steps[0]["sampled"]]
    assert all(first["micro_batches"] == last["micro_batches"] for first, last in pairs)
    assert max(first["micro_batches"] for first, _ in pairs) > 2, "more than the plan had"
    assert {len(last["samples"]) for _, last in pairs} == {1}
    assert {len(first["samples"]) for first, _ in pairs} == {11}


def test_the_student_learns_from_its_samples_and_they_change(one: Ranks) -> None:
    own = [step for step in one[0]["curve"] if step["sampled"]]
    assert len({str(step["samples"]) for step in own}) == len(own)
    assert all(step["loss"] == pytest.approx(means(step)["on_policy_kd"], rel=1e-6) for step in own)
    given = [step for step in one[0]["curve"] if not step["sampled"]]
    assert all("on_policy_kd" not in means(step) and means(step)["on_policy"] == 0 for step in given)


def test_resume_across_a_step_of_samples_is_bit_exact(one: Ranks, two: Ranks) -> None:
    for rank in (*one, *two):
        assert rank["resumed"] == rank["curve"]
        assert rank["resumed_queue"] == rank["queue"]
        for half in (rank["curve"][:2], rank["curve"][2:]):
            assert {step["sampled"] for step in half} == {True, False}
