"""Sequence parallelism changes nothing: losses, norms, weights and generation of one process, for every variant and objective."""

from typing import Any

import pytest

from tests.parallel.launch import run_ranks
from tests.parallel.test_tensor_parallel import CASES, STAGES, Results, assert_same

pytestmark = pytest.mark.timeout(900)
SHORT = {"steps": 4, "parts": 2}
REFERENCES: dict[str, dict[str, Any]] = {
    **{name: {**CASES[name], "steps": 20, "parts": 1} for name in ("plain", "rotary")},
    **{
        name: {**CASES[name], **SHORT}
        for name in ("alibi", "untied", "r_drop", "lora", "forward_kl", "reverse_kl", "log_probs", "top_k", "on_policy")
    },
}
"""On one process, with padded sequences. Dropout, where there is any, is everywhere."""
TWO: dict[str, dict[str, Any]] = {
    **{f"{name} {stage}": {"of": name, "sequence": 2, "deepspeed": stage} for name in ("plain", "rotary") for stage in STAGES},
    **{name: {"of": name, "sequence": 2} for name in REFERENCES if name not in {"plain", "rotary"}},
}
TWO["reverse_kl"] |= {"teachers": ["sharded"], "checkpointing": "selective"}
TWO["r_drop"] |= {"checkpointing": "full", "tiles": 3}
FOUR: dict[str, dict[str, Any]] = {
    "plain s4": {"of": "plain", "sequence": 4, "deepspeed": "zero1"},
    "rotary s4": {"of": "rotary", "sequence": 4, "deepspeed": "zero3"},
    "plain t2 s2": {"of": "plain", "tensor": 2, "sequence": 2, "deepspeed": "zero3"},
    "rotary t2 s2": {"of": "rotary", "tensor": 2, "sequence": 2, "deepspeed": "zero1"},
    "two heads of keys for four ranks": {"of": "untied", "sequence": 4},
    "alibi t2 s2": {"of": "alibi", "tensor": 2, "sequence": 2},
    "dropout t2 s2": {"of": "r_drop", "tensor": 2, "sequence": 2},
    "features t2 s2": {"of": "reverse_kl", "tensor": 2, "sequence": 2, "teachers": ["sharded"]},
}
"""Each is the case `of` one process on other ranks."""
LEGS: list[dict[str, Any]] = [
    {"sequence": 2, "deepspeed": "zero1"},
    {"deepspeed": "zero0"},
    {"tensor": 2, "sequence": 2, "deepspeed": "zero3"},
]
"""On 2, 1 and 4 ranks, two steps each."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every case; the legs go through one checkpoint after another."""
    directory = tmp_path_factory.mktemp("sequence")

    def run(world_size: int, number: int, cases: dict[str, dict[str, Any]], **others: list[Any]) -> Results:
        leg = {**CASES["plain"], **LEGS[number], "first": 2 * number, "last": 2 * number + 2}
        leg.pop("parts")
        runs = [
            "tensor_runs",
            {"cases": [_options(case) for case in cases.values()], "leg": leg, "shards": f"{directory}/shards"},
        ]
        reports = run_ranks("several", world_size, directory, scenarios={"runs": runs, **others}, timeout=600)
        return {
            "cases": [dict(zip(cases, report["runs"]["cases"], strict=True)) for report in reports],
            "leg": reports[0]["runs"]["leg"],
            **{name: [report[name] for report in reports] for name in others},
        }

    two = run(2, 0, TWO, collectives=["sequence_collectives", {"sequence": 2}])
    straight = {"straight": {**CASES["plain"], "steps": 6, "parts": 4}}
    return {"two": two, "one": run(1, 1, {**REFERENCES, **straight}), "four": run(4, 2, FOUR)}


def _options(case: dict[str, Any]) -> dict[str, Any]:
    """Of a case that may be one of the references on other ranks."""
    merged = {**REFERENCES.get(case.get("of", ""), {}), **case}
    return {name: value for name, value in merged.items() if name != "of"}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one_process(results: Results, name: str) -> None:
    for rank in results["two"]["cases"]:
        assert_same(rank[name], results["one"]["cases"][0][TWO[name]["of"]])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(results: Results, name: str) -> None:
    for rank in results["four"]["cases"]:
        assert_same(rank[name], results["one"]["cases"][0][FOUR[name]["of"]])


def test_a_curve_goes_on_with_other_numbers_of_sequence_and_tensor_ranks(results: Results) -> None:
    legs = [results[name]["leg"] for name in ("two", "one", "four")]
    losses = [loss for leg in legs for loss in leg["losses"]]
    expected = [report["loss"] for report in results["one"]["cases"][0]["straight"]["reports"]]
    assert losses == pytest.approx(expected, rel=1e-6)
    layouts = ["2 ranks sequence 2 zero1 fp32", "1 rank zero0 fp32", "4 ranks tensor 2 sequence 2 zero3 fp32"]
    assert [leg["layout"] for leg in legs] == layouts


def test_an_attention_exchanges_twice_in_each_direction(results: Results) -> None:
    """And nothing else is communicated: not by the loss, nor by embeddings."""
    for counts in results["two"]["collectives"]:
        for model, attentions in (("plain", 2 + 2 * 2), ("rotary", 2)):
            assert counts[model] == [2 * attentions, 2 * 2 * attentions]
