"""A batch moves to a device without waiting; metrics are joined by name."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dstrain.batch import Metrics, ModelKind, sent
from dstrain.data.batching.collate import PackedSize
from tests.batches import collate
from tests.pretended_gpu import GPU, PretendedGpu

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


def test_a_pinned_batch_goes_to_a_gpu_without_another_copy_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([([5, 2], [6, 7, 2])], packed=PackedSize(4), teacher_kinds=["decoder_only"])
    with PretendedGpu() as gpu:
        pinned = batch.pinned()
        monkeypatch.setattr(Tensor, "pin_memory", None, raising=False)
        moved = pinned.to(GPU)
        assert gpu.waits == []
        assert torch.equal(moved.target.tokens.cpu(), batch.target.tokens)


PAIRS = [([5, 6, 2], [7, 2]), ([5, 2], [7, 8, 9, 2]), ([2], [2])]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_shares_are_together_the_whole_batch(kind: ModelKind, size: int) -> None:
    other: ModelKind = "decoder_only" if kind == "encoder_decoder" else "encoder_decoder"
    whole = collate(PAIRS, kind=kind, packed=PackedSize(4), teacher_kinds=[other])
    shares = [whole.share(rank, size) for rank in range(size)]
    for sides in zip(*((share.reading, share.target) for share in shares), strict=True):
        expected = whole.reading if sides[0] is shares[0].reading else whole.target
        assert torch.equal(torch.cat([side.tokens for side in sides]), expected.tokens)
        assert torch.equal(torch.cat([torch.as_tensor(side.positions) for side in sides]), torch.as_tensor(expected.positions))
        assert all(side.is_share == (size > 1) for side in sides)
    for name, values in vars(whole.targets).items():
        if name != "index":
            assert torch.equal(torch.cat([getattr(share.targets, name) for share in shares]), values)
    inputs = torch.cat([share.target.tokens[share.targets.index] for share in shares])
    assert torch.equal(inputs, whole.target.tokens[whole.targets.index])
    assert tuple(map(sum, zip(*(share.size for share in shares), strict=True))) == whole.size == (7, 3)
    for share in shares:
        assert torch.equal(share.for_kind(other).targets.labels, share.targets.labels)
        assert torch.equal(share.for_kind(other).target.tokens, whole.for_kind(other).target.tokens), "the teacher reads it whole"


def test_only_packed_tokens_of_a_multiple_of_the_ranks_are_shared() -> None:
    for packed in (None, PackedSize()):
        with pytest.raises(ValueError, match=r"tokens cannot be shared by 2 ranks; pack them in a multiple of it"):
            collate(PAIRS[:2], packed=packed).share(0, 2)


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

    def is_pinned(self) -> bool:
        return "pinned" in self.calls

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
