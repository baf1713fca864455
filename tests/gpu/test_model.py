"""The model on a GPU: the CPU's results, no waiting for the device inside a training forward, decoding with a cache."""

from collections.abc import Iterator

import pytest
import torch

from dstrain.batch import Sequences
from dstrain.data.batching.collate import PackedSize
from dstrain.objectives.cross_entropy import target_hidden
from tests.batches import EOS, collate
from tests.unit.models.build import sequences, small_config, small_model
from tests.unit.objectives.test_no_waiting import POSITIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")
SOURCE, TARGET = sequences(9, 1, 5), sequences(7, 3, 6)


@pytest.fixture(autouse=True)
def syncs_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("order", ["pre", "post"])
def test_logits_equal_the_cpus(order: str) -> None:
    model = small_model(small_config(norm_order=order))
    with torch.no_grad():
        expected = model.project(model(SOURCE, TARGET).hidden)
        model.to(GPU)
        found = model.project(model(SOURCE.to(GPU), TARGET.to(GPU)).hidden).cpu()
    real = TARGET.tokens != 1
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_forward_never_waits(dtype: torch.dtype, position: str) -> None:
    model = small_model(small_config(position=POSITIONS[position])).train().to(GPU, dtype)
    source, target = SOURCE.to(GPU), TARGET.to(GPU)
    model(source, target)
    torch.cuda.set_sync_debug_mode("error")
    model.project(model(source, target).hidden).float().logsumexp(-1).sum().backward()


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_packed_sequences_are_the_padded_ones(position: str, dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 by flash attention for packed sequences, with ALiBi by FlexAttention."""
    stack = {"depth": 2, "num_heads": 2, "ffn_dim": 64}
    config = small_config(model_dim=64, encoder=stack, decoder=stack, position={"kind": position}, dropout=0.0)
    model = small_model(config).train().to(GPU, dtype)
    pairs = [([5, 6, 7, EOS], [8, EOS]), ([EOS], [9, 5, 6, EOS])]
    padded, packed = (collate(pairs, packed=size).to(GPU) for size in (None, PackedSize(multiple=64)))
    found, expected = target_hidden(model, packed), target_hidden(model, padded)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found.float().square().sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_incremental_decoding_with_beams() -> None:
    model = small_model().to(GPU)
    source = SOURCE.to(GPU)
    history = torch.full((6, 1), 2, device=GPU)
    state = model.start(source, num_sentences=3, rows_per_sentence=2, max_length=6)
    for _ in range(6):
        logits = model.step(history[:, -1:], state)
        rows = torch.arange(3).repeat_interleave(2)
        whole = Sequences(history, torch.full((6,), history.shape[1], device=GPU))
        with torch.no_grad():
            expected = model.project(model(Sequences(source.tokens[rows], source.lengths[rows]), whole).hidden)
        torch.testing.assert_close(logits[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)
        swapped = torch.tensor([1, 0, 2, 2, 5, 4], device=GPU)
        state.reorder(swapped)
        history = torch.cat([history[swapped], logits[swapped, -1].argmax(-1, keepdim=True)], dim=1)
