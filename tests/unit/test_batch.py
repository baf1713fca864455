"""A batch moves to a device without waiting; metrics are joined by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch, Metrics, ModelKind
from dstrain.data.batching.collate import PackedSize
from dstrain.wire import PinnedTensors, sent
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


def tensors_of(batch: Batch) -> list[Tensor]:
    """All that move with it."""
    tensors: list[Tensor] = []
    batch.moved(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return tensors


def bytes_of(tensors: list[Tensor]) -> int:
    """On the wire: 4 for each element that is an int64 below 2**31, its own size for others; all aligned to 16, after 16."""
    sizes = (4 if t.dtype == torch.int64 and int(t.max()) < 2**31 else t.element_size() for t in tensors)
    return 16 + sum(-(-t.numel() * size // 16) * 16 for t, size in zip(tensors, sizes, strict=True))


@pytest.mark.parametrize("packed", [None, PackedSize(4)])
@pytest.mark.parametrize("ids", [[41, 7], [2**40, 5]])
def test_a_pinned_batch_goes_to_a_gpu_in_one_copy_of_few_bytes(
    ids: list[int], packed: PackedSize | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And arrives as it was, dtypes included. Keys of dropout hold the example's id: only small ones fit 32 bits."""
    batch = collate([([5, 2], [6, 7, 2]), ([9, 8, 2], [2])], ids=ids, packed=packed, teacher_kinds=["decoder_only"])
    expected = tensors_of(batch)
    with PretendedGpu() as gpu:
        pinned = batch.pinned()
        assert all(ours is before for ours, before in zip(tensors_of(pinned), expected, strict=True)), "the CPU still reads them"
        assert gpu.copied == []
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, None)  # no pinned memory is taken while a step runs
        moved = pinned.to(GPU)
        monkeypatch.undo()
        assert gpu.waits == []
        assert gpu.copied == [bytes_of(expected)]
        assert gpu.copied[0] < sum(t.nbytes for t in expected)
        arrived = [tensor.cpu() for tensor in tensors_of(moved)]
    for found, before in zip(arrived, expected, strict=True):
        assert (found.dtype, found.shape) == (before.dtype, before.shape)
        assert torch.equal(found, before)
    assert moved.size == batch.size


def test_a_batch_made_from_a_pinned_one_has_a_copy_of_its_own() -> None:
    batch = collate([([5, 2], [6, 7, 2])], packed=PackedSize(4))
    with PretendedGpu():
        pinned = batch.pinned()
        changed = replace(pinned, target=replace(pinned.target, tokens=pinned.target.tokens + 1))
        for made in (changed, pinned.share(1, 2)):
            arrived = made.to(GPU).target.tokens.cpu()
            assert torch.equal(arrived, made.target.tokens)


def test_of_a_pinned_batch_a_sequence_rank_sends_the_copy_of_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate([([5, 2], [6, 7, 2]), ([9, 8, 2], [2])], packed=PackedSize(4))
    expected = tensors_of(batch.share(1, 2))
    with PretendedGpu() as gpu:
        pinned = batch.pinned(1, 2)
        for name in ("zeros", "empty"):
            monkeypatch.setattr(torch, name, None)  # no pinned memory is taken while a step runs
        moved = pinned.share(1, 2).to(GPU)
        monkeypatch.undo()
        assert gpu.copied == [bytes_of(expected)]
        arrived = [tensor.cpu() for tensor in tensors_of(moved)]
        other = pinned.share(0, 2).to(GPU).target.tokens.cpu()
    assert all(torch.equal(found, before) for found, before in zip(arrived, expected, strict=True))
    assert torch.equal(other, batch.share(0, 2).target.tokens)


def test_extreme_and_empty_tensors_arrive_as_they_were() -> None:
    edges = [2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1]
    tensors = [torch.tensor([value]) for value in edges] + [torch.tensor([]), torch.zeros(0, 3, dtype=torch.int64)]
    tensors += [torch.tensor([0.1, 2.0], dtype=torch.float64), torch.arange(6, dtype=torch.int32).view(2, 3)[:, 1:]]
    with PretendedGpu():
        arrived = [tensor.cpu() for tensor in PinnedTensors.of(tensors).to(GPU)]
    for found, before in zip(arrived, tensors, strict=True):
        assert found.dtype == before.dtype
        assert torch.equal(found, before)


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
