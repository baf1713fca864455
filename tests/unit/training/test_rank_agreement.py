"""Ranks that disagree get one message, the same on each of them."""

import socket
from typing import Any

import pytest

from dstrain.errors import TrainingError
from dstrain.training.rank_agreement import MAX_KEYS, require_agreement
from tests.unit.checkpoint.ranks import on_ranks

HOST = socket.gethostname()


def said(*trees: dict[str, Any]) -> str | None:
    """What every rank raised with; None if all went on."""
    results = on_ranks(len(trees), lambda ranks: require_agreement(ranks, trees[ranks.rank]))
    assert len({str(result) for result in results}) == 1, results
    assert results[0] is None or isinstance(results[0], TrainingError)
    return results[0] and str(results[0])


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_ranks_that_agree_go_on(num_ranks: int) -> None:
    assert said(*[{"a": {"b": 1, "c": [0.1, None]}, "d": []} for _ in range(num_ranks)]) is None


def test_a_difference_names_key_values_ranks_and_hosts() -> None:
    trees = [{"optimizer": {"betas": [0.9, beta]}, "same": 1} for beta in (0.98, 0.99, 0.98, 0.99, 0.99)]
    assert said(*trees) == (
        "the ranks do not agree on what to train:\n"
        f"  optimizer.betas[1]: 0.98 on rank 0 ({HOST}) and 1 more, 0.99 on rank 1 ({HOST}) and 2 more\n"
        "start every rank with the same command, files and versions"
    )


def test_a_key_that_a_rank_lacks_differs_and_value_types_are_distinguished() -> None:
    message = said({"a": {"x": 1}, "b": "1"}, {"a": {}, "b": 1})
    assert message is not None
    assert message.splitlines()[1:-1] == [
        f"  a: (absent) on rank 0 ({HOST}), {{}} on rank 1 ({HOST})",
        f"  a.x: 1 on rank 0 ({HOST}), (absent) on rank 1 ({HOST})",
        f'  b: "1" on rank 0 ({HOST}), 1 on rank 1 ({HOST})',
    ]


def test_many_differences_are_cut_short() -> None:
    trees = [{f"key{number:02}": rank for number in range(MAX_KEYS + 3)} for rank in range(2)]
    message = said(*trees)
    assert message is not None
    assert len(message.splitlines()) == MAX_KEYS + 3
    assert "\n  and 3 more keys\n" in message
