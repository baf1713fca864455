"""Teachers whole and shared out, one queue for all ranks, steps that do not depend on their split, exact resume."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.distilling import naively_distilled
from tests.parallel.launch import means, run_ranks

SELECTIONS: list[dict[str, Any]] = [
    {"kind": "word"},
    {"kind": "word_and_sequence"},
    {"kind": "batch", "rate": 0.4},
    {"kind": "global", "rate": 0.4, "queue_size": 100},
    {"kind": "global_by_language", "rate": 0.4, "queue_size": 20, "tags": ["a"]},
]
FEATURES: list[dict[str, Any]] = [
    {"kind": "hidden_states", "side": "encoder", "layers": {0: 0, 1: 3}},
    {"kind": "hidden_states", "side": "decoder", "loss": "cosine", "weight": 0.5},
    {"kind": "attention", "side": "encoder", "loss": "squared_error"},
    {"kind": "attention", "side": "cross"},
]
FEATURE_NAMES = [
    "feature_encoder_hidden_states_mse",
    "feature_decoder_hidden_states_cosine",
    "feature_encoder_attention_squared_error",
    "feature_cross_attention_kl",
]
RUNS = [{"objective": {"selection": selection}, "parts": 4, "steps": 4} for selection in SELECTIONS]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every selection in four micro-batches, then in one, then in one for eight steps."""
    runs = [*RUNS, *({**run, "parts": 1, "steps": steps} for steps in (4, 8) for run in RUNS)]
    found: list[dict[str, Any]] = run_ranks("distilled", 1, tmp_path_factory.mktemp("one"), runs=runs)[0]
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [report[name] for report in found["reports"]] == pytest.approx(
            [report[name] for report in expected["reports"]], rel=tolerance
        )
    for name in ("nll", "hard", "kd", "agreement", "selected"):
        assert [means(report)[name] for report in found["reports"]] == pytest.approx(
            [means(report)[name] for report in expected["reports"]], rel=1e-5
        )
    assert found["queues"].keys() == expected["queues"].keys()
    for tag, queue in expected["queues"].items():
        assert found["queues"][tag] == pytest.approx(queue, rel=1e-5)
    assert found["validated"] == pytest.approx(expected["validated"], rel=1e-5)


def test_placement_changes_no_bit(tmp_path: Path) -> None:
    for rank in run_ranks("placements", 2, tmp_path):
        for precision in ("fp32", "bf16"):
            whole, *others = (rank[f"{placement} {precision}"] for placement in ("replicated", "sharded", "offloaded"))
            assert all(other["digest"] == whole["digest"] for other in others)
            assert all(other["held"] < 0.62 * whole["held"] for other in others), "some small vectors stay whole"
            assert all(shown["again"] and not shown["training"] for shown in (whole, *others))
        assert rank["sharded bf16"]["dtype"] == "torch.bfloat16"
        assert rank["sharded bf16"]["digest"] != rank["sharded fp32"]["digest"]


def test_the_student_learns_and_selection_is_at_work(one_rank: list[dict[str, Any]]) -> None:
    learned = one_rank[2 * len(RUNS) :]
    for run, found in zip(RUNS, learned, strict=True):
        first, *_, last = found["reports"]
        assert means(last)["kd"] < 0.9 * means(first)["kd"]
        rate = run["objective"]["selection"].get("rate")
        if rate is None:
            assert means(first)["selected"] == means(last)["selected"] == 1
        else:
            assert 0.2 < means(last)["selected"] < 0.6
    assert len(learned[3]["queues"]["0"]) == 100
    assert max(len(queue) for queue in learned[4]["queues"].values()) == 20
    assert len(learned[4]["queues"]) > 5


@pytest.mark.parametrize("index", range(len(SELECTIONS)), ids=lambda index: SELECTIONS[index]["kind"])
def test_one_micro_batch_equals_four(one_rank: list[dict[str, Any]], index: int) -> None:
    assert_same(one_rank[len(SELECTIONS) + index], one_rank[index])


def test_two_ranks_and_every_stage_and_placement_equal_one_rank(one_rank: list[dict[str, Any]], tmp_path: Path) -> None:
    ways = [("zero1", "sharded"), ("zero3", "sharded"), ("zero3", "replicated"), ("zero0", "offloaded"), ("zero2", "sharded")]
    runs = [{**run, "deepspeed": stage, "placement": place} for run, (stage, place) in zip(RUNS, ways, strict=True)]
    for rank in run_ranks("distilled", 2, tmp_path, runs=runs):
        for found, expected in zip(rank, one_rank, strict=False):
            assert_same(found, expected)


def test_both_factors_of_student_and_teacher_by_another_divergence_are_a_bare_loops(tmp_path: Path) -> None:
    """At every stage; and no teacher, whole or shared out, is moved by the steps of its student."""
    section = {"divergence": {"kind": "reverse_kl"}, "temperature": 2.0, "label_smoothing": 0}
    section |= {"hard_weight": 0.3, "kd_weight": 0.7}
    ways = [("zero0", "sharded"), ("zero1", "replicated"), ("zero2", "sharded"), ("zero3", "sharded")]
    run = {"factorized": True, "objective": section, "steps": 3, "parts": 4}
    runs = [{**run, "deepspeed": stage, "placement": placement} for stage, placement in ways]
    losses, norms = naively_distilled(3, temperature=2.0, hard_weight=0.3)
    for rank in run_ranks("distilled", 2, tmp_path, runs=runs):
        for found in rank:
            assert [report["loss"] for report in found["reports"]] == pytest.approx(losses, rel=1e-5)
            assert [report["grad_norm"] for report in found["reports"]] == pytest.approx(norms, rel=1e-4)
            before, after = found["teachers"]
            assert before == after


def test_an_ensemble_sharded_equals_one_whole(tmp_path: Path) -> None:
    run = {"teachers": 2, "parts": 4, "steps": 3, "objective": {"temperature": 2.0, "divergence": {"kind": "jensen_shannon"}}}
    whole = run_ranks("distilled", 1, tmp_path, runs=[run])[0][0]
    for rank in run_ranks("distilled", 2, tmp_path, runs=[{**run, "deepspeed": "zero3", "placement": "sharded"}]):
        assert_same(rank[0], whole)


@pytest.fixture(scope="module")
def features_on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Features with projections in four micro-batches, in one, and at every other stage."""
    section = {"selection": {"kind": "batch", "rate": 0.4}, "features": FEATURES}
    ways = [{"parts": 4}, {"parts": 1}, *({"parts": 4, "deepspeed": f"zero{stage}"} for stage in (1, 2, 3))]
    runs = [{"objective": section, "steps": 4, **way} for way in ways]
    found: list[dict[str, Any]] = run_ranks("distilled", 1, tmp_path_factory.mktemp("features"), runs=runs)[0]
    return found


def assert_same_features(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(found, expected)
    for name in FEATURE_NAMES:
        values, wanted = ([means(report)[name] for report in run["reports"]] for run in (found, expected))
        assert values == pytest.approx(wanted, rel=1e-5)
    assert found["bundle"] == expected["bundle"]
    assert found["projections"].keys() == expected["projections"].keys()
    for name, weights in expected["projections"].items():
        assert found["projections"][name] == pytest.approx(weights, rel=1e-3, abs=1e-4)


def test_features_are_learned_by_weights_that_no_bundle_holds(
    features_on_one_rank: list[dict[str, Any]], one_rank: list[dict[str, Any]]
) -> None:
    found = features_on_one_rank[0]
    first, *_, last = found["reports"]
    assert all(means(last)[name] < means(first)[name] for name in FEATURE_NAMES[:2])
    assert found["bundle"] == one_rank[0]["bundle"]
    assert list(found["projections"]) == ["features.losses.0.projection.weight", "features.losses.1.projection.weight"]
    for name, weights in found["projections"].items():
        moves = [abs(weight - initial) for weight, initial in zip(weights, found["initial"][name], strict=True)]
        assert len(moves) == 24 * 72
        assert sum(move > 1e-3 for move in moves) > 1000


@pytest.mark.parametrize("way", [1, 2, 3, 4], ids=["one micro-batch", "zero1", "zero2", "zero3"])
def test_features_do_not_depend_on_micro_batches_and_stages(features_on_one_rank: list[dict[str, Any]], way: int) -> None:
    assert_same_features(features_on_one_rank[way], features_on_one_rank[0])


def test_features_of_a_sharded_teacher_on_two_ranks_are_those_on_one(
    features_on_one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    section = {"selection": {"kind": "batch", "rate": 0.4}, "features": FEATURES}
    ways = [("zero3", "sharded"), ("zero1", "sharded"), ("zero0", "replicated")]
    runs = [
        {"objective": section, "steps": 4, "parts": 4, "deepspeed": stage, "placement": placement} for stage, placement in ways
    ]
    for rank in run_ranks("distilled", 2, tmp_path, runs=runs):
        for found in rank:
            assert_same_features(found, features_on_one_rank[0])


@pytest.mark.parametrize(
    ("world_size", "deepspeed", "placement", "features"),
    [
        (1, "zero1", "replicated", []),
        (2, "zero1", "sharded", []),
        (2, "zero3", "sharded", FEATURES),
        pytest.param(1, "zero0", "replicated", FEATURES, marks=pytest.mark.slow),
        pytest.param(2, "zero2", "sharded", FEATURES, marks=pytest.mark.slow),
        pytest.param(2, "zero3", "sharded", [], marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(
    world_size: int, deepspeed: str, placement: str, features: list[dict[str, Any]], tmp_path: Path
) -> None:
    setting = {"deepspeed": deepspeed, "placement": placement, "features": features}
    ranks = run_ranks("resumed_student", world_size, tmp_path, shards=str(tmp_path), **setting)
    for rank in ranks:
        assert rank["found"] == rank["expected"]
        assert rank["held"][0] == rank["held"][1]
        assert rank["queues"][0] == rank["queues"][1]
        assert len(rank["queues"][0]["0"]) == 150
        assert rank["queues"] == ranks[0]["queues"], "one queue for all ranks"
    own = ranks[0]["student_numbers"]
    own += sum(len(weights) for weights in ranks[0]["held"][0]["projections"].values())
    assert ranks[0]["saved_numbers"] == own, "the teacher is in no checkpoint, projections are"


@pytest.mark.slow
def test_a_rank_holds_three_quarters_of_a_whole_teacher_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of 193 million parameters; the rest of a process's memory counts too. Freed memory must return to the system."""
    for name, value in (("MMAP_THRESHOLD_", "65536"), ("TRIM_THRESHOLD_", "65536"), ("ARENA_MAX", "1")):
        monkeypatch.setenv(f"MALLOC_{name}", value)
    size = {"dim": 1024, "depth": 6}
    whole, shared = (
        run_ranks("resident", 2, tmp_path / placement, forked=False, placement=placement, **size)
        for placement in ("replicated", "sharded")
    )
    for one, other in zip(whole, shared, strict=True):
        assert other["with"] <= 0.75 * one["with"]
        assert other["with"] - other["before"] <= 0.7 * (one["with"] - one["before"])
