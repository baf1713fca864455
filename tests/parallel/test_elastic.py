"""Another number of ranks, ZeRO stage or precision continues the same curve, with every kind of training state."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks

KINDS = ("averaged", "stable_adamw", "adapted", "selective")
Layout = tuple[int, str, str]
"""Ranks, ZeRO stage, precision."""


def chain(directory: Path, layouts: list[Layout], kinds: tuple[str, ...], steps: int = 2) -> dict[str, list[dict[str, Any]]]:
    """The legs of each kind on rank 0: every layout takes `steps` steps from where the one before ended."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for number, (world_size, deepspeed, precision) in enumerate(layouts):
        runs = [
            {
                "kind": kind,
                "deepspeed": deepspeed,
                **({} if precision == "fp32" else {"precision": precision}),
                "source": f"{directory}/{kind}_{number - 1}" if number else None,
                "target": f"{directory}/{kind}_{number}",
                "first": number * steps,
                "last": (number + 1) * steps,
            }
            for kind in kinds
        ]
        for kind, report in zip(
            kinds, run_ranks("legs", world_size, directory / str(number), timeout=600, runs=runs)[0], strict=True
        ):
            found[kind].append(report)
    return found


def straight(directory: Path, deepspeed: str, kinds: tuple[str, ...], steps: int) -> dict[str, dict[str, Any]]:
    """The uninterrupted curves on one rank."""
    runs = [{"kind": kind, "deepspeed": deepspeed, "source": None, "target": None, "first": 0, "last": steps} for kind in kinds]
    return dict(zip(kinds, run_ranks("legs", 1, directory, runs=runs)[0], strict=True))


def check_state(legs: list[dict[str, Any]]) -> None:
    """What a layout reads is, bit for bit, what the one before has written."""
    for before, after in pairwise(legs):
        assert after["loaded"] == before["saved"] != {}


def check_curve(legs: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    losses = [loss for leg in legs for loss in leg["losses"]]
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    for tag, queue in expected["queue"].items():
        assert legs[-1]["queue"][tag] == pytest.approx(queue, rel=1e-4)


def test_one_rank_continues_on_two_under_another_stage_and_back(tmp_path: Path) -> None:
    found = chain(tmp_path, [(1, "zero1", "fp32"), (2, "zero3", "fp32"), (1, "zero0", "fp32")], KINDS)
    expected = straight(tmp_path / "straight", "zero2", KINDS, 6)
    for kind in KINDS:
        check_state(found[kind])
        check_curve(found[kind], expected[kind])
    assert len(found["selective"][-1]["queue"]["0"]) == 150
    assert [leg["layout"] for leg in found["averaged"]] == ["1 rank zero1 fp32", "2 ranks zero3 fp32", "1 rank zero0 fp32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [
        [(1, "zero0", "fp32"), (2, "zero1", "fp32"), (4, "zero2", "fp32"), (2, "zero3", "fp32"), (1, "zero1", "fp32")],
        [(4, "zero3", "fp32"), (1, "zero2", "fp32"), (2, "zero0", "fp32"), (4, "zero0", "fp32"), (1, "zero3", "fp32")],
        [(2, "zero1_offload", "fp32"), (1, "zero3_offload", "fp32"), (4, "zero2_offload", "fp32"), (2, "zero2", "fp32")],
    ],
    ids=["1-2-4-2-1", "4-1-2-4-1", "offload"],
)
def test_every_layout_reads_every_other(layouts: list[Layout], tmp_path: Path) -> None:
    found = chain(tmp_path, layouts, KINDS)
    expected = straight(tmp_path / "straight", "zero1", KINDS, 2 * len(layouts))
    for kind in KINDS:
        check_state(found[kind])
        check_curve(found[kind], expected[kind])


@pytest.mark.slow
def test_precision_may_change_and_masters_stay_fp32(tmp_path: Path) -> None:
    layouts = [(1, "zero0", "fp32"), (2, "zero1", "bf16"), (4, "zero3", "bf16"), (2, "zero2", "fp32"), (1, "zero2", "bf16")]
    found = chain(tmp_path, layouts, KINDS)
    expected = straight(tmp_path / "straight", "zero1", KINDS, 2 * len(layouts))
    for kind in KINDS:
        check_state(found[kind])
        losses = [loss for leg in found[kind] for loss in leg["losses"]]
        assert losses[:2] == pytest.approx(expected[kind]["losses"][:2], rel=1e-5)
        assert losses == pytest.approx(expected[kind]["losses"], rel=0.02), "bf16 rounds each product to 3 digits"
