"""The checks of `tests/gpu/` at toy size on the CPU: they run, they measure what they say, and they cover what there is."""

from __future__ import annotations

import pytest
import torch

from dstrain.ops.kernels import OPS, TRAINING_ATTENTION, kernel_names
from tests.gpu.checks import LossInputs, LossSize, attention_of, packed_step, peak_bytes, second_step, seconds_of
from tests.gpu.kernel_checks import CHECKS, error_of
from tests.unit.objectives.test_no_waiting import MODELS, OBJECTIVES, batch_for, train_module

CPU = torch.device("cpu")


def test_a_step_is_repeated() -> None:
    larger = MODELS.widened(2)
    module = train_module(larger.student, OBJECTIVES["forward_kl"](larger))
    values = second_step(module, [batch_for("forward_kl")], CPU)
    assert len(values) == 1 + len(list(module.parameters()))
    assert all(value.isfinite().all() for value in values)


def test_attention_that_is_not_flash_is_seen_by_its_name() -> None:
    with TRAINING_ATTENTION.forced("scaled_dot_product_attention"):
        names = attention_of(packed_step(CPU, torch.float32, width=16), CPU)
    assert "aten::scaled_dot_product_attention" in names.other
    assert not names.flash


def test_memory_is_counted_and_the_chunked_loss_takes_a_fifth() -> None:
    inputs = LossInputs.of(LossSize(tokens=128, width=8, entries=700, chunk_tokens=16), CPU, torch.float32)
    naive = peak_bytes(inputs.all_logits_at_once, CPU)
    assert 3 * 128 * 700 * 4 <= naive < 8 * 128 * 700 * 4, "logits, their logarithms and gradients"
    assert 16 * 700 * 4 < peak_bytes(inputs.cross_entropy, CPU) <= naive / 5
    assert peak_bytes(lambda: torch.zeros(1000, dtype=torch.int64).neg(), CPU) == 16_000


def test_each_call_is_timed_and_the_first_is_left_out() -> None:
    inputs, calls = LossInputs.of(LossSize(tokens=8, width=4, entries=20, chunk_tokens=4), CPU, torch.float32), []
    timed = {"kd": inputs.distillation, "ce": inputs.cross_entropy, "note": lambda: calls.append(1)}
    assert all(seconds > 0 for seconds in seconds_of(timed, CPU, rounds=2).values())
    assert len(calls) == 3


def test_every_kernel_of_triton_has_a_check() -> None:
    assert set(CHECKS) == {name for name in OPS if "triton" in kernel_names(name)}


def test_an_error_is_a_share_of_the_largest_value_and_nan_is_none_of_them() -> None:
    exact = torch.tensor([0.0, -200.0], dtype=torch.float64)
    assert error_of([torch.tensor([2.0, -200.0])], [exact]) == pytest.approx(0.01)
    assert error_of([torch.tensor([0.5])], [torch.zeros(1, dtype=torch.float64)]) == 0.5
    assert error_of([torch.tensor([0.0, torch.nan])], [exact]) == torch.inf
