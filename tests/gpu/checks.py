"""What is asked of a GPU, as functions of the device and of sizes: the default suite calls them at toy size on the CPU.

So neither a renamed function nor a wrong shape waits for a GPU to be noticed; the limits themselves are asserted by the tests
beside this file only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dstrain.batch import Batch
from dstrain.data.batching.collate import PackedSize
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.device_time import seconds_between, timestamp
from dstrain.ops.divergence import Divergence
from dstrain.ops.teacher_signal import DenseSignal
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy, reference_linear_cross_entropy
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation
from tests.batches import EOS, collate
from tests.unit.models.build import small_config, small_model
from tests.unit.objectives.test_no_waiting import outcome

Call = Callable[[], object]


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Drawn on the device: at real sizes a CPU would take seconds."""
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def need_memory(gib: int) -> None:
    """Skip the test of a smaller GPU."""
    if torch.cuda.get_device_properties(0).total_memory < gib << 30:
        pytest.skip(f"the reference needs a GPU of {gib} GiB")


# Waiting


def on_device(module: TrainModule, device: torch.device, dtype: torch.dtype) -> TrainModule:
    """Student, objective and teachers."""
    for teacher in getattr(getattr(module.objective, "signals", None), "teachers", []):
        teacher.model.to(device, dtype)
    return module.to(device, dtype)


def second_step(module: TrainModule, batches: Sequence[Batch], device: torch.device, mode: str = "error") -> list[Tensor]:
    """Loss and gradients of a step of prepared batches, in which waiting for a GPU is an error; or a warning.

    Not of the first: tables are made, libraries start and kernels are compiled in it.
    """
    if device.type == "cuda":
        batches = [batch.pinned() for batch in batches]
    for each in ("default", mode):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(each)
        loss, gradients = outcome(module, [batch.to(device) for batch in batches])
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return [loss, *gradients]


# Which attention runs

OTHER_ATTENTION = ("efficient_attention", "fmha", "attention_math", "scaled_dot_product", "cudnn_attention", "sdpa")
"""In the names of operators and kernels: torch's other ways, which read a mask or hold all scores."""


class AttentionNames(NamedTuple):
    """Names of operators and kernels. flash: of flash attention's own kernels, which only a GPU has."""

    flash: frozenset[str]
    other: frozenset[str]


def attention_of(step: Call, device: torch.device) -> AttentionNames:
    """Of the second of two equal steps."""
    step()
    wait(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
        wait(device)
    names = {event.name for event in profiler.events() or []}
    flash = frozenset(name for name in names if "flash_fwd" in name or "flash_bwd" in name)
    return AttentionNames(flash, frozenset(name for name in names if any(part in name.lower() for part in OTHER_ATTENTION)))


def packed_step(device: torch.device, dtype: torch.dtype, *, width: int) -> Call:
    """Forward and backward of packed sequences by an encoder-decoder with two heads a layer, without dropout of probabilities."""
    stack = {"depth": 1, "num_heads": 2, "ffn_dim": width}
    config = small_config(model_dim=width, encoder=stack, decoder=stack, dropout=0.1, position={"kind": "rotary"})
    module = TrainModule(small_model(config).train(), build_cross_entropy(CrossEntropyConfig())).to(device, dtype)
    pairs = [([5, 6, 7, EOS], [8, EOS]), ([EOS], [9, 5, 6, EOS])]
    batch = collate(pairs, packed=PackedSize(64)).to(device)

    def step() -> None:
        module(batch).loss_sum.backward()

    return step


# Time and memory of the loss


class LossSize(NamedTuple):
    """tokens of `width` features over so many vocabulary entries, `chunk_tokens` at one time."""

    tokens: int
    width: int
    entries: int
    chunk_tokens: int


@dataclass(frozen=True)
class LossInputs:
    """Of a student, and of a teacher of the same width."""

    size: LossSize
    student: tuple[Tensor, Tensor, Tensor]
    teacher: DenseSignal

    @classmethod
    def of(cls, size: LossSize, device: torch.device, dtype: torch.dtype) -> LossInputs:
        """Logits have a standard deviation of 4."""
        scale = 4 / size.width**0.5
        parts = [
            random(device, rows, size.width, seed=seed).mul_(factor).to(dtype)
            for seed, (rows, factor) in enumerate(2 * [(size.tokens, 1.0), (size.entries, scale)])
        ]
        labels = torch.arange(size.tokens, device=device) * 7919 % size.entries
        return cls(size, (parts[0].requires_grad_(), parts[1].requires_grad_(), labels), DenseSignal([parts[2]], [parts[3]]))

    def cross_entropy(self, function: Callable[..., tuple[Tensor, Tensor]] = linear_cross_entropy) -> None:
        """Loss and gradients."""
        loss, _ = function(*self.student, label_smoothing=0.1, chunk_tokens=self.size.chunk_tokens)
        torch.autograd.grad(loss, self.student[:2])

    def all_logits_at_once(self) -> None:
        """The same by autograd."""
        self.cross_entropy(reference_linear_cross_entropy)

    def distillation(self) -> None:
        """From the teacher and from labels."""
        terms = DistillationTerms(Divergence("forward_kl"), 2.0, hard_weight=0.5, kd_weight=0.5, label_smoothing=0.1)
        sums = linear_distillation(*self.student, self.teacher, terms=terms, selected=None, chunk_tokens=self.size.chunk_tokens)
        torch.autograd.grad(sums.loss, self.student[:2])


def seconds_of(calls: Mapping[str, Call], device: torch.device, *, rounds: int) -> dict[str, float]:
    """The median of each, in turns, after one call of each. On a GPU: of its work."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + rounds):
        for name, call in calls.items():
            begin = timestamp(device)
            call()
            seconds = seconds_between(begin, timestamp(device))
            if number > 0:
                taken[name].append(seconds)
    return {name: median(each) for name, each in taken.items()}


def peak_bytes(call: Call, device: torch.device) -> int:
    """What a call holds at most of the memory that tensors are taken from, beyond what was taken before."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Iterable[Any] = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


# Precision of the loss


def bfloat16_gradient_errors(device: torch.device, *, tokens: int, width: int, entries: int, chunk_tokens: int) -> list[float]:
    """Of the loss (relative), and of the gradients of features and weight by the norm, against all logits in float64.

    Logits of a trained model, some 8 apart. Before autograd rounds gradients to the dtype of their inputs.
    """
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    features, weight = (normal(rows, width).bfloat16().requires_grad_() for rows in (tokens, entries))
    with torch.no_grad():
        labels = (features @ weight.T).float().add(normal(tokens, entries) * 4).argmax(1)
    options = {"label_smoothing": 0.1, "chunk_tokens": chunk_tokens}
    loss, _ = linear_cross_entropy(features, weight, labels, **options)
    exact_inputs = [each.detach().double().requires_grad_() for each in (features, weight)]
    exact, _ = reference_linear_cross_entropy(*exact_inputs, labels, **options)
    gradients = zip(loss.grad_fn.saved_tensors, torch.autograd.grad(exact, exact_inputs), strict=True)
    errors = [float((ours.double() - expected).norm() / expected.norm()) for ours, expected in gradients]
    assert all(ours.dtype == torch.float32 for ours in loss.grad_fn.saved_tensors)
    return [abs(float(loss.detach()) / float(exact.detach()) - 1), *errors]
