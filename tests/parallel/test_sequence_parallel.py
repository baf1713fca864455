"""Sequence parallelism changes nothing: losses, norms, weights and generation of one process, for every variant and objective."""

from typing import Any

import pytest

from tests.parallel.test_tensor_parallel import CASES, STAGES, Results, assert_same, run

pytestmark = pytest.mark.timeout(900)
SHORT = {"steps": 4, "parts": 2}
REFERENCES: dict[str, dict[str, Any]] = {
    **{name: {**CASES[name], "steps": 6, "parts": 1} for name in ("plain", "rotary")},
    **{
        name: {**CASES[name], **SHORT}
        for name in ("alibi", "untied", "r_drop", "lora", "forward_kl", "reverse_kl", "log_probs", "top_k", "on_policy")
    },
}
"""On one process, with padded sequences. Dropout, where there is any, is everywhere."""
TWO: dict[str, dict[str, Any]] = {
    **{f"rotary {stage}": {"of": "rotary", "sequence": 2, "deepspeed": stage} for stage in STAGES},
    **{f"plain {stage}": {"of": "plain", "sequence": 2, "deepspeed": stage} for stage in ("zero1", "zero3")},
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
LONGER_TWO = {
    f"{name} {stage}": {"of": name, "sequence": 2, "deepspeed": stage} for name in ("plain", "rotary") for stage in STAGES
}
LONGER_FOUR = {name: case for name, case in FOUR.items() if case["of"] in {"plain", "rotary"}}
"""In slow tests for 20 steps."""
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
    model = {name: value for name, value in CASES["plain"].items() if name != "parts"}
    legs = [{**model, **leg, "first": 2 * number, "last": 2 * number + 2} for number, leg in enumerate(LEGS)]
    straight = {"straight": {**CASES["plain"], "steps": 6, "parts": 4}}
    return {
        "two": run(2, directory, _options(TWO), legs[0], collectives=["sequence_collectives", {"sequence": 2}]),
        "one": run(1, directory, {**REFERENCES, **straight}, legs[1]),
        "four": run(4, directory, _options(FOUR), legs[2]),
    }


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Twenty steps: of both kinds of model under every stage on two ranks, and on four."""
    directory = tmp_path_factory.mktemp("longer")
    references = {name: {**REFERENCES[name], "steps": 20} for name in ("plain", "rotary")}
    return {
        "two": run(2, directory, _options(LONGER_TWO, steps=20)),
        "one": run(1, directory, references),
        "four": run(4, directory, _options(LONGER_FOUR, steps=20)),
    }


def _options(cases: dict[str, dict[str, Any]], **changes: Any) -> dict[str, dict[str, Any]]:
    """Of cases that may be references on other ranks."""
    merged = {name: {**REFERENCES[case["of"]], **case, **changes} for name, case in cases.items()}
    return {name: {key: value for key, value in case.items() if key != "of"} for name, case in merged.items()}


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one_process(results: Results, name: str) -> None:
    for rank in results["two"]["cases"]:
        assert_same(rank[name], results["one"]["cases"][0][TWO[name]["of"]])


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(results: Results, name: str) -> None:
    for rank in results["four"]["cases"]:
        assert_same(rank[name], results["one"]["cases"][0][FOUR[name]["of"]])


@pytest.mark.slow
def test_twenty_steps_equal_one_process(longer: Results) -> None:
    (single,) = longer["one"]["cases"]
    for ranks, cases in (("two", LONGER_TWO), ("four", LONGER_FOUR)):
        for rank in longer[ranks]["cases"]:
            for name, case in cases.items():
                assert_same(rank[name], single[case["of"]])
    assert {len(case["reports"]) for case in single.values()} == {20}


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
