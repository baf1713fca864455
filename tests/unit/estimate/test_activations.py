"""Bytes that a forward pass keeps: by formula, and as autograd and operations say; and the peak of forward and backward."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from dstrain.estimate.activations import activations
from dstrain.estimate.loss import loss_bytes
from dstrain.estimate.planner import RankMemory
from dstrain.estimate.states import States
from dstrain.estimate.workload import ParallelLayout, Workload
from dstrain.models.config import ModelConfig
from tests.unit.estimate.cases import CHUNK, MODELS, NO_SHARDING, VOCABULARY, Case, LiveStorages, saved_bytes

NOTHING = States(0, 0, 0, 0, 0, 0)


def estimated(case: Case) -> RankMemory:
    return RankMemory(NOTHING, activations(case.workload, case.layout, padded=False), loss_bytes(case.workload, case.layout))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("precision", "rows", "source", "target"), [("fp32", 4, 50, 44), ("bf16", 4, 50, 44), ("bf16", 2, 220, 230)]
)
def test_autograd_saves_what_the_formula_says(name: str, precision: str, rows: int, source: int, target: int) -> None:
    case = Case(name, precision, rows=rows, source=source, target=target, packed=rows == 2)
    memory = estimated(case)
    assert memory.activations.kept + memory.loss.kept == pytest.approx(saved_bytes(case), rel=0.02)


def test_padding_of_the_source_is_a_bias_that_is_saved() -> None:
    case, padded = (Case("post-norm", "fp32", rows=3, source=60, target=50) for _ in range(2))
    lengths = padded.batch.source.lengths
    lengths[0] -= 2
    added = [activations(case.workload, case.layout, padded=each).kept for each in (False, True)]
    assert saved_bytes(padded) - saved_bytes(case) == pytest.approx(
        added[1] - added[0], abs=4 * 3 * 60
    )  # cross-attention has its own


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", "selective"), ("bf16", "full"), ("bf16", "none")])
def test_peak_and_rest_of_a_micro_batch(name: str, precision: str, checkpointing: str) -> None:
    """What lives after forward, and the highest of forward and backward, with gradients of parameters there already."""
    case = Case(name, precision, rows=4, source=100, target=110, checkpointing=checkpointing)
    for parameter in case.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    case.loss()  # makes the tables of positions
    with LiveStorages(case.own) as live:
        loss = case.loss()
        kept = live.bytes
        loss.backward()
    memory = estimated(case)
    assert memory.activations.kept + memory.loss.kept == pytest.approx(kept, rel=0.02)
    assert memory.total == pytest.approx(live.peak, rel=0.15)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_networks_on_parts_of_the_tokens_keep_their_input(checkpointing: str) -> None:
    case, whole = (
        Case("gelu, all dropouts", "fp32", rows=4, source=50, target=44, checkpointing=checkpointing, tiles=tiles)
        for tiles in (4, 1)
    )
    case.loss()
    with LiveStorages(case.own) as live:
        loss = case.loss()
        kept = live.bytes
        loss.backward()
    memory = estimated(case)
    assert memory.activations.kept + memory.loss.kept == pytest.approx(kept, rel=0.02)
    assert memory.activations.kept <= estimated(whole).activations.kept
    assert memory.activations.peak < estimated(whole).activations.peak


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_layer_on_a_gpu_keeps_what_the_literature_counts(tensor: int) -> None:
    """Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models": D (10 + 24 / t) bytes a token.

    Their scores are not kept by fused attention; it and the norms keep a few numbers a row instead. Their two masks have one byte
    an element, these two.
    """

    def kept(depth: int) -> float:
        tree: Any = {
            "kind": "decoder_only",
            "model_dim": 256,
            "decoder": {"depth": depth, "num_heads": 8, "ffn_dim": 1024},
            "norm_order": "pre",
            "activation": "gelu",
            "dropout": 0.1,
        }
        config: Any = TypeAdapter(ModelConfig).validate_python(tree)
        workload = Workload(config, VOCABULARY, "bf16", "cross_entropy", CHUNK, 10**9, 1, 512)
        layout = ParallelLayout(8, tensor, 1, 1024, "none", NO_SHARDING, "cuda")
        return activations(workload, layout).kept

    heads = 8 / tensor
    assert (kept(3) - kept(2)) / 1024 == pytest.approx(256 * (12 + 24 / tensor) + 4 * heads + 2 * 8)


def test_sequence_ranks_share_the_tokens() -> None:
    case = Case("pre-norm, dropout", "bf16", rows=4, source=64, target=64)
    whole, half = (activations(case.workload, ParallelLayout(2, 1, size, 256, "none", NO_SHARDING, "cuda")) for size in (1, 2))
    assert 0.5 < half.kept / whole.kept < 0.6  # attention's output is there before and after the exchange
    assert half.backward == pytest.approx(whole.backward / 2)


def test_offloaded_inputs_of_layers_are_on_the_host() -> None:
    case = Case("pre-norm, dropout", "bf16", rows=4, source=64, target=64)
    full, offload = (
        activations(case.workload, ParallelLayout(1, 1, 1, 256, mode, NO_SHARDING, "cuda")) for mode in ("full", "offload")
    )
    assert offload.host == full.kept - offload.kept == 4 * 256 * 64 * 2
    assert offload.recomputed == full.recomputed
