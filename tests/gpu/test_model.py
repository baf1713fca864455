"""The model on a GPU: the CPU's results, packed sequences, decoding with a cache."""

import pytest
import torch

from dstrain.batch import Sequences
from dstrain.data.batching.collate import PackedSize
from dstrain.objectives.cross_entropy import target_hidden
from tests.batches import EOS, collate
from tests.unit.models.build import sequences, small_config, small_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")
SOURCE, TARGET = sequences(9, 1, 5), sequences(7, 3, 6)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_logits_equal_the_cpus(order: str) -> None:
    model = small_model(small_config(norm_order=order))
    with torch.no_grad():
        expected = model.project(model(SOURCE, TARGET).hidden)
        model.to(GPU)
        found = model.project(model(SOURCE.to(GPU), TARGET.to(GPU)).hidden).cpu()
    real = TARGET.tokens != 1
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


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
