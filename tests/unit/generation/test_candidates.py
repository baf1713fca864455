"""The block-wise pick equals a plain sort; the log-probabilities equal float64."""

import math
from collections.abc import Iterator

import pytest
import torch

from dstrain.generation.candidates import best_continuations, to_log_probs
from dstrain.ops.continuations import block_maxima
from dstrain.ops.kernels import CONTINUATIONS, EXTENSION, LOG_PROBS
from tests.kernels import kernels_here


@pytest.fixture(params=kernels_here("continuations"), autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of the continuations, each."""
    with CONTINUATIONS.forced(request.param):
        yield


@pytest.mark.parametrize("width", [2, 5, 63, 64, 65, 129, 1280, 1281, 1343, 7792])
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_the_best_of_all_blocks_are_the_best_of_all(width: int, beam_size: int) -> None:
    generator = torch.Generator().manual_seed(width + beam_size)
    log_probs = torch.randn(6 * beam_size, width, generator=generator)
    totals = torch.randn(6, beam_size, generator=generator)
    totals[0, 0] = -torch.inf
    k = 2 * beam_size
    found, tokens, parents = best_continuations(log_probs, totals, k)
    everything = log_probs.view(6, beam_size, width) + totals[:, :, None]
    assert torch.equal(found, everything.flatten(1).topk(k, dim=1).values)
    rows = torch.arange(6)[:, None]
    finite = found.isfinite()
    assert torch.equal(everything[rows, parents, tokens][finite], found[finite])
    live = [
        {(p, t) for p, t, x in zip(*row, strict=True) if x > -math.inf}
        for row in zip(parents.tolist(), tokens.tolist(), found.tolist(), strict=True)
    ]
    assert [len(places) for places in live] == found.isfinite().sum(1).tolist()


@pytest.mark.parametrize("place", [0, 63, 64, 1279, 1280, 1299])
def test_the_best_token_is_found_in_every_column(place: int) -> None:
    log_probs = torch.full((2, 1300), -5.0)
    log_probs[1, place] = -1.0
    found, tokens, parents = best_continuations(log_probs, torch.zeros(1, 2), 4)
    assert found.tolist() == [[-1.0, -5.0, -5.0, -5.0]]
    assert (tokens[0, 0].item(), parents[0, 0].item()) == (place, 1)
    assert len({*zip(tokens[0].tolist(), parents[0].tolist(), strict=True)}) == 4


def test_a_forced_token_leaves_the_other_slots_empty() -> None:
    log_probs = torch.full((2, 1300), -torch.inf)
    log_probs[:, 1299] = torch.tensor([-3.0, -4.0])
    found, tokens, parents = best_continuations(log_probs, torch.zeros(1, 2), 4)
    assert found.tolist() == [[-3.0, -4.0, -math.inf, -math.inf]]
    assert tokens[0, :2].tolist() == [1299, 1299]
    assert parents[0, :2].tolist() == [0, 1]


def test_a_hypothesis_of_nan_is_dead_and_a_small_vocabulary_leaves_slots_empty() -> None:
    log_probs = torch.tensor([[math.nan, math.nan], [-0.5, -1.0]])
    found, tokens, parents = best_continuations(log_probs, torch.tensor([[0.0, 0.0]]), 5)
    assert found.tolist() == [[-0.5, -1.0, -math.inf, -math.inf, -math.inf]]
    assert tokens[0, :2].tolist() == [0, 1]
    assert parents[0, :2].tolist() == [1, 1]
    assert int(tokens.max()) <= 1
    assert int(parents.max()) <= 1


@pytest.mark.parametrize("name", kernels_here("extension"))
@pytest.mark.parametrize("length", [0, 1, 9])
def test_hypotheses_are_extended(name: str, length: int) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, history = torch.randint(99, (3, 2, length + 1), generator=generator), torch.randn(3, 2, length, generator=generator)
    rows, last = torch.tensor([1, 1, 0, 2, 3, 2, 5, 4, 4]), torch.randint(99, (3, 3), generator=generator)
    totals = torch.randn(3, 6, generator=generator)[:, ::2]
    with EXTENSION.forced(name):
        longer, later = EXTENSION.choose(rows.device, history.dtype)(tokens, history, rows, last, totals)
    for number, row in enumerate(rows.tolist()):
        assert longer.flatten(0, 1)[number].tolist() == [*tokens.flatten(0, 1)[row].tolist(), last.flatten()[number]]
        assert later.flatten(0, 1)[number].tolist() == [*history.flatten(0, 1)[row].tolist(), totals.flatten()[number]]


@pytest.mark.parametrize("width", [1, 64, 70, 200])
def test_block_maxima(width: int) -> None:
    x = torch.randn(3, 2, width)
    expected = torch.stack([part.amax(-1) for part in x.split(64, dim=-1)], -1)
    assert torch.equal(block_maxima(x), expected)


@pytest.mark.parametrize("name", kernels_here("log_probs"))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(1, 5), (5, 123), (40, 7792)])
def test_log_probs_in_place_equal_those_of_float64(shape: tuple[int, int], temperature: float, name: str) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 5
    logits[0, 3] = -torch.inf
    expected = (logits.double() / temperature).log_softmax(1)
    with LOG_PROBS.forced(name):
        found = to_log_probs(logits, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=2.4e-7, atol=4e-6)  # two roundings, of it and of 30
    assert found.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("name", kernels_here("log_probs"))
def test_log_probs_of_half_precision_are_float32_and_keep_the_logits(name: str) -> None:
    logits = torch.randn(3, 70).bfloat16()
    logits[1, 6], logits[2] = torch.nan, -torch.inf
    kept = logits.clone()
    with LOG_PROBS.forced(name):
        found = to_log_probs(logits, 1.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kept.float().log_softmax(1), equal_nan=True)
    assert torch.isnan(found[1:]).all()
    torch.testing.assert_close(logits, kept, equal_nan=True, rtol=0, atol=0)
