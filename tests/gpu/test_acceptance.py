"""What training on one H200 has to reach: flash attention, a loss that is fast, small and exact, little lost memory, speed.

`tools/README.md` lists the limits. The speed goals are those of an H200; on another GPU they are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from dstrain.ops.chunk_size import resolve_chunk_tokens
from dstrain.ops.kernels import CROSS_ENTROPY, DENSE_DISTILLATION
from tests.gpu.checks import (
    LossInputs,
    LossSize,
    attention_of,
    bfloat16_gradient_errors,
    need_memory,
    packed_step,
    peak_bytes,
    seconds_of,
)
from tests.paths import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")
ENTRIES = [65_536, 131_072]
KERNELS = ["torch", "triton"]


def loss_inputs(entries: int) -> LossInputs:
    """Cut as a recipe's default cuts them."""
    size = LossSize(8_192, 1_024, entries, resolve_chunk_tokens("auto", "cuda", entries))
    return LossInputs.of(size, GPU, torch.bfloat16)


def test_a_packed_step_runs_flash_attention_and_no_other() -> None:
    names = attention_of(packed_step(GPU, torch.bfloat16, width=128), GPU)
    assert {way for way in ("flash_fwd", "flash_bwd") if any(way in name for name in names.flash)} == {"flash_fwd", "flash_bwd"}
    assert not names.other


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("entries", ENTRIES)
def test_the_loss_is_as_fast_as_all_logits_at_once_in_a_fifth_of_the_memory(entries: int, kernel: str) -> None:
    need_memory(60)
    inputs = loss_inputs(entries)
    calls = {"chunked": inputs.cross_entropy, "naive": inputs.all_logits_at_once}
    with CROSS_ENTROPY.forced(kernel):
        memory = {name: peak_bytes(call, GPU) for name, call in calls.items()}
        seconds = seconds_of(calls, GPU, rounds=9)
    print({name: f"{1000 * seconds[name]:.1f} ms, {memory[name] / 2**30:.2f} GiB" for name in calls})
    assert seconds["chunked"] <= seconds["naive"]
    assert memory["chunked"] <= memory["naive"] / 5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("entries", ENTRIES)
def test_dense_distillation_takes_little_longer_than_cross_entropy(entries: int, kernel: str) -> None:
    """A teacher as wide as the student adds one product of their four; the rest is reading logits."""
    inputs = loss_inputs(entries)
    with CROSS_ENTROPY.forced(kernel), DENSE_DISTILLATION.forced(kernel):
        seconds = seconds_of({"distillation": inputs.distillation, "cross_entropy": inputs.cross_entropy}, GPU, rounds=9)
    print({name: f"{1000 * each:.1f} ms" for name, each in seconds.items()})
    assert seconds["distillation"] <= 2.2 * seconds["cross_entropy"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_in_bfloat16_are_near_those_in_float64(kernel: str) -> None:
    need_memory(40)
    with CROSS_ENTROPY.forced(kernel):
        loss, *gradients = bfloat16_gradient_errors(GPU, tokens=2_048, width=64, entries=65_536, chunk_tokens=1_024)
    assert loss < 1e-5
    assert max(gradients) < 2e-3


def row_of_the_bench(name: str, steps: int) -> dict[str, float]:
    """In a process of its own, whose allocator nothing else has used."""
    variables = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}  # the tests' own choice of the CPU
    command = [sys.executable, ROOT / "tools" / "bench_gpu.py", "--rows", name, "--steps", str(steps), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**variables, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    row: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    print(row)
    return row


def test_little_memory_is_lost_between_tensors_of_a_thousand_shapes() -> None:
    """If it fails, PYTORCH_ALLOC_CONF=expandable_segments:True is the remedy to measure."""
    assert row_of_the_bench("random_shapes", 1_000)["reserved_share"] <= 1.15


@pytest.mark.parametrize(
    ("row", "figure", "goal"),
    [
        ("big_4k_kernels", "tokens_per_second", 250_000),
        ("big_32k_kernels", "tokens_per_second", 330_000),
        ("lm_1300m_kernels", "mfu", 0.50),
    ],
)
def test_training_reaches_its_speed(row: str, figure: str, goal: float) -> None:
    name = torch.cuda.get_device_name(GPU)
    if "H200" not in name:
        pytest.skip(f"the goals are of an H200, this is {name}")
    assert row_of_the_bench(row, 20)[figure] >= goal
