"""Where a batch goes: to a device without waiting, and its example ids nowhere."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.batch import sent
from dstrain.data.batching.collate import collate

ELSEWHERE = torch.device("meta")
"""A device of which nothing can be asked."""


def test_a_batch_goes_to_a_device_without_its_example_ids() -> None:
    batch = collate([(np.array([5, 2]), np.array([6, 7, 2]))], np.array([41]), pad_id=1, eos_id=2)
    moved = batch.to(ELSEWHERE)
    assert moved.source is not None
    for tensor in (moved.source.tokens, moved.source.lengths, moved.target.tokens, moved.target.lengths, moved.labels):
        assert tensor.device == ELSEWHERE
    assert moved.example_ids.tolist() == [41]
    assert moved.size == batch.size


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
