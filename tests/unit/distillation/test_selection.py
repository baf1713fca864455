"""Which tokens learn from the teacher: the formulas written out, queues that keep their size, and no trace of a split."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch, ModelKind
from dstrain.data.batching.collate import PackedSize
from dstrain.distillation.config import BatchSelection, GlobalByLanguageSelection, GlobalSelection
from dstrain.distillation.selection import Selection, threshold
from tests.batches import EOS, collate


def statistics(nll: list[float], tags: list[int] | None = None) -> Tensor:
    """In the order that they have in the queue."""
    tags = tags or [0] * len(nll)
    return torch.tensor(
        [[index, value, tag] for index, (value, tag) in enumerate(zip(nll, tags, strict=True))], dtype=torch.float64
    )


def selected(selection: Selection, step: Tensor) -> Tensor:
    """Of a step that is one micro-batch."""
    return selection.select([step], step)[0]


def batch(ids: list[int], width: int = 7, **how: Any) -> Batch:
    """Examples of `width` target tokens whose first source token is 10 + id % 2."""
    return collate([([10 + number % 2, EOS], [5] * (width - 1) + [EOS]) for number in ids], ids=ids, **how)


@pytest.mark.parametrize(("number", "rate", "rank"), [(1, 0.01, 1), (10, 0.25, 3), (30, 0.1, 3), (75, 0.5, 38), (5, 1.0, 5)])
def test_the_threshold_is_the_kth_largest_value(number: int, rate: float, rank: int) -> None:
    values = torch.randperm(number).double()
    assert threshold(values, rate) == sorted(values.tolist(), reverse=True)[rank - 1]
    assert threshold(values[:0], rate) == math.inf


def test_statistics_are_taken_on_the_batchs_device() -> None:
    elsewhere, whole = torch.device("meta"), batch([4, 9])
    found = Selection(BatchSelection()).statistics(whole.to(elsewhere), torch.ones(14, device=elsewhere))
    assert (found.device, found.shape) == (elsewhere, (14, 3))


def test_batch_forgets_every_step() -> None:
    selection = Selection(BatchSelection(rate=0.5))
    for values, expected in (([5, 1, 3, 2], [1, 0, 1, 0]), ([0.1, 0.3, 0.2], [0, 1, 1]), ([7], [1])):
        assert selected(selection, statistics(values)).tolist() == [bool(value) for value in expected]
    assert selection.state() == {}


def test_ties_at_the_threshold_are_all_selected() -> None:
    selection = Selection(BatchSelection(rate=0.25))
    assert selected(selection, statistics([2, 2, 1, 0])).tolist() == [True, True, False, False]


def test_global_equals_a_written_out_queue() -> None:
    selection, queue = Selection(GlobalSelection(rate=0.3, queue_size=10)), []
    generator = torch.Generator().manual_seed(1)
    for size in (4, 4, 4, 3, 20, 4, 1):
        values = torch.rand(size, generator=generator, dtype=torch.float64).tolist()
        queue = (queue + values)[-10:]
        limit = sorted(queue, reverse=True)[math.ceil(0.3 * len(queue)) - 1]
        assert selected(selection, statistics(values)).tolist() == [value >= limit for value in values]
        assert selection.queues[0].tolist() == queue


def test_every_language_has_a_queue_of_its_own() -> None:
    config = {"rate": 0.5, "queue_size": 3}
    both = Selection(GlobalByLanguageSelection(tags=["a", "b"], **config))
    alone = {tag: Selection(GlobalSelection(**config)) for tag in (4, 5)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        nll = torch.rand(9, generator=generator, dtype=torch.float64)
        tags = torch.randint(4, 6, (9,), generator=generator)
        step = statistics(nll.tolist(), tags.tolist())
        chosen = selected(both, step)
        for tag, selection in alone.items():
            mine = step[tags == tag].index_fill(1, torch.tensor([2]), 0)
            assert torch.equal(chosen[tags == tag], selected(selection, mine))
            assert torch.equal(both.queues[tag], selection.queues[0])
    assert {len(queue) for queue in both.state().values()} == {3}


def test_values_that_are_not_finite_enter_no_queue() -> None:
    selection = Selection(GlobalSelection(rate=0.5, queue_size=10))
    assert selected(selection, statistics([1, math.nan, 3, math.inf])).tolist() == [False, False, True, True]
    assert selection.queues[0].tolist() == [1, 3]


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_statistics_name_example_position_and_language(kind: ModelKind) -> None:
    selection = Selection(GlobalByLanguageSelection(tags=["a"]))
    found = selection.statistics(batch([5, 8], kind=kind), torch.arange(14.0))
    assert found[:, 1].tolist() == list(range(14))
    assert found[:, 2].tolist() == [11] * 7 + [10] * 7
    again = selection.statistics(batch([8], kind=kind), torch.arange(7.0, 14.0))
    assert torch.equal(again, found[7:]), "the order is that of example and position, not of the batch"
    packed = selection.statistics(batch([5, 8], kind=kind, packed=PackedSize(16)), torch.arange(14.0))
    assert torch.equal(packed, found)
    assert len(set(found[:, 0].tolist())) == 14


def test_how_a_step_is_split_leaves_no_trace() -> None:
    def after(parts: list[list[int]]) -> list[float]:
        selection = Selection(GlobalSelection(rate=0.5, queue_size=40))
        shares = []
        for ids in parts:
            nll = torch.tensor([float(number * 7 + place) for number in ids for place in range(7)])
            shares.append(selection.statistics(batch(ids), nll))
        selection.select(shares, torch.cat(shares))
        return selection.queues[0].tolist()

    whole = after([list(range(10))])
    assert whole == after([[9, 0], [4, 5, 6, 8], [1], [7, 3, 2]])
    assert len(whole) == 40
    assert 25 < sum(whole) / 40 < 44, "a queue shorter than the step holds no particular part of it"


def test_a_queue_goes_on_from_what_was_saved() -> None:
    straight, saved = (Selection(GlobalSelection(rate=0.5, queue_size=6)) for _ in range(2))
    for selection in (straight, saved):
        selected(selection, statistics([3, 1, 4, 1, 5]))
    continued = Selection(GlobalSelection(rate=0.5, queue_size=6))
    continued.load_state(saved.state())
    chosen = [selected(selection, statistics([9, 2, 6, 4, 5])) for selection in (straight, continued)]
    assert torch.equal(straight.queues[0], continued.queues[0])
    assert torch.equal(*chosen)
