"""Tensor parallelism changes nothing: losses and norms, weights and generation of one process, by variant and objective."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks
from tests.parallel.on_policy import OBJECTIVE as ON_POLICY

pytestmark = pytest.mark.timeout(900)
STAGES = ("zero1", "zero3", "zero0", "zero2")
SELECTIVE = {"kind": "global", "rate": 0.5, "queue_size": 150}
FEATURES = [
    {"kind": "hidden_states", "side": "decoder", "weight": 0.1},
    {"kind": "attention", "side": "cross", "weight": 0.1},
    {"kind": "attention", "side": "encoder", "weight": 0.1},
]


def distillation(divergence: str, *, store: dict[str, Any] | None = None, **section: Any) -> dict[str, Any]:
    objective = {"kind": "distillation", "divergence": {"kind": divergence}, **section}
    return {"objective": objective, "teachers": ["replicated"], "store": store}


PLAIN: dict[str, Any] = {"clip_norm": 0.5, "ema": True, "objective": {"label_smoothing": 0.1}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {**PLAIN, "parts": 4},
    "rotary": {"model": "rotary", "clip_norm": 0.5},
    "alibi": {"model": "alibi", "clip_norm": 0.5},
    "untied": {"model": "untied", "kind": "stable_adamw", "clip_norm": 0.5},
    "r_drop": {"objective": {"r_drop": {"alpha": 1.0}}, "dropout": 0.2},
    "lora": {"model": "plain", "adapter": {}},
    "dora": {"model": "alibi", "adapter": {"dora": True, "bias": "all"}},
    "forward_kl": distillation("forward_kl", temperature=2.0, selection=SELECTIVE, label_smoothing=0.1),
    "reverse_kl": distillation("reverse_kl", features=FEATURES),
    "jensen_shannon": {**distillation("jensen_shannon"), "teachers": ["replicated", "replicated"]},
    "total_variation": distillation("total_variation"),
    "skew_kl": {**distillation("skew_kl"), "model": "alibi"},
    "log_probs": distillation("jensen_shannon", temperature=2.0, store={"kind": "dense"}),
    "top_k": distillation("reverse_kl", temperature=2.0, store={"kind": "topk", "k": 6, "temperature": 2.0}, selection=SELECTIVE),
    "samples": distillation("forward_kl", label_smoothing=0.1, store={"kind": "sample", "draws": 12}),
    "on_policy": distillation("reverse_kl", **ON_POLICY),
    "bf16": {**PLAIN, "precision": "bf16"},
}
LONGER = {"plain", "rotary", "forward_kl", "bf16"}
"""They take 6 steps, and 20 in slow tests. The others take 4: a rank that differs does so at the first update."""
for name in CASES.keys() - LONGER:
    CASES[name]["steps"] = 4
LEGS: list[dict[str, Any]] = [
    {"tensor": 2, "deepspeed": "zero1"},
    {"tensor": 1, "deepspeed": "zero0"},
    {"tensor": 4, "deepspeed": "zero3"},
]
"""On 2, 1 and 4 ranks, two steps each."""
ALL_LEGS = {"model": "untied", "clip_norm": 0.5, "ema": True}
FOUR = {
    "rotary": (2, "zero3"),
    "untied": (2, "zero1"),
    "forward_kl": (2, "zero3"),
    "alibi": (4, "zero3"),
    "lora": (4, "zero1"),
}
"""Tensor ranks and ZeRO stage of the cases on four ranks."""
DATA_STAGES = ("zero1", "zero3")
"""Of a decoder on data ranks. The other two are slow: `test_sequence_parallel.py` runs a decoder under all four."""
BF16_ROUNDING = 2.0**-8
"""Half the distance of two neighbors, relative."""

Results = dict[str, Any]


def run(
    world_size: int, directory: Path, cases: Mapping[str, Results], leg: Results | None = None, **others: list[Any]
) -> Results:
    """The cases on so many ranks, a list by rank, and a leg of a longer curve; others: further scenarios of the same launch."""
    runs = ["tensor_runs", {"cases": list(cases.values()), "leg": leg, "shards": f"{directory}/shards"}]
    reports = run_ranks("several", world_size, directory, scenarios={"runs": runs, **others}, timeout=600)
    return {
        "cases": [dict(zip(cases, report["runs"]["cases"], strict=True)) for report in reports],
        "leg": reports[0]["runs"]["leg"],
        **{name: [report[name] for report in reports] for name in others},
    }


def on_two(cases: Mapping[str, Results], data_stages: tuple[str, ...]) -> Results:
    """The cases on two tensor ranks, and a decoder on two data ranks under each of the stages."""
    stages = dict(zip(CASES, len(CASES) * STAGES, strict=False))
    two = {name: {**case, "tensor": 2, "deepspeed": stages[name]} for name, case in cases.items()}
    others: dict[str, Results] = {
        "reverse_kl": {"teachers": ["sharded"]},
        "rotary": {"checkpointing": "full"},
        "r_drop": {"checkpointing": "selective"},
        "alibi": {"tiles": 3},
    }
    two = {name: {**case, **others.get(name, {})} for name, case in two.items()}
    data = {
        f"data {stage}": {**cases["rotary"], "deepspeed": stage, "tiles": 3 if stage == "zero3" else 1} for stage in data_stages
    }
    return {**two, **data}


def on_four(cases: Mapping[str, Results]) -> Results:
    """Those of the cases that four ranks take."""
    others: dict[str, Results] = {"forward_kl": {"teachers": ["sharded"]}}
    layouts = {name: {"tensor": tensor, "deepspeed": stage} for name, (tensor, stage) in FOUR.items() if name in cases}
    return {name: {**cases[name], **layout, **others.get(name, {})} for name, layout in layouts.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every case on two ranks and on one, some on four; the legs go through one checkpoint after another."""
    directory = tmp_path_factory.mktemp("tensor")
    model = {**ALL_LEGS, "model": "plain"}
    cases = {name: {"steps": 6, **case} for name, case in CASES.items()}
    legs = [{**model, **leg, "first": 2 * number, "last": 2 * number + 2} for number, leg in enumerate(LEGS)]
    straight = {"straight": {**model, "steps": 6, "parts": 4}}
    others = {
        "collectives": ["tensor_collectives", {"tensor": 2}],
        "faults": ["tensor_faults", {"tensor": 2, "stages": ["zero0", "zero1", "zero3"]}],
    }
    return {
        "two": run(2, directory, on_two(cases, DATA_STAGES), legs[0], **others),
        "one": run(1, directory, {**cases, **straight}, legs[1]),
        "four": run(4, directory, on_four(cases), legs[2]),
    }


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Twenty steps of some cases, and the decoder on data ranks under every stage."""
    directory = tmp_path_factory.mktemp("longer")
    cases = {name: {**CASES[name], "steps": 20} for name in CASES if name in LONGER}
    return {
        "two": run(2, directory, on_two(cases, STAGES)),
        "one": run(1, directory, cases),
        "four": run(4, directory, on_four(cases)),
    }


def assert_same(result: Results, expected: Results) -> None:
    for report, single in zip(result["reports"], expected["reports"], strict=True):
        assert report.get("samples") == single.get("samples")
        assert report["loss"] == pytest.approx(single["loss"], rel=1e-6)
        assert report["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
        assert report["num_targets"] == single["num_targets"]
        assert report["metrics"]["counts"] == single["metrics"]["counts"], "ranks of a tensor group count a token once"
        assert report["metrics"]["sums"] == pytest.approx(single["metrics"]["sums"], rel=1e-5)
    assert result["validated"] == pytest.approx(expected["validated"], rel=1e-6)
    assert result["shapes"] == expected["shapes"]
    assert result["logits"] == pytest.approx(expected["logits"], rel=1e-4, abs=1e-5)
    assert result["queues"].keys() == expected["queues"].keys()
    for name, queue in expected["queues"].items():
        assert result["queues"][name] == pytest.approx(queue, rel=1e-5)
    for name, (_, norm) in result["weights"].items():
        if name.endswith("k_proj.bias"):  # no key bias moves a softmax: its gradient is rounding, which Adam makes a step of
            continue
        assert norm == pytest.approx(expected["weights"][name][1], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_two_tensor_ranks_equal_one_process(results: Results, name: str) -> None:
    for rank in results["two"]["cases"]:
        assert_same(rank[name], results["one"]["cases"][0][name])


@pytest.mark.parametrize("stage", DATA_STAGES)
def test_two_data_ranks_of_a_decoder_equal_one_process(results: Results, stage: str) -> None:
    for rank in results["two"]["cases"]:
        assert_same(rank[f"data {stage}"], results["one"]["cases"][0]["rotary"])


@pytest.mark.slow
def test_twenty_steps_equal_one_process(longer: Results) -> None:
    """On two and four ranks, and a decoder on data ranks under every stage."""
    (single,) = longer["one"]["cases"]
    for rank in (*longer["two"]["cases"], *longer["four"]["cases"]):
        for name in rank.keys() - {"bf16"}:
            assert_same(rank[name], single["rotary" if name.startswith("data ") else name])
    assert {len(case["reports"]) for case in single.values()} == {20}
    assert longer["two"]["cases"][0].keys() - single.keys() == {f"data {stage}" for stage in STAGES}
    assert longer["four"]["cases"][0].keys() == {"rotary", "forward_kl"}


@pytest.mark.parametrize(("ranks", "name"), [("two", "reverse_kl"), ("four", "forward_kl")])
def test_a_teacher_beside_tensor_ranks_is_sharded_over_all_ranks(results: Results, ranks: str, name: str) -> None:
    whole = results["one"]["cases"][0][name]["held"][0]
    held = [rank[name]["held"][0] for rank in results[ranks]["cases"]]
    assert whole <= sum(held)
    assert max(held) < (1 / len(held) + 0.2) * whole, "small tensors, a fifth of this teacher, are whole on every rank"


@pytest.mark.parametrize("steps", ["results", pytest.param("longer", marks=pytest.mark.slow)])
def test_bf16_moves_by_its_rounding(request: pytest.FixtureRequest, steps: str) -> None:
    """A sum over ranks rounds each part: once more for every logit, and so at most once for their mean; norms four times."""
    results: Results = request.getfixturevalue(steps)
    (single,) = results["one"]["cases"]
    for rank in results["two"]["cases"]:
        for found, expected, full in zip(
            *(case["reports"] for case in (rank["bf16"], single["bf16"], single["plain"])), strict=True
        ):
            assert found["loss"] == pytest.approx(expected["loss"], rel=BF16_ROUNDING)
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=4 * BF16_ROUNDING)
            assert found["loss"] != full["loss"]


def test_clipping_by_the_norm_of_all_ranks_is_active(results: Results) -> None:
    for name in ("plain", "rotary", "alibi", "untied"):
        assert results["one"]["cases"][0][name]["reports"][0]["grad_norm"] > 2 * CASES[name]["clip_norm"]


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(results: Results, name: str) -> None:
    for rank in results["four"]["cases"]:
        assert_same(rank[name], results["one"]["cases"][0][name])


def test_a_curve_goes_on_with_other_numbers_of_tensor_ranks(results: Results) -> None:
    legs = [results[name]["leg"] for name in ("two", "one", "four")]
    losses = [loss for leg in legs for loss in leg["losses"]]
    expected = [report["loss"] for report in results["one"]["cases"][0]["straight"]["reports"]]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert [leg["layout"] for leg in legs] == [
        "2 ranks tensor 2 zero1 fp32",
        "1 rank zero0 fp32",
        "4 ranks tensor 4 zero3 fp32",
    ]


def test_collectives_are_few(results: Results) -> None:
    """A sublayer sums once in forward, and once in backward for each map that reads a common input; a chunk of the loss once."""
    chunks = -(-84 // 16)
    for counts in results["two"]["collectives"]:
        layers, embeddings, loss = 2 * (2 + 3), 2, chunks + 1
        assert counts["plain"][0] == layers + embeddings + loss
        assert counts["plain"][1] - counts["plain"][0] == 2 * (2 + 4)
        assert counts["rotary"][0] == 2 * 2 + 1 + loss
        assert counts["rotary"][1] - counts["rotary"][0] == 2 * 2


def test_a_gradient_that_is_not_finite_on_one_tensor_rank_stops_all(results: Results) -> None:
    for rank in results["two"]["faults"]:
        for report in rank:
            assert "is not finite" in report["error"] or "is nan" in report["error"]
            assert report["step"] == 1
            assert report["unchanged"]
