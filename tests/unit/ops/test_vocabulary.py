"""A vocabulary in slices, one per rank: the ranks are threads that share a group. Everything equals the whole vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.ops.divergence import Divergence
from dstrain.ops.teacher_signal import Signal, SparseSignal
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy
from dstrain.ops.token_loss.distillation import linear_distillation
from dstrain.ops.token_loss.r_drop import linear_r_drop
from dstrain.ops.vocabulary import VocabularySlice
from tests.unit.ops.test_token_distillation import dense, draws, log_probs, probabilities, student, terms, top_k_signal

VOCAB_SIZE = 77
CUTS = {1: [0, 77], 2: [0, 30, 77], 4: [0, 1, 30, 31, 77]}
"""Number of ranks -> where their slices begin and end; two have a single entry."""


class Exchange:
    """Where the ranks of a group meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[Tensor] = [torch.empty(0)] * size
        self.collectives = 0


@dataclass(frozen=True)
class ThreadGroup:
    """Stands in for `parallel.group.Group` among threads; in place, as collectives of processes are."""

    rank: int
    size: int
    exchange: Exchange

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.exchange.tensors[self.rank] = tensor.detach().clone()
        self.exchange.collectives += self.rank == 0
        self.exchange.barrier.wait()
        result = torch.stack(self.exchange.tensors).sum(0)
        self.exchange.barrier.wait()
        return tensor.copy_(result)


def test_every_rank_cuts_the_same_chunks() -> None:
    """By the largest slice that there may be, not by its own: each chunk has collectives."""
    assert [on_ranks(size, lambda each: each.largest_slice) for size in (1, 2, 4)] == [[77], [39, 39], [20, 20, 20, 20]]


def on_ranks(size: int, function: Callable[[VocabularySlice], Any]) -> list[Any]:
    """What each rank of so many returns."""
    exchange, ends = Exchange(size), CUTS[size]
    slices = [VocabularySlice(ends[rank], ends[rank + 1], VOCAB_SIZE, ThreadGroup(rank, size, exchange)) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        return [future.result() for future in [threads.submit(function, each) for each in slices]]


def local(whole: Tensor, vocabulary: VocabularySlice) -> Tensor:
    return whole[:, vocabulary.start : vocabulary.stop].clone()


@pytest.mark.parametrize("size", CUTS)
def test_reductions_of_slices_are_those_of_the_whole(size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(13, VOCAB_SIZE, generator=generator, dtype=torch.float64) * 5
    logits[3] = logits[3].round()  # ties, within slices and between them
    logits[4, [29, 30]] = 100.0
    ids = torch.randint(VOCAB_SIZE, (13, 6), generator=generator)
    ids[:, 4] = -1
    present = ids >= 0

    def reduced(vocabulary: VocabularySlice) -> dict[str, Tensor]:
        mine = local(logits, vocabulary)
        probs, log_probs = mine.clone(), mine.clone()
        reductions = vocabulary.reductions()
        normalizer, lse = reductions.softmax_(probs), reductions.log_softmax(mine, out=log_probs)
        total, label_logits, at_ids = (
            reductions.sum(mine),
            reductions.gather(mine, ids[:, :1]),
            reductions.gather(mine, ids),
        )
        best = reductions.argmax(mine)
        return {
            "sum": total.result(),
            "normalizer": normalizer.result().logsumexp,
            "nll": normalizer.result().nll(label_logits.result()),
            "lse": lse.result(),
            "gather": at_ids.result(),
            "argmax": best.result(),
            "probs": probs,
            "log_probs": log_probs,
            "add_at": vocabulary.add_at_(mine.clone(), ids, ids.double()),
            "lower_to": vocabulary.lower_to_(mine.clone(), ids, -1e9),
        }

    lse = logits.logsumexp(1, keepdim=True)
    lowered, added = logits.clone(), logits.clone()
    for row in range(13):
        for token_id in ids[row][present[row]].tolist():
            lowered[row, token_id] = -1e9
            added[row, token_id] += token_id
    expected = {
        "sum": logits.sum(1, keepdim=True),
        **dict.fromkeys(("normalizer", "lse"), lse),
        "nll": lse - logits.gather(1, ids[:, :1]),
        "gather": logits.gather(1, ids.clamp_min(0)) * present,
        "argmax": torch.from_numpy(logits.numpy().argmax(1))[:, None],
    }
    of_ranks = on_ranks(size, reduced)
    for found in of_ranks:
        torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(found[name], of_ranks[0][name]) for name in expected), "the same bits on every rank"
    for name, whole in {"probs": logits.softmax(1), "log_probs": logits - lse, "add_at": added, "lower_to": lowered}.items():
        torch.testing.assert_close(torch.cat([found[name] for found in of_ranks], 1), whole, rtol=1e-12, atol=1e-12)


def assert_slices_equal_the_whole(
    function: Callable[..., Any], features: Tensor, weight: Tensor, *args: Any, collectives: int, **options: Any
) -> None:
    """Sums and gradients; the gradients of the weight's slices are the rows of the whole one. collectives: for each chunk."""
    num_chunks = -(-features.shape[-2] // (10 if features.ndim == 2 else 5))

    def outcome(weight: Tensor, vocabulary: VocabularySlice | None) -> list[Tensor]:
        leaves = features.detach().requires_grad_(), weight.detach().requires_grad_()
        sums = function(*leaves, *args, chunk_tokens=10, vocabulary=vocabulary, **options)
        return [*(each.detach() for each in sums), *torch.autograd.grad(sums[0], leaves)]

    def counted(vocabulary: VocabularySlice) -> tuple[list[Tensor], int]:
        return outcome(vocabulary.rows(weight), vocabulary), vocabulary.group.exchange.collectives  # type: ignore[union-attr]

    expected = outcome(weight, None)
    for size in (2, 4):
        ranks, counts = zip(*on_ranks(size, counted), strict=True)
        assert counts[0] == collectives * num_chunks + 1  # the last sums the gradient of the features
        for found in ranks:
            torch.testing.assert_close(found[:-1], expected[:-1], rtol=1e-11, atol=1e-11)
            assert all(map(torch.equal, found[:-1], ranks[0][:-1])), "the same bits on every rank"
        torch.testing.assert_close(torch.cat([found[-1] for found in ranks]), expected[-1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cross_entropy_and_r_drop_of_slices(label_smoothing: float) -> None:
    features, weight, labels = student(23, 8, VOCAB_SIZE)
    token_weights = torch.linspace(0.1, 1, 23, dtype=torch.float64)
    options = {"label_smoothing": label_smoothing, "token_weights": token_weights}
    assert_slices_equal_the_whole(linear_cross_entropy, features, weight, labels, collectives=1, **options)
    passes = torch.stack([features, features + 0.3 * features.flip(0)]).detach()
    assert_slices_equal_the_whole(linear_r_drop, passes, weight, labels, alpha=3.0, collectives=2, **options)


@pytest.mark.parametrize(
    "divergence",
    [
        Divergence("forward_kl"),
        Divergence("reverse_kl"),
        Divergence("total_variation"),
        Divergence("jensen_shannon", 0.3),
        Divergence("skew_kl", 0.2),
    ],
    ids=lambda divergence: divergence.kind,
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_of_slices(divergence: Divergence, temperature: float) -> None:
    features, weight, labels = student(23, 8, VOCAB_SIZE)
    teacher = dense(23, VOCAB_SIZE, teachers=2)
    probs = probabilities(teacher, temperature)
    signals: list[Signal] = [teacher, log_probs(teacher, 2.0), top_k_signal(probs, 12, tail=True), draws(probs, 12)]
    selected = torch.arange(23) % 3 != 0
    for signal in signals:
        options: dict[str, Any] = {
            "terms": terms(divergence, temperature=temperature, hard_weight=0.6, kd_weight=0.7),
            "selected": selected,
        }
        options["collectives"] = 1 if isinstance(signal, SparseSignal) else 2
        assert_slices_equal_the_whole(linear_distillation, features, weight, labels, signal, **options)
