"""A batch moves to a device without waiting; metrics are joined by name."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dstrain.batch import Metrics, sent
from dstrain.data.batching.collate import PackedSize
from tests.batches import collate

ELSEWHERE = torch.device("meta")
"""A device of which nothing can be asked."""


def test_a_batch_goes_to_a_device_but_for_what_is_looked_up_on_the_cpu() -> None:
    batch = collate([([5, 2], [6, 7, 2])], ids=[41], packed=PackedSize(4), teacher_kinds=["decoder_only"])
    moved = batch.to(ELSEWHERE)
    for part in (moved, moved.for_kind("decoder_only")):
        for sequences in (part.reading, part.target):
            assert sequences.packing is not None
            tensors = [sequences.tokens, sequences.lengths, *vars(sequences.packing).values()]
            assert {value.device for value in tensors if isinstance(value, Tensor)} == {ELSEWHERE}
        assert all(value.device == ELSEWHERE for value in (part.targets.index, part.targets.labels, part.targets.weight))
        assert part.targets.example_id.tolist() == [41] * 3
        assert part.examples.ids.tolist() == [41]
        assert part.size == batch.size


def test_metrics_are_added_by_name() -> None:
    first, second = Metrics.over(10, {"nll": 5.0, "kd": 2.0}), Metrics.over(30, {"nll": 3.0, "kl": 6.0})
    both = first + second
    assert both == Metrics({"nll": 8.0, "kd": 2.0, "kl": 6.0}, {"nll": 40, "kd": 10, "kl": 30})
    assert both.means() == {"nll": 0.2, "kd": 0.2, "kl": 0.2}
    assert (both + Metrics.over(0, {"empty": 0.0})).means() == both.means(), "a name without items has no mean"


class Recorded:
    """A tensor on a device that writes down what is done with it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.calls: list[Any] = []

    def pin_memory(self) -> Recorded:
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Recorded:
        self.calls.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize(
    ("here", "there", "calls"),
    [
        ("cpu", "cuda:1", ["pinned", ("cuda:1", True)]),
        ("cpu", "cpu", [("cpu", False)]),
        ("cuda:1", "cuda:1", [("cuda:1", False)]),
        ("cuda:1", "cpu", [("cpu", False)]),
    ],
)
def test_only_pinned_memory_is_copied_without_waiting(here: str, there: str, calls: list[Any]) -> None:
    tensor = Recorded(here)
    sent(cast(Tensor, tensor), torch.device(there))
    assert tensor.calls == calls
