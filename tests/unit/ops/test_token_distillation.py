"""The chunked projections and divergences against their reference, formulas of torch and finite differences."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.ops.divergence import Divergence, sparse_fit
from dstrain.ops.teacher_signal import DenseSignal, LogProbsSignal, SparseSignal
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation, reference_linear_distillation
from dstrain.ops.vocabulary import VocabularySlice

DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("total_variation"),
    *(Divergence("jensen_shannon", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    *(Divergence("skew_kl", alpha) for alpha in (0.1, 0.7)),
]
SHAPES = [(123, 16, 77), (5, 3, 2), (1, 1, 5)]


def terms(divergence: Divergence = DIVERGENCES[0], **changes: float) -> DistillationTerms:
    fields = {"temperature": 1.0, "hard_weight": 1.0, "kd_weight": 1.0, "label_smoothing": 0.1, **changes}
    return DistillationTerms(divergence, **fields)


def student(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    features = torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    return features, weight, labels


def dense(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float64, teachers: int = 1) -> DenseSignal:
    generator = torch.Generator().manual_seed(99)
    widths = range(7, 7 + teachers)
    return DenseSignal(
        features=[torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths],
        weights=[torch.randn(vocab_size, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths],
    )


def probabilities(signal: DenseSignal, temperature: float = 1.0) -> Tensor:
    pairs = zip(signal.features, signal.weights, strict=True)
    return torch.stack([F.softmax(features @ weight.T / temperature, 1) for features, weight in pairs]).mean(0)


def top_k_signal(probs: Tensor, count: int, *, tail: bool) -> SparseSignal:
    """Without a tail, its mass goes to the entries that are kept."""
    best = probs.topk(count, dim=1)
    kept = best.values.sum(1)
    return SparseSignal(best.indices, best.values if tail else best.values / kept[:, None], (1 - kept) * tail)


def log_probs(signal: DenseSignal, kept_at: float = 1.0, dtype: type[np.floating] = np.float64) -> LogProbsSignal:
    """All that a dense signal says, in pieces of 0, 1, 2, ... rows."""
    whole = probabilities(signal, kept_at).log().numpy().astype(dtype)
    ends = [count * (count + 1) // 2 for count in range(len(whole)) if count * (count + 1) // 2 < len(whole)]
    return LogProbsSignal(np.split(whole, ends), kept_at)


def draws(probs: Tensor, number: int, seed: int = 5) -> SparseSignal:
    """Sampled entries with their shares, in slots of which some stay unused."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros_like(probs)
    drawn = torch.multinomial(probs, number, replacement=True, generator=generator)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=probs.dtype))
    shares, ids = (counts / number).topk(min(number + 1, probs.shape[1]), dim=1)
    return SparseSignal(ids.masked_fill(shares == 0, -1), shares, torch.zeros(len(probs), dtype=probs.dtype))


def outcome(function, features, weight, labels, signal, *, scale: float = 1.0, selected: Tensor | None = None, **options):
    sums = function(features, weight, labels, signal, selected=selected, **{"chunk_tokens": 50, **options})
    return [*(value.detach() for value in sums), *torch.autograd.grad(scale * sums.loss, (features, weight))]


def assert_equals_the_reference(inputs, signal, *, rtol: float = 1e-11, **options) -> None:
    found, expected = (
        outcome(f, *inputs, signal, scale=0.37, **options) for f in (linear_distillation, reference_linear_distillation)
    )
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_equals_the_reference(shape, divergence, temperature) -> None:
    for smoothing, chunk_tokens, teachers in ((0.0, 1, 1), (0.1, 50, 1), (0.2, 4096, 3)):
        options = {"temperature": temperature, "label_smoothing": smoothing, "kd_weight": 0.7, "hard_weight": 0.4}
        assert_equals_the_reference(
            student(*shape),
            dense(shape[0], shape[2], teachers=teachers),
            terms=terms(divergence, **options),
            chunk_tokens=chunk_tokens,
        )


@pytest.mark.parametrize(("kept_at", "temperature"), [(1.0, 1.0), (1.0, 2.0), (2.0, 2.0), (2.0, 1.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
def test_kept_log_probabilities_are_the_dense_signal_at_any_temperature(divergence, kept_at, temperature) -> None:
    signal = dense(123, 77)
    for chunk_tokens in (1, 50, 4096):
        options = {"terms": terms(divergence, temperature=temperature), "chunk_tokens": chunk_tokens}
        expected = outcome(linear_distillation, *student(123, 16, 77), signal, **options)
        found = outcome(linear_distillation, *student(123, 16, 77), log_probs(signal, kept_at), **options)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
        rounded = log_probs(signal, kept_at, np.float16)
        assert_equals_the_reference(student(123, 16, 77), rounded, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
def test_single_precision_keeps_five_digits(divergence) -> None:
    inputs, signal = student(123, 16, 77, torch.float32), dense(123, 77, torch.float32)
    assert_equals_the_reference(inputs, signal, terms=terms(divergence, temperature=2.0), rtol=1e-5)


@pytest.mark.parametrize("kind", ["top", "all", "tail", "draws"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_equals_the_reference(shape, smoothing, kind) -> None:
    probs = probabilities(dense(shape[0], shape[2]))
    count = shape[2] if kind == "all" else shape[2] // 2
    signal = draws(probs, 9) if kind == "draws" else top_k_signal(probs, count, tail=kind == "tail")
    for chunk_tokens, temperature in ((1, 1.0), (50, 1.0), (50, 1.5)):
        options = {"temperature": temperature, "label_smoothing": smoothing, "kd_weight": 0.7, "hard_weight": 0.4}
        assert_equals_the_reference(student(*shape), signal, terms=terms(**options), chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
@pytest.mark.parametrize("shape", SHAPES)
def test_top_k_entries_with_a_tail_give_every_divergence_over_buckets(shape, divergence, temperature) -> None:
    signal = top_k_signal(probabilities(dense(shape[0], shape[2]), temperature), shape[2] // 2, tail=True)
    for smoothing, chunk_tokens in ((0.0, 1), (0.1, 50)):
        options = {"temperature": temperature, "label_smoothing": smoothing, "kd_weight": 0.7, "hard_weight": 0.4}
        assert_equals_the_reference(student(*shape), signal, terms=terms(divergence, **options), chunk_tokens=chunk_tokens)
    single = top_k_signal(probabilities(dense(shape[0], shape[2], torch.float32), temperature), shape[2] // 2, tail=True)
    assert_equals_the_reference(
        student(*shape, torch.float32), single, terms=terms(divergence, temperature=temperature), rtol=2e-5
    )


def test_a_tail_goes_to_the_others_as_the_student_has_them() -> None:
    """The gradient of forward_kl is p less the distribution that it has as its target."""
    own = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    signal = SparseSignal(torch.tensor([[3, 0], [1, -1]]), torch.tensor([[0.5, 0.2], [1.0, 0.0]]), torch.tensor([0.3, 0.0]))
    expected = torch.tensor([[0.2, 0.3 * 0.4, 0.3 * 0.6, 0.5], [0.0, 1.0, 0.0, 0.0]])
    grad = sparse_fit(Divergence("forward_kl"), own.log(), signal, VocabularySlice.whole(4).reductions()).logits_grad_()
    torch.testing.assert_close(own - grad, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
def test_the_more_tokens_are_kept_the_nearer_the_divergence_to_the_whole_from_below(divergence) -> None:
    inputs, signal = student(123, 16, 77), dense(123, 77)
    kept = [top_k_signal(probabilities(signal), count, tail=True) for count in (1, 4, 16, 64)]
    values = [outcome(linear_distillation, *inputs, each, terms=terms(divergence))[2].item() for each in (*kept, signal)]
    assert values == sorted(values)
    assert 0 < values[0] < 0.7 * values[-1]
    assert values[-2] > 0.9 * values[-1]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
def test_all_entries_kept_are_the_dense_signal(divergence, temperature) -> None:
    signal, options = dense(123, 77), {"terms": terms(divergence, temperature=temperature)}
    expected = outcome(linear_distillation, *student(123, 16, 77), signal, **options)
    kept = top_k_signal(probabilities(signal, temperature), 77, tail=False)
    found = outcome(linear_distillation, *student(123, 16, 77), kept, **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_drawn_tokens_give_the_dense_gradient_on_average() -> None:
    inputs, signal = student(64, 8, 23), dense(64, 23)
    probs, only_kd = probabilities(signal), terms(hard_weight=0.0, label_smoothing=0.0)
    expected = outcome(linear_distillation, *inputs, signal, terms=only_kd)[-1]
    drawn = [outcome(linear_distillation, *inputs, draws(probs, 12, seed), terms=only_kd)[-1] for seed in range(200)]
    error = [(torch.stack(drawn[:n]).mean(0) - expected).norm() / expected.norm() for n in (2, 200)]
    assert error[1] < 0.2 * error[0]
    truncated = outcome(linear_distillation, *inputs, top_k_signal(probs, 6, tail=False), terms=only_kd)[-1]
    assert (truncated - expected).norm() / expected.norm() > 3 * error[1]


def test_equals_torch() -> None:
    """torch's own kl_div and cross_entropy, which smooths over V entries instead of V - 1."""
    features, weight, labels = student(123, 16, 77)
    signal = dense(123, 77)
    found = outcome(linear_distillation, features, weight, labels, signal, terms=terms(temperature=3.0, kd_weight=0.6))
    logits, teacher = features @ weight.T, signal.features[0] @ signal.weights[0].T
    hard = F.cross_entropy(logits, labels, label_smoothing=0.1 * 77 / 76, reduction="sum")
    kd = 9 * F.kl_div(F.log_softmax(logits / 3, 1), F.log_softmax(teacher / 3, 1), log_target=True, reduction="sum")
    nll = F.cross_entropy(logits, labels, reduction="none")
    agreement = (logits.argmax(1) == teacher.argmax(1)).sum()
    expected = [hard + 0.6 * kd, hard, kd, nll, agreement.double(), torch.tensor(123.0).double()]
    gradients = torch.autograd.grad(expected[0], (features, weight))
    torch.testing.assert_close(found, [*(value.detach() for value in expected), *gradients], rtol=1e-11, atol=1e-11)


def test_jensen_shannon_tends_to_both_divergences() -> None:
    """GKD: divided by beta it goes to forward KL at 0, divided by 1 - beta to reverse KL at 1."""
    inputs, signal = student(23, 8, 19), dense(23, 19)

    def kd(kind: str, parameter: float = 0.0) -> float:
        return linear_distillation(
            *inputs, signal, terms=terms(Divergence(kind, parameter)), chunk_tokens=50, selected=None
        ).kd.item()

    small = 1e-9
    assert kd("jensen_shannon", small) / small == pytest.approx(kd("forward_kl"), rel=2e-3)
    assert kd("jensen_shannon", 1 - small) / small == pytest.approx(kd("reverse_kl"), rel=2e-3)
    assert kd("jensen_shannon", 0.0) == kd("forward_kl") != kd("reverse_kl") == kd("jensen_shannon", 1.0)
    assert 0 < kd("jensen_shannon", 0.5) < 23 * math.log(2)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
def test_a_student_equal_to_its_teacher_learns_nothing_from_it(divergence) -> None:
    features, weight, labels = student(23, 8, 19)
    signal = DenseSignal([features.detach()], [weight.detach()])
    only_kd = terms(divergence, hard_weight=0.0, temperature=2.0, label_smoothing=0.0)
    loss, _, kd, _, agreement, _, *gradients = outcome(linear_distillation, features, weight, labels, signal, terms=only_kd)
    assert abs(loss) < 1e-12
    assert abs(kd) < 1e-12
    assert agreement == 23
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_the_teachers_of_an_ensemble_are_averaged_as_probabilities() -> None:
    signal = dense(23, 19, teachers=2)
    options = {"terms": terms(temperature=2.0)}
    found = outcome(linear_distillation, *student(23, 8, 19), signal, **options)
    kept = top_k_signal(probabilities(signal, 2.0), 19, tail=False)
    torch.testing.assert_close(found, outcome(linear_distillation, *student(23, 8, 19), kept, **options), rtol=1e-11, atol=1e-11)


def test_only_selected_rows_learn_from_the_teacher() -> None:
    features, weight, labels = student(60, 8, 19)
    signal, chosen = dense(60, 19), torch.arange(60) % 3 == 0
    weights = chosen * 0.5
    for selected in (chosen, weights):
        assert_equals_the_reference((features, weight, labels), signal, terms=terms(), selected=selected)
    found = outcome(linear_distillation, features, weight, labels, signal, terms=terms(), selected=chosen)
    apart = replace(signal, features=[signal.features[0][chosen]])
    part = linear_distillation(features[chosen], weight, labels[chosen], apart, terms=terms(), chunk_tokens=50, selected=None)
    hard = linear_cross_entropy(features, weight, labels, label_smoothing=0.1, chunk_tokens=50)
    assert found[2].item() == pytest.approx(part.kd.item())
    assert found[5] == chosen.sum() == part.selected
    assert found[1].item() == pytest.approx(hard[0].item())
    torch.testing.assert_close(found[3], hard[1])
    none = outcome(
        linear_distillation, features, weight, labels, signal, terms=terms(), selected=torch.zeros(60, dtype=torch.bool)
    )
    plain = torch.autograd.grad(hard[0], (features, weight))
    torch.testing.assert_close([none[0], *none[6:]], [hard[0].detach(), *plain])


def test_no_token_gives_exactly_zero() -> None:
    sparse = SparseSignal(torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2), torch.ones(0))
    for signal in (dense(0, 9), sparse, LogProbsSignal([], 1.0)):
        for value in outcome(linear_distillation, *student(0, 4, 9), signal, terms=terms(), chunk_tokens=4):
            assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("divergence", [*DIVERGENCES[:2], *DIVERGENCES[5:6], DIVERGENCES[-1]], ids=lambda d: d.kind)
def test_gradients_equal_finite_differences(divergence) -> None:
    features, weight, labels = student(7, 4, 9)
    options = {"terms": terms(divergence, temperature=1.7), "chunk_tokens": 3, "selected": None}
    function = lambda f, w: linear_distillation(f, w, labels, dense(7, 9), **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, (features, weight))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.parameter}")
def test_certain_models_have_finite_losses(divergence) -> None:
    """Logits 200 apart: probabilities that fp32 cannot tell from 0, on either side."""
    features, weight = (
        torch.tensor([[200.0], [-200.0]], requires_grad=True),
        torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True),
    )
    signal = DenseSignal([torch.tensor([[-200.0], [-200.0]])], [weight.detach()])
    values = outcome(
        linear_distillation, features, weight, torch.tensor([0, 1]), signal, terms=terms(divergence, label_smoothing=0.0)
    )
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("divergence", [Divergence("forward_kl"), Divergence("skew_kl", 1e-3)], ids=lambda d: d.kind)
def test_a_student_surer_than_its_teacher_still_gets_its_gradient(divergence, smoothing, temperature) -> None:
    """Best entries 5 to 95 nats above all others, so that these have masses of e^-5 to 0 in fp32; the slopes are those of
    fp64."""
    gaps, generator = torch.arange(5.0, 96.0, 5.0), torch.Generator().manual_seed(2)
    logits = torch.randn(len(gaps), 1000, generator=generator)
    signal = top_k_signal(torch.softmax(torch.randn(len(gaps), 1000, generator=generator), 1), 12, tail=True)
    ids, probs, tail = signal.ids, signal.probs, torch.where(torch.arange(len(gaps)) % 4 == 3, 0.0, 0.05)
    probs[:, 1], tail[2] = probs[:, 0], 1e-4
    probs[1::2, 5], ids[1::2, 5] = 0.0, -1  # a slot that is not used
    signal = SparseSignal(ids, probs * ((1 - tail) / probs.sum(1))[:, None], tail)
    for row, difference in enumerate(gaps):
        logits[row, ids[row][ids[row] >= 0]] += difference
    logits *= temperature
    labels = torch.randint(1000, (len(gaps),), generator=generator)
    options = {"terms": terms(divergence, temperature=temperature, hard_weight=0.3, label_smoothing=smoothing), "chunk_tokens": 5}
    identity = torch.eye(1000)
    found = outcome(linear_distillation, logits.requires_grad_(), identity.requires_grad_(), labels, signal, **options)
    exact = logits.detach().double().requires_grad_(), identity.detach().double().requires_grad_()
    expected = outcome(reference_linear_distillation, *exact, labels, signal, **options)
    torch.testing.assert_close([value.double() for value in found[:4]], expected[:4], rtol=1e-5, atol=0)
    others = torch.ones(len(gaps), 1000).scatter_(1, ids.clamp_min(0), 0.0).scatter_(1, labels[:, None], 0.0).bool()
    torch.testing.assert_close(found[6].double(), expected[6], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(found[6].double()[others], expected[6][others], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_have_a_full_precision_loss(dtype) -> None:
    features, weight, labels = student(123, 16, 77, torch.float32)
    inputs = features.detach().to(dtype).requires_grad_(), (weight.detach() / 8).to(dtype).requires_grad_(), labels
    signal = dense(123, 77, dtype)
    found = outcome(linear_distillation, *inputs, signal, terms=terms(temperature=2.0))
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs[:2]]
    exact_signal = DenseSignal([signal.features[0].double()], [signal.weights[0].double()])
    expected = outcome(reference_linear_distillation, *exact, labels, exact_signal, terms=terms(temperature=2.0))
    assert [value.dtype for value in found] == [torch.float32] * 6 + [dtype] * 2
    step = torch.finfo(dtype).eps
    for number, (value, target) in enumerate(zip(found, expected, strict=True)):
        slack = 2 if number == 4 else step * target.abs().max().item()  # rounded logits may tie
        torch.testing.assert_close(value.double(), target, rtol=2 * step, atol=slack)


def test_autocast_is_only_the_students() -> None:
    inputs, signal = student(23, 16, 77, torch.float32), dense(23, 77, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(linear_distillation, *inputs, signal, terms=terms())
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:2]]
    expected = outcome(linear_distillation, *halves, inputs[2], signal, terms=terms())
    torch.testing.assert_close(found, [value.float() for value in expected], rtol=0, atol=0)


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True), (False, False)])
def test_only_required_gradients_are_made(learns) -> None:
    features, weight, labels = student(23, 8, 19)
    signal = dense(23, 19)
    expected = outcome(linear_distillation, features, weight, labels, signal, terms=terms())
    features.requires_grad_(learns[0])
    weight.requires_grad_(learns[1])
    loss = linear_distillation(features, weight, labels, signal, terms=terms(), chunk_tokens=5, selected=None).loss
    assert loss.requires_grad == any(learns)
    if loss.requires_grad:
        loss.backward()
    for tensor, gradient, learnt in zip((features, weight), expected[6:], learns, strict=True):
        assert (tensor.grad is None) == (not learnt)
        if learnt:
            torch.testing.assert_close(tensor.grad, gradient)
    with torch.no_grad():
        assert not linear_distillation(
            features, weight, labels, signal, terms=terms(), chunk_tokens=5, selected=None
        ).loss.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["dense", "log_probs", "top"])
def test_tied_entries_agree_once(kind, temperature) -> None:
    """Logits rounded to 16 bits tie often: here 2 and 6 of 9 entries for the student; 2, 5, 6 are the teacher's best."""
    logits, best = torch.zeros(3, 9), torch.tensor([2, 5, 6])
    logits[:, [2, 6]] = 3.0
    teacher = F.one_hot(best, 9).double() * 4
    whole = DenseSignal([teacher], [torch.eye(9, dtype=torch.float64)])
    signal = {
        "dense": whole,
        "log_probs": log_probs(whole),
        "top": top_k_signal(probabilities(whole, temperature), 4, tail=True),
    }[kind]
    inputs = (
        logits.double().requires_grad_(),
        torch.eye(9, dtype=torch.float64).requires_grad_(),
        torch.zeros(3, dtype=torch.int64),
    )
    for function in (linear_distillation, reference_linear_distillation):
        assert outcome(function, *inputs, signal, terms=terms(temperature=temperature))[4] == 1


@pytest.mark.parametrize("kind", ["reverse_kl", "jensen_shannon", "total_variation", "skew_kl"])
def test_a_signal_without_the_mass_of_other_entries_gives_only_forward_kl(kind) -> None:
    signal = replace(draws(probabilities(dense(5, 9)), 3), with_tail=False)
    message = f"{kind} needs the mass of all vocabulary entries, but this signal lacks that of the entries left out"
    for function in (linear_distillation, reference_linear_distillation):
        with pytest.raises(ValueError, match=message):
            function(*student(5, 4, 9), signal, terms=terms(Divergence(kind, 0.5)), chunk_tokens=3, selected=None)


PEAK = """
import sys

import numpy as np
import torch
from dstrain.ops.divergence import Divergence
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation
from dstrain.ops.teacher_signal import DenseSignal, LogProbsSignal, SparseSignal

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

features, weight = torch.randn(4096, 16, requires_grad=True), torch.randn(32768, 16, requires_grad=True)
labels, (kind, temperature) = torch.randint(32768, (4096,)), (sys.argv[1], float(sys.argv[2]))
ids, tail = torch.arange(12).expand(4096, 12), torch.full((4096,), 0.4 if kind == "top" else 0.0)
signal = {
    "dense": DenseSignal([torch.randn(4096, 8)], [torch.randn(32768, 8)]),
    "log_probs": LogProbsSignal([np.full((64, 32768), -10, np.float16) for _ in range(64)], 1.0),
    "sampled": SparseSignal(ids, torch.full(ids.shape, 1 / 12), tail),
    "top": SparseSignal(ids, torch.full(ids.shape, 0.05), tail),
}[kind]
divergence = Divergence("forward_kl") if kind == "sampled" else Divergence("jensen_shannon", 0.5)
terms = DistillationTerms(divergence, temperature, 1.0, 1.0, 0.1)
(features[:64] @ weight[:64].T).sum().backward()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew from what is resident now
before = peak_kib()
linear_distillation(features, weight, labels, signal, terms=terms, chunk_tokens=128, selected=None).loss.backward()
assert weight.grad.abs().sum() > 0
print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of the resident memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "temperature", "most"),
    [("dense", 2.0, 200), ("log_probs", 1.0, 200), ("log_probs", 2.0, 200), ("sampled", 1.0, 64), ("top", 1.0, 64)],
)
def test_logits_never_exist_in_full(kind: str, temperature: float, most: int) -> None:
    """4,096 tokens x 32,768 entries are 512 MiB in fp32, for each of two models; 128 at a time are 16 MiB, held ten times, or
    thrice if the teacher has few entries."""
    plain = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once, so that no hole is counted
    run = subprocess.run(
        [sys.executable, "-c", PEAK, kind, str(temperature)], capture_output=True, text=True, timeout=120, env=plain
    )
    assert run.returncode == 0, run.stderr
    assert 16 < int(run.stdout) / 1024 < most
