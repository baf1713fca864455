"""Triton's kernels of cross-entropy and distillation against the references in float64, by the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.ops.divergence import Divergence
from dstrain.ops.kernels import CROSS_ENTROPY, DENSE_DISTILLATION, R_DROP, SPARSE_DISTILLATION
from dstrain.ops.teacher_signal import DenseSignal, LogProbsSignal, Signal, SparseSignal
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation, reference_linear_distillation
from dstrain.ops.token_loss.r_drop import linear_r_drop, reference_linear_r_drop
from dstrain.ops.vocabulary import VocabularySlice

ROWS, WIDTH, ENTRIES = 5, 3, 37
KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("total_variation"),
    Divergence("jensen_shannon", 0.1),
    Divergence("jensen_shannon", 1.0),
    Divergence("skew_kl", 0.3),
]
CLOSE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-3, 2e-3)}
"""Relative and absolute tolerance: in 16 bits the gradient of the logits is rounded before it is multiplied."""


@pytest.fixture(autouse=True)
def kernels_of_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In blocks of 16 entries, so that a row has three."""
    monkeypatch.setattr("dstrain.ops.triton.launch.LARGEST_BLOCK", 16)
    with ExitStack() as stack:
        for op in (CROSS_ENTROPY, DENSE_DISTILLATION, R_DROP, SPARSE_DISTILLATION):
            stack.enter_context(op.forced("triton"))
            assert op.choose(torch.device("cpu"), torch.float32).module.startswith("dstrain.ops.triton.")
        yield


def student(rows: int = ROWS, entries: int = ENTRIES, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    """Features, weight and labels; the first and the last entry are labels."""
    generator = torch.Generator().manual_seed(rows + entries)
    features = torch.randn(rows, WIDTH, generator=generator).mul_(scale).to(dtype).requires_grad_()
    weight = torch.randn(entries, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(entries, (rows,), generator=generator)
    labels[:1], labels[-1:] = 0, entries - 1
    return [features, weight, labels]


def outcome(function: Callable[..., Any], inputs: list[Any], **options: Any) -> list[Tensor]:
    """All results, and the gradients of the loss with respect to features and weight."""
    results = function(*inputs, chunk_tokens=3, **options)
    return [each.detach() for each in results] + list(torch.autograd.grad(results[0], inputs[:2]))


def exact(inputs: list[Any]) -> list[Any]:
    """In float64."""
    doubled = [each.detach().double().requires_grad_() for each in inputs[:2]]
    return [*doubled, *inputs[2:]]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    rtol, atol = CLOSE[dtype]
    for ours, reference in zip(found, expected, strict=True):
        scale = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(ours.double(), reference.double(), rtol=rtol, atol=atol * scale)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("rows", "entries"), [(ROWS, ENTRIES), (1, 16), (2, 2)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(rows: int, entries: int, label_smoothing: float, dtype: torch.dtype) -> None:
    inputs, token_weights = student(rows, entries, dtype), torch.linspace(0.2, 1.7, rows)
    options = {"label_smoothing": label_smoothing, "token_weights": token_weights}
    found = outcome(linear_cross_entropy, inputs, **options)
    assert_close(found, outcome(reference_linear_cross_entropy, exact(inputs), **options), dtype)


def test_the_kernels_apply_the_weights_of_tokens() -> None:
    """In the pass that writes the gradient, but for float16, where a small weight would underflow."""
    from dstrain.ops.token_loss.cross_entropy import TokenCrossEntropy
    from dstrain.ops.token_loss.r_drop import TokenRDrop

    weights, labels = torch.tensor([[0.5], [2.0]]), torch.tensor([[3], [0]])
    for loss, shape in ((TokenCrossEntropy(0.1), (2, 9)), (TokenRDrop(1.0, 0.1), (2, 2, 9))):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        sums = logits.sum(-1, keepdim=True)
        plain, weighted = (loss(logits.clone(), sums, labels, VocabularySlice.whole(9), each) for each in (None, weights))
        assert (plain.is_weighted, weighted.is_weighted) == (False, True)
        torch.testing.assert_close(weighted.logits_grad, plain.logits_grad * weights)
    tiny = {"label_smoothing": 0.0, "token_weights": torch.full((ROWS,), 1e-7)}
    found = outcome(linear_cross_entropy, student(dtype=torch.float16), **tiny)[-1]
    expected = outcome(reference_linear_cross_entropy, exact(student(dtype=torch.float16)), **tiny)[-1]
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=6e-8)


def two_passes(dtype: torch.dtype = torch.float32, rows: int = ROWS, scale: float = 1.0) -> list[Tensor]:
    """Features of both passes, weight and labels."""
    first, weight, labels = student(rows, dtype=dtype, scale=scale)
    second = first.detach() + torch.randn(first.shape, generator=torch.Generator().manual_seed(2)).mul_(scale).to(dtype)
    return [torch.stack([first.detach(), second]).requires_grad_(), weight, labels]


@pytest.mark.parametrize("dtype", CLOSE)
def test_r_drop(dtype: torch.dtype) -> None:
    """A chunk has one token, as it has both passes."""
    options = {"alpha": 2.5, "label_smoothing": 0.1, "token_weights": torch.linspace(0.2, 1.7, ROWS)}
    inputs = two_passes(dtype)
    assert_close(outcome(linear_r_drop, inputs, **options), outcome(reference_linear_r_drop, exact(inputs), **options), dtype)


def test_r_drop_of_no_tokens_of_equal_passes_and_of_passes_far_apart() -> None:
    options = {"alpha": 1.0, "label_smoothing": 0.1}
    assert not any(each.any() for each in outcome(linear_r_drop, two_passes(rows=0), **options))
    equal = two_passes()
    equal[0] = equal[0].detach()[:1].repeat(2, 1, 1).requires_grad_()
    assert float(linear_r_drop(*equal, chunk_tokens=4, **options).kl) == 0
    apart = two_passes(scale=50.0)
    found = outcome(linear_r_drop, apart, **options)
    assert_close(found, outcome(reference_linear_r_drop, exact(apart), **options))
    assert all(each.isfinite().all() for each in found)


def test_no_tokens_at_all() -> None:
    loss, nll, features_grad, weight_grad = outcome(linear_cross_entropy, student(rows=0), label_smoothing=0.1)
    assert (float(loss), nll.shape, features_grad.shape) == (0.0, (0,), (0, WIDTH))
    assert not weight_grad.any()


def test_logits_far_apart() -> None:
    """Most probabilities are exactly 0 in float32, and some labels are that unlikely."""
    inputs = student(scale=200.0)
    found = outcome(linear_cross_entropy, inputs, label_smoothing=0.1)
    assert_close(found, outcome(reference_linear_cross_entropy, exact(inputs), label_smoothing=0.1))
    assert float(found[1].max()) > 100


def test_the_best_entry_is_the_first_of_equal_ones() -> None:
    from dstrain.ops.triton.softmax import softmax_statistics

    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-3.0, -2.0, -1.0, -0.5]]).repeat_interleave(9, 1)
    pending = softmax_statistics(logits, None, VocabularySlice.whole(36).reductions(), temperature=2.0, with_plain=True)
    statistics = pending.result()
    assert statistics.best.squeeze(1).tolist() == [9, 0, 27]
    shifted = logits.double() - logits.double().amax(1, keepdim=True)
    for log_sum, temperature in ((statistics.log_sum, 2.0), (statistics.plain_log_sum, 1.0)):
        torch.testing.assert_close(log_sum.double(), (shifted / temperature).logsumexp(1, keepdim=True), rtol=1e-6, atol=1e-6)


def terms(divergence: Divergence, temperature: float, hard_weight: float = 0.7) -> DistillationTerms:
    return DistillationTerms(divergence, temperature, hard_weight=hard_weight, kd_weight=0.6, label_smoothing=0.1)


def dense(teachers: int = 1, scale: float = 1.0) -> DenseSignal:
    generator = torch.Generator().manual_seed(9)
    return DenseSignal(
        features=[torch.randn(ROWS, 4, generator=generator) * scale for _ in range(teachers)],
        weights=[torch.randn(ENTRIES, 4, generator=generator) for _ in range(teachers)],
    )


def in_double(signal: DenseSignal) -> DenseSignal:
    return DenseSignal([each.double() for each in signal.features], [each.double() for each in signal.weights])


def top_k(signal: DenseSignal, temperature: float, count: int = 4) -> SparseSignal:
    """A different number of entries in every row."""
    (features,), (weight,) = signal.features, signal.weights
    probs, ids = (features @ weight.T / temperature).softmax(1).topk(count)
    unused = torch.arange(count) >= torch.tensor([[1], [2], [3], [4], [4]]).clamp_max(count)
    probs, ids = probs.masked_fill(unused, 0), ids.masked_fill(unused, -1)
    return SparseSignal(ids, probs, 1 - probs.sum(1))


SELECTED = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.25])


def check(signal: Signal, reference: Signal, of: DistillationTerms, inputs: list[Any] | None = None) -> list[Tensor]:
    inputs = inputs or student()
    found = outcome(linear_distillation, [*inputs, signal], terms=of, selected=SELECTED)
    expected = outcome(reference_linear_distillation, [*exact(inputs), reference], terms=of, selected=SELECTED)
    assert_close(found, expected)
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_every_divergence_from_dense_and_from_sparse_signals(divergence: Divergence, temperature: float) -> None:
    of = terms(divergence, temperature)
    check(dense(), in_double(dense()), of)
    check(top_k(dense(), temperature), top_k(in_double(dense()), temperature), of)


@pytest.mark.parametrize("hard_weight", [0.0, 0.7])
def test_several_teachers_and_no_hard_labels(hard_weight: float) -> None:
    check(dense(2), in_double(dense(2)), terms(KINDS[1], 2.5, hard_weight))
    check(top_k(dense(), 2.5), top_k(in_double(dense()), 2.5), terms(KINDS[1], 2.5, hard_weight))


def test_stored_log_probabilities_at_another_temperature() -> None:
    features, weight = dense().features[0], dense().weights[0]
    stored = (features @ weight.T / 3).log_softmax(1).numpy()
    signal = LogProbsSignal([stored[:2], stored[2:]], temperature=3.0)
    check(signal, signal, terms(KINDS[3], 2.0))


def test_sampled_entries() -> None:
    ids = torch.tensor([[0, 36, -1], [5, 6, 7], [1, -1, -1], [2, 3, -1], [30, 20, 10]])
    probs = torch.tensor([[0.5, 0.5, 0], [0.2, 0.2, 0.6], [1, 0, 0], [0.9, 0.1, 0], [0.4, 0.3, 0.3]])
    signal = SparseSignal(ids, probs, torch.zeros(ROWS), with_tail=False)
    found = check(signal, SparseSignal(ids, probs.double(), torch.zeros(ROWS), with_tail=False), terms(KINDS[0], 1.0))
    assert float(found[4]) == float((student()[0] @ student()[1].T).argmax(1).eq(torch.tensor([0, 7, 1, 2, 30])).sum())


def test_all_entries_are_kept() -> None:
    probs = (dense().features[0] @ dense().weights[0].T).softmax(1)
    ids = torch.arange(ENTRIES).repeat(ROWS, 1)
    check(*(SparseSignal(ids, each, torch.zeros(ROWS)) for each in (probs, probs.double())), terms(KINDS[1], 1.0))


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_distributions_far_apart_give_finite_values_and_gradients(divergence: Divergence) -> None:
    found = check(dense(scale=50.0), in_double(dense(scale=50.0)), terms(divergence, 1.0), student(scale=50.0))
    assert all(each.isfinite().all() for each in found)


class Baton:
    """Ranks as threads of which one runs at a time, for the interpreter patches modules: the others wait in a collective."""

    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.barrier = threading.Barrier(size, timeout=60)
        self.parts: list[Tensor] = [torch.empty(0)] * size
        self.collectives = 0


@dataclass(frozen=True)
class BatonGroup:
    rank: int
    size: int
    baton: Baton

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.baton.parts[self.rank] = tensor.detach().clone()
        self.baton.collectives += self.rank == 0
        self.baton.lock.release()
        self.baton.barrier.wait()
        total = torch.stack(self.baton.parts).sum(0)
        self.baton.barrier.wait()
        self.baton.lock.acquire()
        return tensor.copy_(total)


def on_two_ranks(function: Callable[[VocabularySlice], list[Tensor]]) -> tuple[list[list[Tensor]], int]:
    """What each rank returns, and the number of collectives. One rank has a single entry."""
    baton, ends = Baton(2), (0, 1, ENTRIES)

    def run(rank: int) -> list[Tensor]:
        with baton.lock:
            return function(VocabularySlice(ends[rank], ends[rank + 1], ENTRIES, BatonGroup(rank, 2, baton)))

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2))), baton.collectives


@pytest.mark.parametrize("signal", ["none", "r_drop", "dense", "sparse"])
def test_a_vocabulary_in_slices(signal: str) -> None:
    """The same results on both ranks, and no collective more than without Triton: for the loss and the features' gradient."""
    features, weight, labels = two_passes() if signal == "r_drop" else student()
    weighted = {"label_smoothing": 0.1, "token_weights": torch.linspace(0.2, 1.7, ROWS)}
    learning = {"terms": terms(KINDS[3], 2.5), "selected": SELECTED}
    cases: dict[str, tuple[Callable[..., Any], list[Any], dict[str, Any], int]] = {
        "none": (linear_cross_entropy, [], weighted, 2),
        "r_drop": (linear_r_drop, [], {**weighted, "alpha": 1.5}, 2 * ROWS),
        "dense": (linear_distillation, [dense()], learning, 4),
        "sparse": (linear_distillation, [top_k(dense(), 2.5)], learning, 2),
    }
    function, arguments, options, of_chunks = cases[signal]

    def run(vocabulary: VocabularySlice) -> list[Tensor]:
        own = vocabulary.rows(weight.detach()).clone().requires_grad_()
        return outcome(
            function, [features.detach().clone().requires_grad_(), own, labels, *arguments], vocabulary=vocabulary, **options
        )

    whole = outcome(function, [features, weight, labels, *arguments], **options)
    ranks, collectives = on_two_ranks(run)
    for part, (start, stop) in zip(ranks, ((0, 1), (1, ENTRIES)), strict=True):
        assert_close(part, [*whole[:-1], whole[-1][start:stop]])
    assert collectives == of_chunks + 1
