"""The CPU never waits inside a micro-batch: torch itself refuses to, for every position kind, objective and kind of teacher.

What the default suite tests on a pretended GPU (`tests/unit/objectives/test_no_waiting.py`), with the kernels of a real one.
Stored signals are in `test_distillation.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dstrain.batch import Batch
from dstrain.data.batching.collate import PackedSize
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from tests.batches import collate
from tests.gpu.checks import on_device, second_step
from tests.unit.objectives.test_no_waiting import (
    MODELS,
    OBJECTIVES,
    PAIRS,
    POSITIONS,
    SELECTIONS,
    SMALL,
    STACK,
    batch_for,
    train_module,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]
LARGER = MODELS.widened(8)


@pytest.fixture(autouse=True)
def syncs_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def never_waits(module: TrainModule, batches: list[Batch], dtype: torch.dtype) -> None:
    assert all(value.isfinite().all() for value in second_step(on_device(module, GPU, dtype), batches, GPU))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("position", POSITIONS)
def test_no_position_makes_a_micro_batch_wait(position: str, layout: str, dtype: torch.dtype) -> None:
    tree = {**SMALL, "kind": "encoder_decoder", "encoder": STACK, "position": POSITIONS[position], "model_dim": 128}
    module = train_module(tree, build_cross_entropy(CrossEntropyConfig()))
    never_waits(module, [collate(PAIRS, packed=PackedSize(64) if layout == "packed" else None)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", ["sinusoidal", "alibi", "rotary_none", "rotary_dynamic_yarn"])
def test_no_position_makes_a_language_model_wait(position: str, dtype: torch.dtype) -> None:
    tree = {**SMALL, "kind": "decoder_only", "position": POSITIONS[position], "model_dim": 128}
    module = train_module(tree, build_cross_entropy(CrossEntropyConfig()))
    never_waits(module, [collate(PAIRS, kind="decoder_only", packed=PackedSize(64))], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_makes_a_micro_batch_wait(objective: str, dtype: torch.dtype) -> None:
    """With one teacher beside the student, or two, or none."""
    module = train_module(LARGER.student, OBJECTIVES[objective](LARGER))
    never_waits(module, [batch_for(objective, 64), batch_for(objective, 64)], dtype)


def test_no_sampled_batch_makes_a_micro_batch_wait() -> None:
    module = train_module(LARGER.student, LARGER.distillation(LARGER.online(), on_policy={"fraction": 0.5}))
    never_waits(module, [replace(collate(PAIRS), sampled=True)], torch.bfloat16)


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda of: of["kind"])
def test_a_selection_waits_once_a_step(selection: dict[str, Any]) -> None:
    """Torch warns each time; its first warning of all is of the mode itself."""
    module = train_module(LARGER.student, LARGER.distillation(LARGER.online(), selection=selection))
    on_device(module, GPU, torch.bfloat16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        second_step(module, [collate(PAIRS), collate(PAIRS[1:], ids=[7, 8])], GPU, mode="warn")
    waits = [str(each.message) for each in seen if "called a synchronizing" in str(each.message)]
    assert len(waits) == 1, waits
